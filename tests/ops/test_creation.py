"""Tensors made from sizes and numbers, against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxquant.errors import FxquantError
from tests.ops.harness import assert_emits_like_torch
from tests.ops.inputs import bools, floats, integers

aten = torch.ops.aten
Function = Callable[..., Any]

X = floats(2, 3, 4)

TABLE: list[tuple[str, Function]] = [
    ("arange", lambda x: aten.arange.default(5)),
    ("arange-float", lambda x: aten.arange.default(2.5, dtype=torch.float32)),
    ("arange-size", lambda x: aten.arange.default(x.shape[0])),
    ("arange-size-float", lambda x: aten.arange.default(x.shape[0], dtype=torch.float32)),
    ("arange-size-int32", lambda x: aten.arange.default(2 * x.shape[0], dtype=torch.int32)),
    ("arange.start", lambda x: aten.arange.start(2, 9)),
    ("arange.start-size", lambda x: aten.arange.start(1, x.shape[0] + 1)),
    ("arange.start_step", lambda x: aten.arange.start_step(0, 1, 0.125)),
    ("arange.start_step-size", lambda x: aten.arange.start_step(0, 4 * x.shape[0], 3)),
    ("zeros", lambda x: aten.zeros.default([2, 3])),
    ("zeros-size", lambda x: aten.zeros.default([x.shape[0], 3], dtype=torch.bool)),
    ("ones", lambda x: aten.ones.default([x.shape[0], 1], dtype=torch.int64)),
    ("full", lambda x: aten.full.default([2, x.shape[0]], 0.5)),
    ("full-int", lambda x: aten.full.default([2, 2], 7)),
    ("full-scalar", lambda x: aten.full.default([], -torch.inf)),
    ("full-of-size", lambda x: aten.full.default([3], x.shape[0])),
    ("zeros_like", lambda x: aten.zeros_like.default(x)),
    ("zeros_like-int", lambda x: aten.zeros_like.default(x, dtype=torch.int64)),
    ("ones_like", lambda x: aten.ones_like.default(x)),
    ("full_like", lambda x: aten.full_like.default(x, 3.5)),
    ("fill.Scalar", lambda x: aten.fill.Scalar(x, 2)),
    ("fill.Tensor", lambda x: aten.fill.Tensor(x, aten.amax.default(x))),
    ("new_zeros", lambda x: aten.new_zeros.default(x, [x.shape[0]])),
    ("new_ones", lambda x: aten.new_ones.default(x, [x.shape[0], 2], dtype=torch.bool)),
    ("new_full", lambda x: aten.new_full.default(x, [2], 1.5)),
    ("eye", lambda x: aten.eye.default(3)),
    ("eye.m", lambda x: aten.eye.m(3, 4, dtype=torch.int64)),
    ("linspace", lambda x: aten.linspace.default(-1, 1, 5)),
    ("scalar_tensor", lambda x: aten.scalar_tensor.default(1.5)),
    ("scalar_tensor-size", lambda x: aten.scalar_tensor.default(x.shape[0], dtype=torch.float32)),
    ("triu_indices", lambda x: aten.triu_indices.default(3, 4, 1)),
    ("tril_indices", lambda x: aten.tril_indices.default(4, 3)),
]


@pytest.mark.parametrize(("name", "function"), TABLE, ids=[row[0] for row in TABLE])
def test_creation_equals_torch(name: str, function: Function) -> None:
    assert_emits_like_torch(lambda x: (function(x), aten.neg.default(x)), (X,), opset=13)


@pytest.mark.parametrize("opset", [13, 14, 21])
@pytest.mark.parametrize("diagonal", [-1, 0, 2])
def test_triangles_equal_torch(diagonal: int, opset: int) -> None:
    def function(x: Any, i: Any, b: Any) -> Any:
        inputs = (x, i, b, i.int())
        return [op(value, diagonal) for op in (aten.triu.default, aten.tril.default) for value in inputs]

    assert_emits_like_torch(function, (X, integers(2, 3, 4), bools(2, 4, 4)), opset=opset)


def test_empty_has_the_size_and_dtype() -> None:
    model = assert_emits_like_torch(lambda x: aten.fill.Scalar(aten.empty.memory_format([x.shape[0], 2]), 1.0), (X,))
    assert model.graph.outputs[0].dtype is not None


def test_triangle_of_symbolic_size_is_refused_below_opset_14() -> None:
    def function(x: torch.Tensor) -> Any:
        return aten.triu.default(aten.ones.default([x.shape[0], x.shape[0]]), 1)

    assert_emits_like_torch(function, (X,), opset=14)
    with pytest.raises(FxquantError, match="Trilu from opset 14 on"):
        assert_emits_like_torch(function, (X,), opset=13)


def test_constants_do_not_swell_the_file() -> None:
    model = assert_emits_like_torch(lambda x: aten.add.Tensor(x, aten.zeros.default([3, 4])), (X,), only="Expand")
    sizes = [value.const_value.size for value in model.graph.initializers.values() if value.const_value is not None]
    assert max(sizes) <= 2
