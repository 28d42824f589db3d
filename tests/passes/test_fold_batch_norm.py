"""fold-batch-norm: fires, declines with the reason, keeps the outputs, twice is once, golden diff, random chains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fxquant.errors import PassError
from fxquant.passes import FoldBatchNorm, FreezeBatchNorm
from tests.helpers import assert_rewrites, run_pass
from tests.passes.harness import (
    ROUNDING,
    Chain,
    batch_norm_nodes,
    captured,
    difference,
    output,
    randomize,
    reasons,
)

IMAGE = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1))
SIGNAL = torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(2))
VOLUME = torch.randn(2, 4, 5, 6, 5, generator=torch.Generator().manual_seed(3))
ROWS = torch.randn(3, 4, generator=torch.Generator().manual_seed(4))

BEHIND: dict[str, tuple[nn.Module, nn.Module, torch.Tensor]] = {
    "conv2d without bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), IMAGE),
    "conv2d with bias and padding": (nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), IMAGE),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), IMAGE),
    "depthwise, strided, dilated": (nn.Conv2d(4, 8, 3, groups=4, stride=2, dilation=2), nn.BatchNorm2d(8), IMAGE),
    "conv1d": (nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5), SIGNAL),
    "conv3d": (nn.Conv3d(4, 5, 2, bias=False), nn.BatchNorm3d(5), VOLUME),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), IMAGE),
    "transposed and grouped": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), IMAGE),
    "transposed 1d": (nn.ConvTranspose1d(4, 8, 4, groups=4, padding=1), nn.BatchNorm1d(8), SIGNAL),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), ROWS),
    "linear without bias": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), ROWS),
    "affine=False": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), IMAGE),
    "eps=1e-3, momentum=None": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=1e-3, momentum=None), IMAGE),
}

AHEAD: dict[str, tuple[list[nn.Module], torch.Tensor]] = {
    "convolution": ([nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)], IMAGE),
    "convolution without bias": ([nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, bias=False)], IMAGE),
    "grouped": ([nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)], IMAGE),
    "depthwise": ([nn.BatchNorm1d(4), nn.Conv1d(4, 8, 3, groups=4)], SIGNAL),
    "linear": ([nn.BatchNorm1d(4), nn.Linear(4, 6)], ROWS),
    "flatten": ([nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(288, 3)], IMAGE),
    "flatten without batch axis twice": ([nn.BatchNorm2d(4), nn.Flatten(2), nn.Flatten(), nn.Linear(288, 3)], IMAGE),
    "average pooling": ([nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.Conv2d(4, 6, 3)], IMAGE),
    "global pooling": ([nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)], IMAGE),
    "two in a row": ([nn.ReLU(), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)], IMAGE),
}


@pytest.mark.parametrize("case", BEHIND)
def test_batch_norm_is_folded_behind_a_layer(case: str) -> None:
    layer, norm, x = BEHIND[case]
    model = randomize(nn.Sequential(layer, norm))
    expected, program = output(model, x), captured(model, x)
    entry = run_pass(FoldBatchNorm(), program)
    assert batch_norm_nodes(program) == [] and reasons(entry) == []
    assert sorted(program.module.state_dict()) == ["0.bias", "0.weight"]
    assert difference(program, expected, x) < ROUNDING


class Tokens(nn.Module):
    """LeViT's layer: a linear of tokens, their rows flattened for the batch norm; read once more if asked."""

    def __init__(self, reads_again: bool) -> None:
        super().__init__()
        self.fc, self.bn, self.reads_again = nn.Linear(11, 6), nn.BatchNorm1d(6), reads_again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        z = self.bn(y.flatten(0, 1)).reshape_as(y)
        return z + y if self.reads_again else z


def test_batch_norm_of_flattened_tokens_is_folded() -> None:
    model = randomize(Tokens(reads_again=False))
    expected, program = output(model, SIGNAL), captured(model, SIGNAL)
    assert reasons(run_pass(FoldBatchNorm(), program)) == [] and batch_norm_nodes(program) == []
    assert difference(program, expected, SIGNAL) < ROUNDING
    program = captured(randomize(Tokens(reads_again=True)), SIGNAL)
    (reason,) = reasons(run_pass(FoldBatchNorm(), program))
    assert reason.startswith("bn not folded: fc has ") and batch_norm_nodes(program) == ["bn"]


