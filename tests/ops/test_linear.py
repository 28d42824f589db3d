"""Matrix products against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from fxquant.capture import capture
from fxquant.graph.program import ValueType
from fxquant.lowering.lower import lower
from fxquant.ops.base import Role
from fxquant.ops.table import TABLE
from tests.ops.harness import assert_emits_like_torch, compare

aten = torch.ops.aten


class Call(nn.Module):
    """`function(x, weight, bias)`."""

    def __init__(self, function: Any, weight: tuple[int, ...], bias: tuple[int, ...] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.function = function
        self.weight = nn.Parameter(torch.randn(weight, generator=generator))
        self.bias = None if bias is None else nn.Parameter(torch.randn(bias, generator=generator))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, self.weight, self.bias)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(
    leading=st.lists(st.integers(1, 3), min_size=0, max_size=3),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    has_bias=st.booleans(),
    opset=st.sampled_from([13, 17, 21]),
)
def test_linear_is_torchs_at_any_rank(leading: list[int], sizes: tuple[int, int], has_bias: bool, opset: int) -> None:
    inside, outside = sizes
    module = Call(aten.linear.default, (outside, inside), (outside,) if has_bias else None)
    x = torch.randn(*([2, *leading] if leading else []), inside, generator=torch.Generator().manual_seed(2))
    assert_emits_like_torch(module, (x,), opset=opset, dynamic=bool(leading), batches=(3,), atol=1e-5)


def test_linear_of_rank_two_keeps_its_weight_in_a_gemm() -> None:
    model = assert_emits_like_torch(Call(aten.linear.default, (5, 4), (5,)), (torch.randn(2, 4),), only="Gemm")
    assert [node.name for node in model.graph if node.op_type == "Gemm"] == ["linear"]
    assert tuple(model.graph.initializers["weight"].shape or ()) == (5, 4)


def test_linear_of_rank_three_is_a_gemm_between_reshapes() -> None:
    model = assert_emits_like_torch(Call(aten.linear.default, (5, 4), (5,)), (torch.randn(2, 3, 4),), only="Gemm")
    assert [node.op_type for node in model.graph] == ["Reshape", "Gemm", "Reshape"]
    assert model.graph[2].name == "linear"
    assert tuple(model.graph.initializers["weight"].shape or ()) == (5, 4)


def test_linear_of_rank_three_without_bias_stores_its_weight_transposed() -> None:
    model = assert_emits_like_torch(Call(aten.linear.default, (5, 4)), (torch.randn(2, 3, 4),), only="MatMul")
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert any(tuple(value.shape or ()) == (4, 5) for value in model.graph.initializers.values())


class Pairs(nn.Module):
    """A linear layer over all pairs of rows of two inputs: [a, 2 b, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.linear(torch.cat((x[:, None] + y[None], x[:, None] - y[None]), 1))


def test_linear_of_rank_three_is_torchs_when_two_sizes_are_symbolic() -> None:
    module, shapes = Pairs(), ((2, 4), (3, 4))
    batch, other = torch.export.Dim("batch", min=2), torch.export.Dim("other", min=2)
    inputs = tuple(torch.randn(shape) for shape in shapes)
    model = lower(capture(module, inputs, dynamic_shapes=({0: batch}, {0: other})))
    assert "Gemm" in [node.op_type for node in model.graph]
    for sizes in ((2, 3), (5, 2)):
        compare(module, model, [torch.randn(size, 4) for size in sizes], atol=1e-5, rtol=1e-5)


def _addmm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    return aten.addmm.default(bias, x, weight)


def _scaled_addmm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    return aten.addmm.default(bias, x, weight, beta=0.5, alpha=2)


@pytest.mark.parametrize("function", [_addmm, _scaled_addmm])
@pytest.mark.parametrize("bias", [(5,), (1, 5)])
def test_addmm_is_a_gemm(function: Any, bias: tuple[int, ...]) -> None:
    assert_emits_like_torch(Call(function, (4, 5), bias), (torch.randn(2, 4),), only="Gemm", atol=1e-5)


@pytest.mark.parametrize(
    ("target", "left", "right"),
    [
        (aten.mm.default, (2, 4), (4, 3)),
        (aten.bmm.default, (2, 3, 4), (2, 4, 5)),
        (aten.matmul.default, (2, 3, 4), (2, 4, 5)),
        (aten.matmul.default, (2, 6, 3, 4), (6, 4, 5)),
        (aten.matmul.default, (2, 3, 4), (4,)),
        (aten.matmul.default, (4,), (4, 5)),
        (aten.matmul.default, (4,), (4,)),
    ],
)
def test_product_is_a_matmul(target: Any, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    inputs = (torch.randn(left), torch.randn(right))
    batched = [len(shape) > 1 and shape[0] == 2 for shape in (left, right)]
    assert_emits_like_torch(lambda a, b: target(a, b), inputs, dynamic=batched, batches=(3,), only="MatMul", atol=1e-5)


@pytest.mark.parametrize("scales", [{}, {"beta": 0.5, "alpha": 0.125}])
def test_baddbmm_is_torchs(scales: dict[str, float]) -> None:
    inputs = (torch.randn(2, 1, 5), torch.randn(2, 3, 4), torch.randn(2, 4, 5))
    assert_emits_like_torch(lambda c, a, b: aten.baddbmm.default(c, a, b, **scales), inputs, only="MatMul", atol=1e-5)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bhwc,hkc->bhwk", [(2, 3, 4, 5), (3, 6, 5)]),
        ("b i j , b j k -> b i k", [(2, 3, 4), (2, 4, 5)]),
        ("bii->bi", [(2, 3, 3)]),
        ("...ij,...jk", [(2, 3, 4), (2, 4, 5)]),
    ],
)
def test_einsum_is_torchs(equation: str, shapes: list[tuple[int, ...]]) -> None:
    inputs = [torch.randn(shape) for shape in shapes]
    function = lambda *tensors: aten.einsum.default(equation, list(tensors))  # noqa: E731  (a function of any arity)
    assert_emits_like_torch(function, inputs, only="Einsum", atol=1e-5)


