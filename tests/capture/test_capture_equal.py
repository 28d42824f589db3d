"""The captured program computes what the model computes, at other batch sizes and in train mode too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import (
    Attention,
    BatchNormAct,
    ConvNet,
    FunctionalNorm,
    InPlace,
    Pair,
    Result,
    Shared,
    StandardizedConv,
    Structured,
    TiedLanguageModel,
)
from torch import nn
from torch.utils import _pytree as pytree

from fxquant.capture import capture
from fxquant.capture.check import difference
from fxquant.capture.functional import is_mutating
from fxquant.capture.normal_form import ALIASES


def assert_equal(program: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Outputs equal bit for bit or within 1e-5 of the largest; each side gets inputs of its own."""
    mine, theirs = copy.deepcopy((args, kwargs)), copy.deepcopy((args, kwargs))
    with torch.no_grad():
        got, want = program.module(*mine[0], **mine[1]), model(*theirs[0], **theirs[1])
    for out, ref in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        assert difference(out, ref) is None


def targets(program: Any) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("example_batch", [1, 2, 4])
def test_conv_net_when_captured_at_any_batch(example_batch: int, batch: int) -> None:
    model = ConvNet().eval()
    program = capture(model, torch.randn(example_batch, 3, 8, 8))
    assert_equal(program, model, torch.randn(batch, 3, 8, 8))


@pytest.mark.parametrize("batch", [1, 3])
def test_shared_module_when_called_four_times(batch: int) -> None:
    model = Shared()
    program = capture(model, torch.randn(2, 4))
    assert_equal(program, model, torch.randn(batch, 4))
    weights = [node for node in program.graph.nodes if node.op == "get_attr"]
    assert [(w.name, len(w.users)) for w in weights] == [("body_0_weight", 4), ("body_0_bias", 4)]


def test_tied_weights_when_embedding_and_head_share() -> None:
    model = TiedLanguageModel()
    program = capture(model, torch.randint(0, 11, (2, 7)))
    assert_equal(program, model, torch.randint(0, 11, (3, 7)))
    module = program.module
    assert module.head.weight is module.embed.weight and module.b.weight is module.a.weight
    assert [n.name for n in program.graph.nodes if n.op == "get_attr" and "weight" in n.name] == [
        "embed_weight",
        "a_weight",
    ]
    assert len(program.node("embed_weight").users) == 2


def test_in_place_operations_when_views_inputs_and_buffers_are_written() -> None:
    model = InPlace()
    program = capture(model, torch.randn(2, 4, 4))
    assert {str(n.target) for n in program.graph.nodes if is_mutating(n)} == {"aten.copy_.default"}
    for calls in (1, 2):
        assert_equal(program, model, torch.randn(3, 4, 4))
        assert program.module.calls.item() == model.calls.item() == calls
    x = torch.ones(1, 4, 4)
    program.module(x)
    assert torch.equal(x, torch.ones(1, 4, 4))
    assert {"x", "calls"} <= {note.place for note in program.notes}


@pytest.mark.parametrize(("kind", "type_"), [("dict", dict), ("namedtuple", Pair), ("dataclass", Result)])
def test_structured_output_when_inputs_are_keywords(kind: str, type_: type) -> None:
    model = Structured(kind)
    program = capture(model, {"x": torch.randn(2, 4), "scale": torch.randn(2, 4)})
    inputs = {"x": torch.randn(3, 4), "scale": torch.randn(3, 4)}
    assert_equal(program, model, **inputs)
    assert type(program.module(**inputs)) is type_


def test_positional_and_keyword_inputs_when_mixed() -> None:
    model = Structured("dict")
    program = capture(model, (torch.randn(1, 4),), {"scale": torch.randn(1, 4), "flag": True})
    assert_equal(program, model, torch.randn(3, 4), scale=torch.randn(3, 4), flag=True)


def test_attention_when_padding_mask_is_given() -> None:
    model = Attention().eval()
    mask = torch.tensor([[False, False, True]])
    fastpath = torch.backends.mha.get_fastpath_enabled()
    program = capture(model, (torch.randn(1, 3, 8), mask))
    assert torch.backends.mha.get_fastpath_enabled() is fastpath
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert_equal(program, model, torch.randn(4, 3, 8), mask.expand(4, 3))
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    assert "aten.scaled_dot_product_attention.default" in targets(program)
    assert any("dropout_p" in note.text for note in program.notes)


