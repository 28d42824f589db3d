"""fold-padding: fires, declines with the reason, keeps the outputs, twice is once, golden diff; and its operator."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fxquant.errors import FxquantError
from fxquant.graph.program import Program
from fxquant.lowering.lower import lower
from fxquant.numerics.padded_convolution import PADDED_CONVOLUTION
from fxquant.passes import FoldPadding
from tests.helpers import assert_rewrites, run_pass
from tests.passes.harness import ROUNDING, captured, difference, output, reasons

IMAGE = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1))
SIGNAL = torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(2))
VOLUME = torch.randn(2, 4, 5, 6, 5, generator=torch.Generator().manual_seed(3))


class Padded(nn.Module):
    """Pads one after the other, then a layer."""

    def __init__(self, layer: nn.Module, *pads: tuple[int, ...], **options: Any) -> None:
        super().__init__()
        self.layer, self.pads, self.options = layer, pads, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for pad in self.pads:
            x = F.pad(x, pad, **self.options)
        return torch.as_tensor(self.layer(x))


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 6, 3, **options)


def padding(program: Program) -> list[int]:
    """Padding of the program's one convolution."""
    targets = (torch.ops.aten.convolution.default, PADDED_CONVOLUTION)
    (found,) = [node for node in program.graph.nodes if node.target in targets]
    assert isinstance(found.args[4], list)
    return list(found.args[4])


FOLDED: dict[str, tuple[nn.Module, torch.Tensor, list[int]]] = {
    "same at both ends": (Padded(conv(), (1, 1, 2, 2)), IMAGE, [2, 1]),
    "one axis": (Padded(conv(), (1, 1)), IMAGE, [0, 1]),
    "on top of the convolution's own": (Padded(conv(padding=1, bias=False), (1, 1, 0, 0)), IMAGE, [1, 2]),
    "different ends": (Padded(conv(stride=2), (0, 1, 0, 1)), IMAGE, [0, 0, 1, 1]),
    "different ends on top of its own": (Padded(conv(padding=1, groups=2), (2, 0, 0, 3)), IMAGE, [1, 3, 4, 1]),
    "1d": (Padded(nn.Conv1d(4, 6, 3, dilation=2), (4, 0)), SIGNAL, [4, 0]),
    "3d": (Padded(nn.Conv3d(4, 2, 2), (0, 1, 0, 1, 1, 1)), VOLUME, [1, 0, 0, 1, 1, 1]),
    "named batch and channels, unpadded": (Padded(conv(), (1, 0, 1, 0, 0, 0, 0, 0)), IMAGE, [1, 1, 0, 0]),
    "two in a row": (Padded(conv(), (1, 0, 0, 2), (0, 1, 1, 0)), IMAGE, [1, 1, 2, 1]),
    "two that even out": (Padded(conv(), (1, 0, 1, 0), (0, 1, 0, 1)), IMAGE, [1, 1]),
    "padding='same' with an even kernel": (nn.Conv2d(4, 6, 4, padding="same"), IMAGE, [1, 1, 2, 2]),
    "ZeroPad2d": (nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv()), IMAGE, [0, 0, 1, 1]),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own, about speed
@pytest.mark.parametrize("case", FOLDED)
def test_zero_pad_is_folded_into_the_convolution(case: str) -> None:
    model, x, expected = FOLDED[case]
    before, program = output(model, x), captured(model, x)
    entry = run_pass(FoldPadding(), program, x)
    assert padding(program) == expected and reasons(entry) == []
    assert "pad" not in str(program).replace("padding", "").replace("padded", "")
    assert difference(program, before, x) < ROUNDING


class FanOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(), conv()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (1, 1, 1, 1))
        return torch.as_tensor(self.conv1(x) + self.conv2(x))


class PaddedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, F.pad(self.weight, (0, 1, 0, 1)))


NO_CONVOLUTION = "behind it is no convolution that takes it as its input"
DECLINED: dict[str, tuple[nn.Module, torch.Tensor, str]] = {
    "two users": (FanOut(), IMAGE, "pad has 2 users (conv1, conv2)"),
    "average pooling": (Padded(nn.AvgPool2d(3), (1, 1, 1, 1)), IMAGE, f"layer {NO_CONVOLUTION}"),
    "maximum pooling": (Padded(nn.MaxPool2d(3), (0, 1, 0, 1)), IMAGE, f"layer {NO_CONVOLUTION}"),
    "output": (Padded(nn.Identity(), (0, 1, 0, 1)), IMAGE, f"output {NO_CONVOLUTION}"),
    "padded weight": (PaddedWeight(), IMAGE, f"convolution {NO_CONVOLUTION}"),
    "another value": (Padded(conv(), (1, 1, 1, 1), value=-1.0), IMAGE, "it pads with -1.0, and a convolution with 0"),
    "reflection": (Padded(conv(), (1, 1, 1, 1), mode="reflect"), IMAGE, "its mode is reflect"),
    "crop": (Padded(conv(), (1, 1, -1, 1)), IMAGE, "it crops ([1, 1, -1, 1])"),
    "channels": (Padded(nn.Conv2d(5, 6, 3), (0, 0, 0, 0, 0, 1)), IMAGE, "it pads the batch or the channels of layer"),
    "transposed": (
        Padded(nn.ConvTranspose2d(4, 6, 3), (1, 1, 1, 1)),
        IMAGE,
        "layer is transposed, and its padding crops",
    ),
}