@pytest.mark.parametrize("case", AHEAD)
def test_batch_norm_is_folded_into_the_layer_behind_it(case: str) -> None:
    layers, x = AHEAD[case]
    model = randomize(nn.Sequential(*layers))
    expected, program = output(model, x), captured(model, x)
    entry = run_pass(FoldBatchNorm(), program)
    assert batch_norm_nodes(program) == [] and reasons(entry) == []
    assert difference(program, expected, x) < ROUNDING


def test_batch_norm_passes_max_pooling_where_no_channel_changes_sign() -> None:
    norm = nn.BatchNorm2d(4)
    model = randomize(nn.Sequential(norm, nn.MaxPool2d(3, padding=1, ceil_mode=True), nn.Conv2d(4, 6, 2)))
    with torch.no_grad():
        norm.weight.abs_()  # one of them is 0
    expected, program = output(model, IMAGE), captured(model, IMAGE)
    run_pass(FoldBatchNorm(), program)
    assert batch_norm_nodes(program) == [] and difference(program, expected, IMAGE) < ROUNDING


def test_batch_norm_without_shift_is_folded_before_padding_and_transposed_layers() -> None:
    for layer in (nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.ConvTranspose2d(4, 6, 3, groups=2)):
        model = randomize(nn.Sequential(nn.BatchNorm2d(4), layer))
        norm: Any = model[0]
        norm.running_mean.zero_()
        with torch.no_grad():
            norm.bias.zero_()
        expected, program = output(model, IMAGE), captured(model, IMAGE)
        run_pass(FoldBatchNorm(), program)
        assert batch_norm_nodes(program) == [] and difference(program, expected, IMAGE) < ROUNDING
        assert ("1.bias" in program.module.state_dict()) == (layer.bias is not None)  # no bias of zeros


def test_tiny_variance_uses_eps_and_zero_gamma_stays_finite() -> None:
    conv, norm = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, eps=1e-3)
    assert norm.running_var is not None
    norm.running_var.fill_(1e-20)
    with torch.no_grad():
        norm.weight[:3] = 0.0
    model = nn.Sequential(conv, norm)
    expected, program = output(model, IMAGE), captured(model, IMAGE)
    run_pass(FoldBatchNorm(), program)
    assert difference(program, expected, IMAGE) < ROUNDING
    assert not bool(program.module.get_parameter("0.weight")[:3].any())


def test_frozen_batch_norm_is_folded() -> None:
    layers = [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)]
    model = randomize(nn.Sequential(*layers))
    expected, program = output(model, IMAGE), captured(model, IMAGE)
    program.module.train()
    run_pass(FreezeBatchNorm(), program)
    run_pass(FoldBatchNorm(), program)
    assert batch_norm_nodes(program) == []
    assert sorted(program.module.state_dict()) == ["0.bias", "0.weight", "4.bias", "4.weight"]
    assert not [node for node in program.graph.nodes if node.op == "get_attr" and not node.users]
    assert difference(program, expected, IMAGE) < ROUNDING


def test_frozen_layer_gets_a_frozen_bias() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)).requires_grad_(False)
    program = captured(model, IMAGE)
    run_pass(FoldBatchNorm(), program)
    assert not any(parameter.requires_grad for parameter in program.module.parameters())


def test_weights_are_computed_in_float64_and_stored_in_their_dtype() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6))).double()
    x = IMAGE.double()
    expected, program = output(model, x), captured(model, x)
    run_pass(FoldBatchNorm(), program)
    assert program.module.get_parameter("0.bias").dtype == torch.float64
    assert difference(program, expected, x) < 1e-13


class Named(nn.Module):
    """A layer under the names of its own parts, so that reasons read like a real model's."""

    conv: nn.Conv2d
    conv1: nn.Conv2d
    conv2: nn.Conv2d
    head: nn.Conv2d
    bn: nn.BatchNorm2d
    bn1: nn.BatchNorm2d
    bn2: nn.BatchNorm2d

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class FanOut(Named):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.conv2(x)
        return torch.relu(self.bn2(found)) + torch.as_tensor(found)


