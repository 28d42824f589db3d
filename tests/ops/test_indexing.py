"""Reading and writing by index, against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxquant.errors import FxquantError
from fxquant.ops.base import Role
from tests.ops.harness import assert_emits_like_torch
from tests.ops.inputs import bools, floats, integers, role_of

aten = torch.ops.aten
Function = Callable[..., Any]

X = floats(2, 3, 4, 5)
FOUR = integers(6, low=-4, high=4)
THREE = integers(6, low=-3, high=3)
GRID = integers(2, 6, low=-4, high=4)
ROWS = integers(7, 1, low=0, high=3)

READS: list[tuple[str, Function, tuple[torch.Tensor, ...]]] = [
    ("first-axis", lambda x, i: aten.index.Tensor(x, [i % x.shape[0]]), (X, FOUR)),
    ("inner-axis", lambda x, i: aten.index.Tensor(x, [None, None, i]), (X, FOUR)),
    ("inner-grid", lambda x, i: aten.index.Tensor(x, [None, None, i]), (X, GRID)),
    ("int32", lambda x, i: aten.index.Tensor(x, [None, None, i.int()]), (X, FOUR)),
    ("two-adjacent", lambda x, i, j: aten.index.Tensor(x, [None, j, i]), (X, FOUR, THREE)),
    ("two-leading", lambda x, i, j: aten.index.Tensor(x[0], [j, i]), (X, FOUR, THREE)),
    ("two-broadcast", lambda x, i, j: aten.index.Tensor(x, [None, j, i]), (X, FOUR, ROWS)),
    ("two-apart", lambda x, i, j: aten.index.Tensor(x, [None, j, None, i]), (X, FOUR, THREE)),
    ("three", lambda x, i, j: aten.index.Tensor(x, [None, j, i, i]), (X, FOUR, ROWS)),
    ("scalar-and-grid", lambda x, i, j: aten.index.Tensor(x, [None, j, i]), (X, GRID, torch.tensor(1))),
    ("mask", lambda x, m: aten.index.Tensor(x, [m]), (X[0], torch.tensor([True, False, True]))),
    ("mask-of-two-axes", lambda x, m: aten.index.Tensor(x, [m]), (X, bools(2, 3))),
    ("index_select", lambda x, i: aten.index_select.default(x, 2, i.abs() % 4), (X, FOUR)),
    ("index_select-scalar", lambda x, i: aten.index_select.default(x, -1, i), (X, torch.tensor(2))),
    ("gather", lambda x, i: aten.gather.default(x, 1, i), (floats(2, 5), integers(2, 7, low=0, high=5))),
    ("gather-last", lambda x, i: aten.gather.default(x, -1, i), (floats(2, 3, 5), integers(2, 3, 2, low=0, high=5))),
]
STATIC = {"mask-of-two-axes", "mask", "inner-grid", "scalar-and-grid"}


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize(("name", "function", "inputs"), READS, ids=[row[0] for row in READS])
def test_read_equals_torch(name: str, function: Function, inputs: tuple[torch.Tensor, ...], opset: int) -> None:
    assert_emits_like_torch(function, inputs, opset=opset, dynamic=name not in STATIC, batches=(3,))


S, INDEX, SOURCE = floats(2, 5), torch.tensor([[0, 2], [4, 1]]), floats(2, 5, seed=1)
PLACES = torch.tensor([0, 3])

WRITES: list[tuple[str, int, Function, tuple[torch.Tensor, ...]]] = [
    ("scatter.src", 13, lambda x, i, s: aten.scatter.src(x, 1, i, s), (S, INDEX, SOURCE)),
    ("scatter.src-same", 13, lambda x, i, s: aten.scatter.src(x, 1, i, s), (S, INDEX, SOURCE[:, :2])),
    ("scatter.value", 13, lambda x, i: aten.scatter.value(x, -1, i, 2.5), (S, INDEX)),
    ("scatter_add", 16, lambda x, i, s: aten.scatter_add.default(x, 1, i % 2, s), (S, INDEX, SOURCE)),
    ("slice_scatter", 13, lambda x, s: aten.slice_scatter.default(x, s[:, :2], 1, 1, 3), (S, SOURCE)),
    ("slice_scatter-step", 13, lambda x, s: aten.slice_scatter.default(x, s[:, :2], 1, 1, 5, 2), (S, SOURCE)),
    ("slice_scatter-all", 13, lambda x, s: aten.slice_scatter.default(x, s, 1, 0, 2**63 - 1), (S, SOURCE)),
    ("select_scatter", 13, lambda x, s: aten.select_scatter.default(x, s[:, 0], 1, -2), (S, SOURCE)),
    ("index_put", 13, lambda x, i, s: aten.index_put.default(x, [i], s[0]), (S.t(), PLACES, SOURCE[:, :2])),
    ("index_put-two", 13, lambda x, i: aten.index_put.default(x, [i % 2, i], x[0, 0]), (S, PLACES)),
    ("index_put-add", 16, lambda x, i: aten.index_put.default(x, [i], torch.ones(2, 2), True), (S.t(), PLACES)),
    ("index_put-mask", 13, lambda x: aten.index_put.default(x, [aten.lt.Scalar(x, 0)], x[1, 1]), (S,)),
]


@pytest.mark.parametrize(("name", "opset", "function", "inputs"), WRITES, ids=[row[0] for row in WRITES])
def test_write_equals_torch(name: str, opset: int, function: Function, inputs: tuple[torch.Tensor, ...]) -> None:
    assert_emits_like_torch(function, inputs, opset=opset, dynamic=False)
    if name in ("scatter.src-same", "slice_scatter-step", "index_put-mask", "select_scatter", "scatter.value"):
        assert_emits_like_torch(function, inputs, opset=opset)


def test_one_hot_equals_torch() -> None:
    assert_emits_like_torch(lambda i: aten.one_hot.default(i, 7), (integers(3, 4, low=0, high=7),), opset=13)


def test_one_hot_of_counted_classes_is_refused() -> None:
    with pytest.raises(Exception, match="counts its classes|data-dependent|GuardOnDataDependent|unbacked"):
        assert_emits_like_torch(lambda i: aten.one_hot.default(i, -1), (integers(3, 4, low=0, high=7),))


def test_mask_beside_another_index_is_refused() -> None:
    with pytest.raises(FxquantError, match="only and first"):
        assert_emits_like_torch(lambda x, m: aten.index.Tensor(x, [None, m]), (X, bools(3)), dynamic=False)


def test_role_of_index() -> None:
    assert role_of(lambda x, i: aten.index.Tensor(x, [None, None, i]), (X, FOUR)) is Role.GRID_PRESERVING
    assert role_of(lambda x, i, j: aten.index.Tensor(x, [None, j, i]), (X, FOUR, THREE)) is Role.FLOAT
    assert role_of(lambda b, i: aten.index.Tensor(b, [None, i]), (bools(2, 4), FOUR)) is Role.INDEX
