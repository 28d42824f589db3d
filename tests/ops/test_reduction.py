"""Reductions, running sums and sorts against torch; their axes are attributes or inputs, as the opset has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.ops.base import Role
from tests.ops.harness import assert_emits_like_torch
from tests.ops.inputs import bools, floats, integers, positive, role_of

aten = torch.ops.aten
Function = Callable[..., Any]

X, N, B = floats(2, 3, 4, 5), integers(2, 3, 4), bools(2, 3, 4)

TABLE: list[tuple[str, Function, tuple[torch.Tensor, ...]]] = [
    ("mean", lambda x: aten.mean.default(x), (X,)),
    ("mean.dim", lambda x: aten.mean.dim(x, [2, 3]), (X,)),
    ("mean.dim-keep", lambda x: aten.mean.dim(x, [-1], True), (X,)),
    ("mean.dim-none", lambda x: aten.mean.dim(x, None), (X,)),
    ("mean.dim-dtype", lambda x: aten.mean.dim(x, [1], dtype=torch.float32), (N,)),
    ("sum", lambda x: aten.sum.default(x), (X,)),
    ("sum.dim", lambda x: aten.sum.dim_IntList(x, [1, -1], True), (X,)),
    ("sum-batch", lambda x: aten.sum.dim_IntList(x, [0]), (X,)),
    ("sum-int", lambda x: aten.sum.dim_IntList(x, [1]), (N,)),
    ("sum-bool", lambda x: aten.sum.dim_IntList(x, [1]), (B,)),
    ("sum-bool-all", lambda x: aten.sum.default(x), (B,)),
    ("sum-dtype", lambda x: aten.sum.dim_IntList(x, [1], dtype=torch.float32), (N,)),
    ("prod", lambda x: aten.prod.default(x), (positive(2, 3),)),
    ("prod.dim", lambda x: aten.prod.dim_int(x, 1, True), (X,)),
    ("prod-int", lambda x: aten.prod.dim_int(x, 1), (N,)),
    ("amax", lambda x: aten.amax.default(x, [2, 3]), (X,)),
    ("amax-keep", lambda x: aten.amax.default(x, [1], True), (X,)),
    ("amax-all", lambda x: aten.amax.default(x), (X,)),
    ("amax-uint8", lambda x: aten.amax.default(x.to(torch.uint8), [1]), (N,)),
    ("amax-bool", lambda x: aten.amax.default(x, [1]), (B,)),
    ("amin", lambda x: aten.amin.default(x, [1]), (X,)),
    ("max", lambda x: aten.max.default(x), (X,)),
    ("min", lambda x: aten.min.default(x), (N,)),
    ("max.dim", lambda x: aten.max.dim(x, 1), (X,)),
    ("max.dim-keep", lambda x: aten.max.dim(x, -1, True), (X,)),
    ("max.dim-values", lambda x: aten.max.dim(x, 1)[0], (X,)),
    ("max.dim-indices", lambda x: aten.max.dim(x, 1)[1], (X,)),
    ("max.dim-int", lambda x: aten.max.dim(x, 1), (N,)),
    ("min.dim", lambda x: aten.min.dim(x, 1), (X,)),
    ("argmax", lambda x: aten.argmax.default(x, 1), (X,)),
    ("argmax-keep", lambda x: aten.argmax.default(x, -1, True), (X,)),
    ("argmax-all", lambda x: aten.argmax.default(x), (X,)),
    ("argmax-all-keep", lambda x: aten.argmax.default(x, None, True), (X,)),
    ("argmax-int", lambda x: aten.argmax.default(x, 1), (N,)),
    ("argmin", lambda x: aten.argmin.default(x, 1), (X,)),
    ("logsumexp", lambda x: aten.logsumexp.default(x, [1]), (X,)),
    ("any", lambda x: aten.any.default(x), (B,)),
    ("any.dim", lambda x: aten.any.dim(x, 1), (N,)),
    ("any.dims", lambda x: aten.any.dims(x, [1, 2], True), (B,)),
    ("all", lambda x: aten.all.default(x), (B,)),
    ("all.dim", lambda x: aten.all.dim(x, -1, True), (X,)),
    ("all.dims", lambda x: aten.all.dims(x, [0, 2]), (B,)),
    ("var.correction", lambda x: aten.var.correction(x, [1], correction=0, keepdim=True), (X,)),
    ("var.correction-default", lambda x: aten.var.correction(x, [2, 3]), (X,)),
    ("var-batch", lambda x: aten.var.correction(x, [0, 2], correction=1), (X,)),
    ("var.dim", lambda x: aten.var.dim(x, [1], True), (X,)),
    ("var.dim-biased", lambda x: aten.var.dim(x, [1], False), (X,)),
    ("var.default", lambda x: aten.var.default(x, True), (X,)),
    ("std.correction", lambda x: aten.std.correction(x, [1], correction=1), (X,)),
    ("std.dim", lambda x: aten.std.dim(x, [-1], False, True), (X,)),
    ("var_mean", lambda x: aten.var_mean.correction(x, [1], correction=0, keepdim=True), (X,)),
    ("var_mean-drop", lambda x: aten.var_mean.correction(x, [1, 2], correction=0), (X,)),
    ("std_mean", lambda x: aten.std_mean.correction(x, [1], correction=1), (X,)),
    ("cumsum", lambda x: aten.cumsum.default(x, 1), (X,)),
    ("cumsum-batch", lambda x: aten.cumsum.default(x, 0), (X,)),
    ("cumsum-bool", lambda x: aten.cumsum.default(x, -1), (B,)),
    ("cumsum-dtype", lambda x: aten.cumsum.default(x, 1, dtype=torch.float32), (N,)),
    ("diff", lambda x: aten.diff.default(x), (X,)),
    ("diff-twice", lambda x: aten.diff.default(x, 2, 1), (X,)),
    ("diff-prepend", lambda x: aten.diff.default(x, 1, -1, x[..., :1] - 1, x[..., :2]), (N,)),
    ("diff-bool", lambda x: aten.diff.default(x, 1, 1), (B,)),
    ("topk", lambda x: aten.topk.default(x, 2), (X,)),
    ("topk-smallest", lambda x: aten.topk.default(x, 2, 1, False), (X,)),
    ("sort", lambda x: aten.sort.default(x, -1), (X,)),
    ("sort-descending", lambda x: aten.sort.default(x, 1, True), (X,)),
    ("sort-batch", lambda x: aten.sort.default(x, 0)[0], (X,)),
    ("sort.stable", lambda x: aten.sort.stable(x, stable=True, dim=1), (X,)),
    ("argsort", lambda x: aten.argsort.default(x, 2), (X,)),
]


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize(("name", "function", "inputs"), TABLE, ids=[row[0] for row in TABLE])
def test_reduction_equals_torch(name: str, function: Function, inputs: tuple[torch.Tensor, ...], opset: int) -> None:
    assert_emits_like_torch(function, inputs, opset=opset, atol=5e-6, batches=(3,))


@settings(max_examples=15, deadline=None)
@given(
    dims=st.sets(st.integers(-4, 3)),
    keepdim=st.booleans(),
    op=st.sampled_from([aten.mean.dim, aten.sum.dim_IntList]),
)
def test_any_axes_equal_torch(dims: set[int], keepdim: bool, op: Any) -> None:
    once = sorted({dim % 4: dim for dim in dims}.values())
    assert_emits_like_torch(lambda x: op(x, once, keepdim), (X,), opset=17, atol=5e-6, batches=(3,))


def test_unread_indices_are_not_computed() -> None:
    model = assert_emits_like_torch(lambda x: aten.max.dim(x, 1)[0], (X,), only="ReduceMax")
    assert [node.op_type for node in model.graph] == ["ReduceMax"]


def test_reductions_of_a_scalar_equal_torch() -> None:
    def function(x: torch.Tensor) -> Any:
        return aten.sum.default(x), aten.max.dim(x, 0), aten.argmax.default(x, 0), aten.cumsum.default(x, 0)

    assert_emits_like_torch(function, (torch.tensor(2.5),), dynamic=False)


ROLES: list[tuple[Function, Role]] = [
    (lambda x: aten.mean.dim(x, [1]), Role.FLOAT),
    (lambda x: aten.amax.default(x, [1]), Role.GRID_PRESERVING),
    (lambda x: aten.max.dim(x, 1)[0], Role.GRID_PRESERVING),
    (lambda x: aten.max.dim(x, 1)[1], Role.INDEX),
    (lambda x: aten.argmax.default(x), Role.INDEX),
    (lambda x: aten.any.default(x), Role.INDEX),
]


@pytest.mark.parametrize(("function", "role"), ROLES)
def test_role_of_reduction(function: Function, role: Role) -> None:
    assert role_of(function, (X,)) is role