@pytest.mark.parametrize("case", DECLINED)
def test_pad_is_declined_with_the_reason(case: str) -> None:
    model, x, expected = DECLINED[case]
    program = captured(model, x)
    before = str(program)
    entry = run_pass(FoldPadding(), program)
    assert reasons(entry) == [f"pad not folded: {expected}"]
    assert entry.edits == () and str(program) == before


def test_folding_twice_is_folding_once() -> None:
    program = captured(nn.Sequential(Padded(conv(), (0, 1, 0, 1)), Padded(nn.AvgPool2d(2), (0, 1, 0, 1))), IMAGE)
    first, second = run_pass(FoldPadding(), program), run_pass(FoldPadding(), program)
    assert first.edits and second.edits == ()
    assert len(reasons(first)) == 1 and reasons(first) == reasons(second)


def test_golden_diff() -> None:
    program = captured(Padded(conv(bias=False), (0, 1, 0, 1)), IMAGE)
    expected = """
        - pad = aten.pad(x, pad=[0, 1, 0, 1]) : float32[s0, 4, 10, 9]
        - layer = aten.convolution(pad, layer_weight) : float32[s0, 6, 8, 7]  @layer
        + layer = fxquant.padded_convolution(x, layer_weight, padding=[0, 0, 1, 1]) : float32[s0, 6, 8, 7]  @layer
    """
    assert_rewrites(run_pass(FoldPadding(), program), expected, edits=4)


@settings(max_examples=10)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=2),
    st.integers(0, 1),
    st.integers(1, 2),
    st.sampled_from([1, 2]),
)
def test_random_pads_keep_the_output(pads: list[list[int]], own: int, stride: int, groups: int) -> None:
    model = Padded(conv(padding=own, stride=stride, groups=groups), *map(tuple, pads))
    before, program = output(model, IMAGE), captured(model, IMAGE)
    run_pass(FoldPadding(), program)
    assert difference(program, before, IMAGE) < ROUNDING
    assert run_pass(FoldPadding(), program).edits == ()


def test_comparison_fails_when_the_ends_are_swapped() -> None:
    model = Padded(conv(), (0, 1, 0, 1))
    before, program = output(model, IMAGE), captured(model, IMAGE)
    run_pass(FoldPadding(), program)
    node = program.node("layer")
    node.args = (*node.args[:4], [1, 1, 0, 0], *node.args[5:])
    program.recompile()
    assert difference(program, before, IMAGE) > ROUNDING


def test_padded_convolution_has_the_gradients_of_pad_and_convolution() -> None:
    model = Padded(conv(stride=2), (0, 1, 2, 1))
    program = captured(model, IMAGE)
    run_pass(FoldPadding(), program)
    for module in (model, program.module):
        module.zero_grad()
        module(IMAGE).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(program.module.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-3)


def test_padded_convolution_survives_pickle_and_copy() -> None:
    program = captured(Padded(conv(), (0, 1, 0, 1)), IMAGE)
    run_pass(FoldPadding(), program)
    expected = program.module(IMAGE)
    for twin in (pickle.loads(pickle.dumps(program.module)), copy.deepcopy(program.module)):
        assert torch.equal(twin(IMAGE), expected)


def test_padded_convolution_becomes_one_conv_with_four_pads() -> None:
    program = captured(Padded(conv(stride=2), (0, 1, 2, 1)), IMAGE)
    run_pass(FoldPadding(), program)
    model = lower(program, 21)
    (node,) = list(model.graph)
    assert node.op_type == "Conv" and list(node.attributes["pads"].as_ints()) == [2, 0, 1, 1]
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()})
    assert difference(program, torch.from_numpy(got), IMAGE) < ROUNDING


def test_padded_convolution_refuses_what_it_cannot_mean() -> None:
    weight = torch.randn(6, 4, 3, 3)
    with pytest.raises(FxquantError, match="two pads for each spatial axis"):
        PADDED_CONVOLUTION(IMAGE, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    with pytest.raises(FxquantError, match="transposed=True"):
        PADDED_CONVOLUTION(IMAGE, weight, None, [1, 1], [1, 1, 1, 1], [1, 1], True, [0, 0], 1)