class TwoNorms(Named):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.conv(x)
        return torch.relu(self.bn1(found)) + torch.relu(self.bn2(found))


class CalledTwice(Named):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn1(self.conv(x))) + torch.relu(self.bn2(self.conv(x + 1)))


class Tied(Named):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__(**parts)
        self.head.weight = self.conv.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(self.conv(x)))


class ComputedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 1, 1))
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(F.conv2d(x, self.weight * 2)))


def _conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 6, 3, **options)


def _bn(**options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(6, **options)


def _shifted(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.constant_(norm.bias, 0.25)
    return norm


def _flipped(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.constant_(norm.weight[:3], -1.0)
    return norm


def _not_finite() -> nn.BatchNorm2d:
    norm = _bn()
    assert norm.running_var is not None
    norm.running_var[2] = float("nan")
    return norm


NOTHING_BEHIND = "behind it is no convolution, linear, pooling or flattening"
DECLINED: dict[str, tuple[nn.Module, torch.Tensor, list[str]]] = {
    "fan-out": (
        FanOut(conv2=_conv(), bn2=_bn()),
        IMAGE,
        [f"bn2 not folded: conv2 has 2 users (bn2, add); relu {NOTHING_BEHIND}"],
    ),
    "two batch norms on one convolution": (
        TwoNorms(conv=_conv(), bn1=_bn(), bn2=_bn()),
        IMAGE,
        [
            f"bn1 not folded: conv has 2 users (bn1, bn2); relu {NOTHING_BEHIND}",
            f"bn2 not folded: conv has 2 users (bn1, bn2); relu_1 {NOTHING_BEHIND}",
        ],
    ),
    "convolution called twice": (
        CalledTwice(conv=_conv(), bn1=_bn(), bn2=_bn()),
        IMAGE,
        [
            f"bn1 not folded: conv_weight has 2 users (conv, conv_1); relu {NOTHING_BEHIND}",
            f"bn2 not folded: conv_weight has 2 users (conv, conv_1); relu_1 {NOTHING_BEHIND}",
        ],
    ),
    "tied weight": (
        Tied(conv=_conv(), bn=_bn(), head=_conv()),
        IMAGE,
        [f"bn not folded: conv.weight and head.weight are one tensor; relu {NOTHING_BEHIND}"],
    ),
    "computed weight": (
        ComputedWeight(),
        IMAGE,
        [f"bn not folded: convolution's weight or bias is computed, by mul; relu {NOTHING_BEHIND}"],
    ),
    "no statistics": (
        nn.Sequential(_conv(), _bn(track_running_stats=False)),
        IMAGE,
        ["_1 not folded: it keeps no running statistics"],
    ),
    "not finite": (
        nn.Sequential(_conv(), _not_finite()),
        IMAGE,
        ["_1 not folded: its statistics or parameters are not finite"],
    ),
    "rank-3 linear": (
        nn.Sequential(nn.Linear(11, 6), nn.BatchNorm1d(4)),
        SIGNAL,
        [
            "_1 not folded: _0 does not have its channels on axis 1 of float32[s0, 4, 6]; "
            "output does not take _1 as its input alone"
        ],
    ),
    "shift before padding": (
        nn.Sequential(nn.ReLU(), _shifted(4), _conv(padding=1)),
        IMAGE,
        [
            "_1 not folded: _0 before it is no convolution or linear; "
            "_2 pads with zeros: a shift (here of up to 0.25) cannot pass"
        ],
    ),
    "shift before a transposed convolution": (
        nn.Sequential(nn.ReLU(), _shifted(4), nn.ConvTranspose2d(4, 6, 3)),
        IMAGE,
        [
            "_1 not folded: _0 before it is no convolution or linear; "
            "_2 is transposed, and its borders leave out taps: a shift (here of up to 0.25) cannot pass"
        ],
    ),
    "sign before max pooling": (
        nn.Sequential(nn.ReLU(), _flipped(4), nn.MaxPool2d(2), _conv()),
        IMAGE,
        ["_1 not folded: _0 before it is no convolution or linear; _2 takes the maximum, and 3 channels change sign"],
    ),
    "average pooling with padding": (
        nn.Sequential(nn.ReLU(), _shifted(4), nn.AvgPool2d(3, padding=1), _conv(padding=1)),
        IMAGE,
        [
            "_1 not folded: _0 before it is no convolution or linear; "
            "_2 averages with padding, or with a divisor of its own"
        ],
    ),
    "linear over another axis": (
        nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(11, 3)),
        SIGNAL,
        [
            "_1 not folded: _0 before it is no convolution or linear; "
            "_2 does not take its channels from axis 1 of _1 (float32[s0, 4, 11])"
        ],
    ),
}


@pytest.mark.parametrize("case", DECLINED)
def test_batch_norm_is_declined_with_the_reason(case: str) -> None:
    model, x, expected = DECLINED[case]
    program = captured(model, x) if case != "not finite" else _captured_with_nan(model, x)
    before = str(program)
    entry = run_pass(FoldBatchNorm(), program)
    assert reasons(entry) == expected
    assert entry.edits == () and str(program) == before


def _captured_with_nan(model: Any, x: torch.Tensor) -> Any:
    norm: Any = model[1]
    broken = norm.running_var.clone()
    norm.running_var.fill_(1.0)
    program = captured(model, x)
    program.module.get_buffer("1.running_var").copy_(broken)
    return program


def test_folded_weight_that_overflows_its_dtype_is_declined() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)).half()
    norm: Any = model[1]
    norm.running_var.fill_(1e-7)
    with torch.no_grad():
        norm.weight.fill_(6e4)
    x = IMAGE.half() * 1e-3
    program = captured(model, x)
    assert reasons(run_pass(FoldBatchNorm(forward=False), program)) == [
        "_1 not folded: the folded weight of _0 would not be finite in torch.float16; folding forward is off"
    ]


