"""Convolutions against torch, over the space of their arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from fxquant.errors import ExportError
from fxquant.numerics.padded_convolution import PADDED_CONVOLUTION
from fxquant.ops.base import Role
from fxquant.ops.table import TABLE
from tests.ops.harness import assert_emits_like_torch

aten = torch.ops.aten


class Convolution(nn.Module):
    """aten.convolution with parameters of its own."""

    def __init__(self, weight: tuple[int, ...], bias: int | None, *rest: Any, target: Any = aten.convolution.default):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(weight, generator=generator))
        self.bias = None if bias is None else nn.Parameter(torch.randn(bias, generator=generator))
        self.rest = rest
        self.target = target

    def forward(self, x: torch.Tensor) -> Any:
        return self.target(x, self.weight, self.bias, *self.rest)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Convolution, torch.Tensor]:
    """A convolution (any rank, grouping, stride, padding, dilation, transposed or not) and an input for it."""
    axes = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))
    inside, outside = (groups * draw(st.integers(1, 2)) for _ in range(2))
    per_axis = [
        (draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 2)), draw(st.integers(1, 2)))
        for _ in range(axes)
    ]
    kernel, stride, padding, dilation = ([item[i] for item in per_axis] for i in range(4))
    transposed = draw(st.booleans())
    limits = [max(s - 1, min(d - 1, p)) for s, d, p in zip(stride, dilation, padding, strict=True)]
    extra = [draw(st.integers(0, limit)) if transposed else 0 for limit in limits]
    shape = (inside, outside // groups) if transposed else (outside, inside // groups)
    bias = outside if draw(st.booleans()) else None
    module = Convolution((*shape, *kernel), bias, stride, padding, dilation, transposed, extra, groups)
    sizes = [draw(st.integers(5, 7)) for _ in range(axes)]
    return module, torch.randn(2, inside, *sizes, generator=torch.Generator().manual_seed(2))


@settings(max_examples=30, derandomize=True, deadline=None)
@given(convolutions())
def test_convolution_is_torchs_for_all_arguments(case: tuple[Convolution, torch.Tensor]) -> None:
    module, x = case
    assert_emits_like_torch(module, (x,), atol=1e-5, batches=(3,))


@pytest.mark.parametrize("opset", [13, 17, 22])
def test_convolution_is_torchs_at_other_opsets(opset: int) -> None:
    module = Convolution((6, 2, 3, 3), 6, [2, 1], [1, 0], [1, 2], False, [0, 0], 2)
    assert_emits_like_torch(module, (torch.randn(2, 4, 8, 8),), opset=opset, only="Conv", atol=1e-5)


def test_transposed_convolution_becomes_conv_transpose_with_output_padding() -> None:
    module = Convolution((4, 3, 3, 3), 6, [2, 2], [1, 1], [1, 1], True, [1, 0], 2)
    model = assert_emits_like_torch(module, (torch.randn(2, 4, 5, 5),), only="ConvTranspose", atol=1e-5)
    (node,) = [node for node in model.graph if node.op_type == "ConvTranspose"]
    assert node.attributes["output_padding"].as_ints() == (1, 0)


def test_transposed_convolution_is_refused_when_its_output_padding_has_no_onnx_form() -> None:
    module = Convolution((4, 3, 3), 3, [1], [0], [2], True, [1], 1)
    with pytest.raises(ExportError, match=r"output_padding=\[1\] exceeds both stride and padding"):
        assert_emits_like_torch(module, (torch.randn(2, 4, 5),))


def test_padded_convolution_has_two_pads_an_axis() -> None:
    module = Convolution((4, 2, 3, 3), 4, [2, 2], [0, 1, 1, 2], [1, 1], False, [0, 0], 1, target=PADDED_CONVOLUTION)
    model = assert_emits_like_torch(module, (torch.randn(2, 2, 6, 6),), atol=1e-5, only="Conv")
    assert len(model.graph) in (1, 2)  # one more where torch.export took the composite operation apart


def test_convolution_without_batch_is_refused_by_name() -> None:
    module = Convolution((4, 2, 3), 4, [1, 1], [0], [1], False, [0], 1)
    with pytest.raises((ExportError, RuntimeError)):
        assert_emits_like_torch(module, (torch.randn(2, 6),), dynamic=False)


def _node(transposed: bool) -> fx.Node:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    args = (x, weight, None, [1], [0], [1], transposed, [0], 1)
    return graph.call_function(aten.convolution.default, args)


def test_roles_when_transposed_or_not() -> None:
    plain, transposed = _node(False), _node(True)
    definition = TABLE.find(plain)
    assert definition is not None and definition.channel_axis is not None
    assert (definition.role_for(plain), definition.role_for(transposed)) == (Role.WEIGHTED, Role.FLOAT)
    assert (definition.types_for(plain), definition.types_for(transposed)) == (("Conv",), ("ConvTranspose",))
    assert (definition.channel_axis(plain), definition.channel_axis(transposed)) == (0, 1)