def test_lstm_when_captured_is_one_operation() -> None:
    model = nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True)
    program = capture(model, torch.randn(2, 5, 4))
    assert_equal(program, model, torch.randn(3, 5, 4))
    assert "aten.lstm.input" in targets(program)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("axes", [1, 2])
def test_same_padding_when_kernel_is_even_or_odd(kernel: int, dilation: int, axes: int) -> None:
    kind = nn.Conv1d if axes == 1 else nn.Conv2d
    model = kind(2, 3, kernel, padding="same", dilation=dilation)
    program = capture(model, torch.randn(2, 2, *[9] * axes))
    assert ("aten.constant_pad_nd.default" in targets(program)) == (dilation * (kernel - 1) % 2 == 1)
    convolution = next(n for n in program.graph.nodes if n.target is torch.ops.aten.convolution.default)
    assert convolution.args[4] == [dilation * (kernel - 1) // 2] * axes and convolution.args[7] == [0] * axes


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), (2, 3, 5, 5)),
        (nn.ConvTranspose1d(3, 4, 3, groups=1), (2, 3, 5)),
        (nn.Conv3d(2, 4, 3, stride=2, groups=2), (2, 2, 5, 5, 5)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 5)),
        (nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 5, 5)),
    ],
)
def test_convolution_when_of_any_kind_has_one_spelling(model: nn.Module, shape: tuple[int, ...]) -> None:
    program = capture(model, torch.randn(shape))
    assert_equal(program, model, torch.randn(3, *shape[1:]))
    convolutions = [n for n in program.graph.nodes if "conv" in str(n.target)]
    assert [n.target for n in convolutions] == [torch.ops.aten.convolution.default]
    rank = len(shape) - 2
    assert all(len(convolutions[0].args[i]) == rank for i in (3, 4, 5, 7))


def test_addmm_when_weight_is_not_transposed_becomes_linear() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))
            self.bias = nn.Parameter(torch.randn(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.mm(torch.addmm(self.bias, x, self.weight), self.weight.t())

    model = Conv1D()
    program = capture(model, torch.randn(2, 4))
    assert_equal(program, model, torch.randn(5, 4))
    assert targets(program) == ["aten.transpose.int", "aten.linear.default", "aten.linear.default"]


def test_train_step_when_dropout_is_off_gives_the_same_outputs_and_statistics() -> None:
    model = ConvNet(p=0.0)
    program = capture(model, torch.randn(2, 3, 8, 8))
    model.train(), program.module.train()
    for _ in range(2):
        x = torch.randn(4, 3, 8, 8)
        out, ref = program.module(x), model(x)
        assert difference(out, ref) is None
        out.square().sum().backward(), ref.square().sum().backward()
    for (name, buffer), (other, wanted) in zip(program.module.named_buffers(), model.named_buffers(), strict=True):
        assert name == other and difference(buffer, wanted) is None
    for (name, mine), (other, theirs) in zip(program.module.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.03, None])
def test_batch_norm_and_dropout_when_switched_keep_their_hyperparameters(momentum: float | None) -> None:
    program = capture(ConvNet(momentum=momentum), torch.randn(2, 3, 8, 8))
    program.module.train().eval()
    bn, drop = program.module.get_submodule("bn1"), program.module.get_submodule("drop")
    assert type(bn) is nn.BatchNorm2d and (bn.eps, bn.momentum) == (1e-3, momentum)
    assert type(drop) is nn.Dropout and drop.p == 0.25
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(program.module(x), program.module(x))
    program.module.train()
    assert not torch.equal(program.module(x), program.module(x))


def test_batch_norm_subclass_when_it_has_an_activation_becomes_stock() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct(4)).eval()
    model[1].running_mean.normal_()
    program = capture(model, torch.randn(2, 3, 6, 6))
    assert type(program.module.get_submodule("1")) is nn.BatchNorm2d
    assert program.module.get_submodule("1").momentum == 0.2
    assert [n.name for n in program.graph.nodes if n.op == "call_module" or "relu" in str(n.target)] == ["_1", "_1_act"]
    model.train(), program.module.train()
    x = torch.randn(3, 3, 6, 6)
    assert difference(program.module(x), model(x)) is None
    assert difference(program.module.get_submodule("1").running_var, model[1].running_var) is None