def test_folding_forward_can_be_switched_off() -> None:
    program = captured(Chain(bn=nn.BatchNorm2d(4), conv=_conv()), IMAGE)
    entry = run_pass(FoldBatchNorm(forward=False), program)
    assert reasons(entry) == ["bn not folded: x before it is no convolution or linear; folding forward is off"]


def test_batch_norm_in_training_mode_is_refused() -> None:
    program = captured(nn.Sequential(_conv(), _bn()), IMAGE)
    program.module.train()
    with pytest.raises(PassError) as caught:
        run_pass(FoldBatchNorm(), program)
    message = str(caught.value)
    assert message.startswith("fold-batch-norm: node '_1' (BatchNorm2d at 1")
    assert "got one in training mode" in message and "Run 'freeze-batch-norm' first" in message
    assert batch_norm_nodes(program) == ["_1"]


class Shared(Named):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(self.conv1(x))) + torch.relu(self.bn(self.conv2(x)))


def test_batch_norm_called_behind_two_convolutions_is_folded_into_both() -> None:
    model = randomize(Shared(conv1=_conv(), conv2=_conv(bias=False), bn=_bn()))
    expected, program = output(model, IMAGE), captured(model, IMAGE)
    run_pass(FoldBatchNorm(), program)
    assert batch_norm_nodes(program) == [] and difference(program, expected, IMAGE) < ROUNDING
    assert "bn.weight" not in program.module.state_dict()


class Alias(Named):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__(**parts)
        self.blocks = nn.ModuleList([self.conv, self.bn])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.bn(self.conv(x)))


def test_module_under_two_names_is_folded_under_both() -> None:
    model = randomize(Alias(conv=_conv(bias=False), bn=_bn()))
    expected, program = output(model, IMAGE), captured(model, IMAGE)
    run_pass(FoldBatchNorm(), program)
    state = program.module.state_dict()
    assert sorted(state) == ["blocks.0.bias", "blocks.0.weight", "conv.bias", "conv.weight"]
    assert torch.equal(state["blocks.0.weight"], state["conv.weight"])
    assert difference(program, expected, IMAGE) < ROUNDING


class TakenName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel_weight = nn.Parameter(torch.randn(6, 4, 1, 1))
        self.kernel_bias = nn.Parameter(torch.randn(4, 1, 1))
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.bn(F.conv2d(x + self.kernel_bias, self.kernel_weight)))