def _product(target: Any, right: str, rank: int, *extra: Any, **scales: float) -> fx.Node:
    graph = fx.Graph()
    x = graph.placeholder("x")
    other = graph.get_attr("w") if right == "parameter" else graph.placeholder("y")
    for node in (x, other):
        node.meta["type"] = ValueType((4,) * rank, torch.float32)
    if target is aten.addmm.default:
        bias = graph.get_attr("b")
        bias.meta["type"] = ValueType((4,), torch.float32)
        return graph.call_function(target, (bias, x, other), dict(scales))
    return graph.call_function(target, (x, other, *extra))


def test_product_with_a_matrix_parameter_is_a_layer_with_a_weight() -> None:
    node = _product(aten.matmul.default, "parameter", 2)
    definition = TABLE.find(node)
    assert definition is not None and definition.channel_axis is not None
    assert (definition.role_for(node), definition.weight_for(node)) == (Role.WEIGHTED, 1)
    assert definition.channel_axis(node) == 1
    for other in (_product(aten.matmul.default, "value", 2), _product(aten.matmul.default, "parameter", 3)):
        assert (definition.role_for(other), definition.weight_for(other)) == (Role.COMPUTE, None)


def test_addmm_with_a_factor_stays_in_float() -> None:
    plain = _product(aten.addmm.default, "parameter", 2)
    scaled = _product(aten.addmm.default, "parameter", 2, alpha=0.5)
    definition = TABLE.find(plain)
    assert definition is not None
    assert (definition.role_for(plain), definition.weight_for(plain)) == (Role.WEIGHTED, 2)
    assert (definition.role_for(scaled), definition.weight_for(scaled)) == (Role.FLOAT, None)