def test_batch_norm_when_without_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    program = capture(model, torch.randn(4, 4))
    twin = program.module.get_submodule("1")
    assert isinstance(twin, nn.BatchNorm1d) and twin.running_mean is None and not twin.track_running_stats
    assert_equal(program, model.eval(), torch.randn(6, 4))


def test_batch_norm_of_weights_when_standardised_stays_an_operation() -> None:
    model = nn.Sequential(StandardizedConv(3, 4, 3))
    program = capture(model, torch.randn(2, 3, 6, 6))
    assert "aten.batch_norm.default" in targets(program)
    assert any("statistics in eval mode too" in note.text for note in program.notes)
    assert_equal(program, model, torch.randn(3, 3, 6, 6))


def test_functional_norm_and_dropout_when_captured() -> None:
    program = capture(FunctionalNorm(), torch.randn(2, 3, 4, 4))
    assert any("frozen in train mode too" in note.text for note in program.notes)
    dropouts = [program.submodule(n) for n in program.graph.nodes if n.op == "call_module"]
    assert [(type(d), d.p) for d in dropouts] == [(nn.Dropout2d, 0.3), (nn.Dropout, 0.4)]


@st.composite
def small_nets(draw: st.DrawFn) -> nn.Module:
    """A random small CNN or MLP."""
    activations = [
        nn.ReLU(inplace=True),
        nn.ReLU6(),
        nn.GELU(),
        nn.SiLU(),
        nn.Hardswish(inplace=True),
        nn.LeakyReLU(0.1),
    ]
    layers: list[nn.Module] = []
    if draw(st.booleans()):
        width = 3
        for _ in range(draw(st.integers(1, 3))):
            out = draw(st.sampled_from([2, 4, 6]))
            kernel, bias = draw(st.integers(1, 4)), draw(st.booleans())
            padding = draw(st.sampled_from(["same", "valid", kernel // 2]))
            layers.append(nn.Conv2d(width, out, kernel, padding=padding, bias=bias))
            if draw(st.booleans()):
                layers.append(nn.BatchNorm2d(out, eps=draw(st.sampled_from([1e-5, 1e-3]))))
            layers.append(draw(st.sampled_from(activations)))
            width = out
        pool = draw(
            st.sampled_from([nn.MaxPool2d(2, padding=1), nn.AvgPool2d(2, ceil_mode=True), nn.AdaptiveAvgPool2d(2)])
        )
        layers += [pool, nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(3)]
    else:
        layers.append(nn.Flatten())
        for width in draw(st.lists(st.sampled_from([3, 8]), min_size=1, max_size=3)):
            layers += [nn.LazyLinear(width), nn.BatchNorm1d(width), draw(st.sampled_from(activations))]
    model = nn.Sequential(*layers).eval()
    model(torch.zeros(2, 3, 16, 16))
    return model


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@given(small_nets(), st.sampled_from([1, 2, 4]))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_random_net_when_captured_equals_eager(model: nn.Module, example_batch: int) -> None:
    program = capture(model, torch.randn(example_batch, 3, 16, 16))
    for batch in (1, 2, 5):
        assert_equal(program, model, torch.randn(batch, 3, 16, 16))


def test_other_names_of_an_operation_when_captured_become_its_first_name() -> None:
    class Named(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.multiply(torch.absolute(x), 0.5).negative()
            z = torch.true_divide(torch.subtract(x, y), 3.0)
            return torch.concat([torch.arctan(z), torch.special.expit(y)], 1) * torch.greater(x, 0).any()

    model, x = Named().eval(), torch.randn(2, 3)
    program = capture(model, (x,))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    wanted = "mul.Tensor abs.default neg.default sub.Tensor div.Tensor cat.default atan.default sigmoid.default"
    assert {f"aten.{name}" for name in wanted.split()} <= targets
    assert not targets & {str(alias) for alias in ALIASES}
    torch.testing.assert_close(program.module(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(("alias", "first"), ALIASES.items(), ids=str)
def test_aliases_when_renamed_take_the_same_arguments(
    alias: torch._ops.OpOverload, first: torch._ops.OpOverload
) -> None:
    kinds = [[(one.name, str(one.type)) for one in target._schema.arguments] for target in (alias, first)]
    assert kinds[0] == kinds[1]