def test_new_bias_takes_another_name_when_its_own_is_taken() -> None:
    model = randomize(TakenName())
    expected, program = output(model, IMAGE), captured(model, IMAGE)
    run_pass(FoldBatchNorm(), program)
    assert sorted(program.module.state_dict()) == ["kernel_bias", "kernel_bias_1", "kernel_weight"]
    assert difference(program, expected, IMAGE) < ROUNDING


def test_comparison_fails_when_one_folded_weight_is_wrong() -> None:
    model = randomize(nn.Sequential(_conv(), _bn()), seed=5)
    expected, program = output(model, IMAGE), captured(model, IMAGE)
    run_pass(FoldBatchNorm(), program)
    with torch.no_grad():
        program.module.get_parameter("0.weight")[3, 0, 0, 0] += 0.01
    assert difference(program, expected, IMAGE) > ROUNDING


def test_folding_twice_is_folding_once() -> None:
    ahead = [nn.BatchNorm2d(4), nn.BatchNorm2d(4), _conv(), _bn()]
    declined = [nn.ReLU(), _shifted(6), nn.Conv2d(6, 6, 3, padding=1)]
    program = captured(randomize(nn.Sequential(*ahead, *declined)), IMAGE)
    first = run_pass(FoldBatchNorm(), program)
    second = run_pass(FoldBatchNorm(), program)
    assert first.edits and second.edits == ()
    assert reasons(second) == reasons(first) and len(reasons(second)) == 1


def test_golden_diff() -> None:
    program = captured(randomize(Chain(conv=_conv(bias=False, padding=1), bn=_bn(), relu=nn.ReLU())), IMAGE)
    entry = run_pass(FoldBatchNorm(), program)
    expected = """
        - conv = aten.convolution(x, conv_weight, padding=1) : float32[s0, 6, 9, 8]  @conv
        - bn = BatchNorm2d[bn](conv, eps=1e-05, momentum=0.1) : float32[s0, 6, 9, 8]  @bn
        - relu = aten.relu(bn) : float32[s0, 6, 9, 8]  @relu
        + conv_bias = get conv.bias : float32[6]
        + conv = aten.convolution(x, conv_weight, bias=conv_bias, padding=1) : float32[s0, 6, 9, 8]  @conv
        + relu = aten.relu(conv) : float32[s0, 6, 9, 8]  @relu
    """
    assert_rewrites(entry, expected, edits=9)  # set, add, create, annotate twice, rewire twice, erase, remove


@st.composite
def chains(draw: st.DrawFn) -> nn.Sequential:
    """Convolutions, batch norms, poolings and activations in any order."""
    channels = 4
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(2, 6))):
        kind = draw(st.sampled_from(["conv", "bn", "bn", "relu", "pool", "transposed"]))
        if kind == "conv":
            groups, out = draw(st.sampled_from([1, 2])), draw(st.sampled_from([4, 6]))
            options: dict[str, Any] = {"padding": draw(st.integers(0, 1)), "bias": draw(st.booleans())}
            layers.append(nn.Conv2d(channels, out, draw(st.sampled_from([1, 2])), groups=groups, **options))
            channels = out
        elif kind == "transposed":
            layers.append(nn.ConvTranspose2d(channels, 4, 2, groups=draw(st.sampled_from([1, 2]))))
            channels = 4
        else:
            pool: nn.Module = nn.MaxPool2d(2, 1)
            layers.append({"bn": nn.BatchNorm2d(channels), "relu": nn.ReLU(), "pool": pool}[kind])
    return nn.Sequential(*layers)


@settings(max_examples=12)
@given(chains(), st.integers(0, 1000))
def test_random_chains_keep_their_outputs(model: nn.Sequential, seed: int) -> None:
    torch.manual_seed(seed)
    randomize(model, seed)
    expected, program = output(model, IMAGE), captured(model, IMAGE)
    entry = run_pass(FoldBatchNorm(), program)
    assert len(reasons(entry)) == len(batch_norm_nodes(program))
    assert difference(program, expected, IMAGE) < 5 * ROUNDING  # gammas that cancel lose digits
    assert run_pass(FoldBatchNorm(), program).edits == ()
