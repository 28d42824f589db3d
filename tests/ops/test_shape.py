"""Views, axes, slices, joins and rearrangements against torch, with a symbolic batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import FxquantError
from fxquant.ops._reshape import constant_shape
from fxquant.ops.base import Role
from tests.ops.harness import assert_emits_like_torch
from tests.ops.inputs import bools, floats, integers, role_of

aten = torch.ops.aten
Function = Callable[..., Any]

X = floats(2, 3, 4, 6)
Y = floats(2, 3, 4, 6, seed=1)
M = floats(2, 12)
ONES = floats(2, 1, 4, 1)

VIEWS: list[tuple[str, Function, tuple[torch.Tensor, ...]]] = [
    ("reshape", lambda x: aten.reshape.default(x, [x.shape[0], 12, 6]), (X,)),
    ("reshape-minus-1", lambda x: aten.reshape.default(x, [x.shape[0], -1]), (X,)),
    ("reshape-batch-inferred", lambda x: aten.reshape.default(x, [-1, 8, 9]), (X,)),
    ("reshape-merge-batch", lambda x: aten.reshape.default(x, [x.shape[0] * 3, 4, 6]), (X,)),
    ("reshape-batch-inside", lambda x: aten.reshape.default(x, [3, x.shape[0], 24]), (X,)),
    ("reshape-batch-last", lambda x: aten.reshape.default(x, [72, x.shape[0]]), (X,)),
    ("reshape-flat", lambda x: aten.reshape.default(x, [-1]), (X,)),
    ("view", lambda x: aten.view.default(x, [x.shape[0], 3, 2, 2, 6]), (X,)),
    ("_unsafe_view", lambda x: aten._unsafe_view.default(x, [x.shape[0], 72]), (X,)),
    ("reshape_as", lambda x, m: aten.reshape_as.default(x, m), (floats(2, 3, 4), M)),
    ("view_as", lambda x, m: aten.view_as.default(x, m), (floats(2, 3, 4), M)),
    ("flatten-1", lambda x: aten.flatten.using_ints(x, 1), (X,)),
    ("flatten-all", lambda x: aten.flatten.using_ints(x), (X,)),
    ("flatten-2", lambda x: aten.flatten.using_ints(x, 2), (X,)),
    ("flatten-0-1", lambda x: aten.flatten.using_ints(x, 0, 1), (X,)),
    ("flatten-1-2", lambda x: aten.flatten.using_ints(x, 1, -2), (X,)),
    ("flatten-of-matrix", lambda x: aten.flatten.using_ints(x, 1), (M,)),
    ("unflatten", lambda x: aten.unflatten.int(x, 1, [3, -1]), (M,)),
    ("unflatten-batch", lambda x: aten.unflatten.int(x, -1, [2, 2, 3]), (M,)),
    ("permute", lambda x: aten.permute.default(x, [0, 2, 3, 1]), (X,)),
    ("permute-negative", lambda x: aten.permute.default(x, [0, -1, 1, 2]), (X,)),
    ("permute-nothing", lambda x: aten.permute.default(x, [0, 1, 2, 3]), (X,)),
    ("permute-batch", lambda x: aten.permute.default(x, [2, 0, 3, 1]), (X,)),
    ("transpose", lambda x: aten.transpose.int(x, 1, 2), (X,)),
    ("transpose-negative", lambda x: aten.transpose.int(x, -2, -1), (X,)),
    ("swapaxes", lambda x: aten.swapaxes.default(x, 1, 3), (X,)),
    ("mT", lambda x: aten.mT.default(x), (X,)),
    ("t", lambda x: aten.t.default(x), (M,)),
    ("numpy_T", lambda x: aten.numpy_T.default(x), (X,)),
    ("movedim", lambda x: aten.movedim.int(x, 1, -1), (X,)),
    ("movedim-list", lambda x: aten.movedim.intlist(x, [1, 3], [3, 0]), (X,)),
    ("squeeze", lambda x: aten.squeeze.default(x), (ONES,)),
    ("squeeze.dim", lambda x: aten.squeeze.dim(x, -1), (ONES,)),
    ("squeeze.dim-not-1", lambda x: aten.squeeze.dim(x, 2), (ONES,)),
    ("squeeze.dims", lambda x: aten.squeeze.dims(x, [1, 2, 3]), (ONES,)),
    ("unsqueeze", lambda x: aten.unsqueeze.default(x, 1), (X,)),
    ("unsqueeze-last", lambda x: aten.unsqueeze.default(x, -1), (X,)),
    ("expand", lambda x: aten.expand.default(x, [-1, 5, -1, 3]), (ONES,)),
    ("expand-new-axis", lambda x: aten.expand.default(x, [2, x.shape[0], 1, 4, 7]), (ONES,)),
    ("expand-nothing", lambda x: aten.expand.default(x, [-1, -1, 4, 1]), (ONES,)),
    ("expand-batch", lambda x, m: aten.expand.default(x[:1], [m.shape[0], -1, -1, 2]), (ONES, M)),
    ("expand_as", lambda x, y: aten.expand_as.default(x, y), (ONES, X)),
    ("broadcast_to", lambda x: aten.broadcast_to.default(x, [x.shape[0], 3, 4, 2]), (ONES,)),
    ("slice", lambda x: aten.slice.Tensor(x, 2, 1, 3), (X,)),
    ("slice-step", lambda x: aten.slice.Tensor(x, 3, 1, 2**63 - 1, 2), (X,)),
    ("slice-negative", lambda x: aten.slice.Tensor(x, -1, -3, -1), (X,)),
    ("slice-all", lambda x: aten.slice.Tensor(x, 0, 0, 2**63 - 1), (X,)),
    ("slice-none", lambda x: aten.slice.Tensor(x, 1, None, None, 2), (X,)),
    ("slice-size", lambda x, y: aten.slice.Tensor(x, 0, 0, y.shape[0] - 1), (floats(4, 3), floats(4, 2))),
    ("slice-empty", lambda x: aten.slice.Tensor(x, 1, 2, 1), (X,)),
    ("narrow", lambda x: aten.narrow.default(x, 2, 1, 2), (X,)),
    ("narrow-to-end", lambda x: aten.narrow.default(x, 2, -2, 2), (X,)),
    ("select", lambda x: aten.select.int(x, 1, 0), (X,)),
    ("select-negative", lambda x: aten.select.int(x, -1, -2), (X,)),
    ("select-size", lambda x: aten.select.int(x, 0, x.shape[0] - 1), (X,)),
    ("unbind", lambda x: aten.unbind.int(x, 1), (X,)),
    ("unbind-partly", lambda x: aten.unbind.int(x, 2)[1], (X,)),
    ("split", lambda x: aten.split.Tensor(x, 2, 3), (X,)),
    ("split-rest", lambda x: aten.split.Tensor(x, 4, -1), (X,)),
    ("split-one", lambda x: aten.split.Tensor(x, 6, -1), (X,)),
    ("split_with_sizes", lambda x: aten.split_with_sizes.default(x, [1, 3, 2], 3), (X,)),
    ("split.sizes", lambda x: aten.split.sizes(x, [1, 5], 3), (X,)),
    ("chunk", lambda x: aten.chunk.default(x, 2, 1), (X,)),
    ("chunk-partly", lambda x: aten.chunk.default(x, 3, -1)[1:], (X,)),
    ("chunk-of-getitem", lambda x: aten.relu.default(aten.chunk.default(x, 3, -1)[-1]), (X,)),
    ("cat", lambda x, y: aten.cat.default([x, y], 1), (X, Y)),
    ("cat-negative", lambda x, y: aten.cat.default([x, y, x], -1), (X, Y)),
    ("cat-batch", lambda x, y: aten.cat.default([x, y]), (X, Y)),
    ("cat-promotes", lambda x, y: aten.cat.default([x, y], 1), (X, integers(2, 3, 4, 6))),
    ("cat-empty", lambda x: aten.cat.default([torch.zeros(0), x], 1), (X,)),
    ("concat", lambda x, y: aten.concat.default([x, y], 2), (X, Y)),
    ("stack", lambda x, y: aten.stack.default([x, y], 1), (X, Y)),
    ("stack-last", lambda x, y: aten.stack.default([x, y], -1), (X, Y)),
]

PADS: list[tuple[str, Function]] = [
    ("constant", lambda x: aten.pad.default(x, [1, 2])),
    ("constant-value", lambda x: aten.pad.default(x, [1, 2, 0, 3], "constant", -torch.inf)),
    ("constant-negative", lambda x: aten.pad.default(x, [-1, 2, 1, -1])),
    ("constant-size", lambda x: aten.pad.default(x, [0, x.shape[0]])),
    ("constant_pad_nd", lambda x: aten.constant_pad_nd.default(x, [0, 1, 2, 0], 1.5)),
    ("constant-int", lambda x: aten.pad.default(x.to(torch.int64), [1, 1], "constant", 3.0)),
    ("constant-bool", lambda x: aten.pad.default(aten.gt.Scalar(x, 0), [1, 1], "constant", True)),
    ("reflect", lambda x: aten.pad.default(x, [2, 1, 3, 0], "reflect")),
    ("replicate", lambda x: aten.pad.default(x, [2, 1, 3, 0], "replicate")),
    ("replicate-negative", lambda x: aten.pad.default(x, [2, -1, -3, 0], "replicate")),
    ("circular", lambda x: aten.pad.default(x, [2, 1, 3, 0], "circular")),
    ("reflection_pad2d", lambda x: aten.reflection_pad2d.default(x, [1, 2, 3, 0])),
    ("replication_pad2d", lambda x: aten.replication_pad2d.default(x, [1, 2, 3, 0])),
]

REARRANGED: list[tuple[str, Function, tuple[torch.Tensor, ...]]] = [
    ("roll", lambda x: aten.roll.default(x, [1], [2]), (X,)),
    ("roll-two", lambda x: aten.roll.default(x, [-1, 2], [2, 3]), (X,)),
    ("roll-neighbours-across", lambda x: aten.roll.default(x, [3, -1], [2, 1]), (X,)),
    ("roll-apart", lambda x: aten.roll.default(x, [3, -1], [3, 1]), (X,)),
    ("roll-with-batch", lambda x: aten.roll.default(x, [1, -1], [0, 1]), (X,)),
    ("roll-batch", lambda x: aten.roll.default(x, [1], [0]), (X,)),
    ("roll-flat", lambda x: aten.roll.default(x, [5]), (X,)),
    ("roll-whole-turn", lambda x: aten.roll.default(x, [4], [2]), (X,)),
    ("flip", lambda x: aten.flip.default(x, [1, -1]), (X,)),
    ("flip-batch", lambda x: aten.flip.default(x, [0]), (X,)),
    ("repeat", lambda x: aten.repeat.default(x, [1, 2, 1, 3]), (X,)),
    ("repeat-more-axes", lambda x: aten.repeat.default(x, [2, 1, 1, 1, 2]), (X,)),
    ("repeat-size", lambda x: aten.repeat.default(x[:1], [x.shape[0], 1, 1, 1]), (X,)),
    ("tile", lambda x: aten.tile.default(x, [2, 3]), (X,)),
    ("repeat_interleave", lambda x: aten.repeat_interleave.self_int(x, 3, 1), (X,)),
    ("repeat_interleave-last", lambda x: aten.repeat_interleave.self_int(x, 2, -1), (X,)),
    ("repeat_interleave-batch", lambda x: aten.repeat_interleave.self_int(x, 2, 0), (X,)),
    ("repeat_interleave-size", lambda x: aten.repeat_interleave.self_int(x, x.shape[0], 1), (X,)),
    ("repeat_interleave-flat", lambda x: aten.repeat_interleave.self_int(x, 2), (X,)),
    ("unfold", lambda x: aten.unfold.default(x, 3, 3, 2), (X,)),
    ("unfold-inner", lambda x: aten.unfold.default(x, 2, 2, 1), (X,)),
    ("pixel_shuffle", lambda x: aten.pixel_shuffle.default(x, 2), (floats(2, 8, 3, 5),)),
    ("pixel_shuffle-rank-5", lambda x: aten.pixel_shuffle.default(x, 2), (floats(2, 2, 8, 3, 5),)),
    ("pixel_unshuffle", lambda x: aten.pixel_unshuffle.default(x, 2), (X,)),
    ("pixel_unshuffle-rank-5", lambda x: aten.pixel_unshuffle.default(x, 2), (floats(2, 2, 3, 4, 6),)),
    ("channel_shuffle", lambda x: aten.channel_shuffle.default(x, 2), (floats(2, 6, 3, 3),)),
    ("im2col", lambda x: aten.im2col.default(x, [2, 3], [1, 1], [0, 0], [1, 1]), (X,)),
    ("im2col-all", lambda x: aten.im2col.default(x, [3, 2], [1, 2], [2, 1], [2, 1]), (X,)),
    ("meshgrid", lambda x, y: aten.meshgrid.indexing([x, y], indexing="ij"), (floats(3), floats(4))),
    ("meshgrid-xy", lambda *xyz: aten.meshgrid.indexing(xyz, indexing="xy"), (floats(3), floats(4), floats(2))),
    ("meshgrid.default", lambda x, y: aten.meshgrid.default([x, y]), (floats(3), floats(4))),
]


def _ids(rows: list[Any]) -> list[str]:
    return [row[0] for row in rows]


@pytest.mark.parametrize(("name", "function", "inputs"), VIEWS, ids=_ids(VIEWS))
def test_view_equals_torch(name: str, function: Function, inputs: tuple[torch.Tensor, ...]) -> None:
    assert_emits_like_torch(function, inputs, opset=13, batches=(3,))


@pytest.mark.parametrize(("name", "function", "inputs"), VIEWS[::5], ids=_ids(VIEWS[::5]))
def test_view_equals_torch_at_opset_21(name: str, function: Function, inputs: tuple[torch.Tensor, ...]) -> None:
    assert_emits_like_torch(function, inputs)


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize(("name", "function"), PADS, ids=_ids(PADS))
def test_padding_equals_torch(name: str, function: Function, opset: int) -> None:
    assert_emits_like_torch(function, (X,), opset=opset, batches=(3,))


@pytest.mark.parametrize("axes", [1, 3])
def test_padding_of_other_ranks_equals_torch(axes: int) -> None:
    def function(x: torch.Tensor) -> Any:
        pads = [1, 2] * axes
        reflect, replicate = (getattr(aten, f"{kind}_pad{axes}d").default for kind in ("reflection", "replication"))
        return reflect(x, pads), replicate(x, pads)

    assert_emits_like_torch(function, (floats(2, 3, *[4] * axes),))


@pytest.mark.parametrize(("name", "function", "inputs"), REARRANGED, ids=_ids(REARRANGED))
def test_rearrangement_equals_torch(name: str, function: Function, inputs: tuple[torch.Tensor, ...]) -> None:
    assert_emits_like_torch(function, inputs, opset=13, batches=(3,), dynamic="meshgrid" not in name)


@pytest.mark.parametrize("rank", [3, 4])
def test_im2col_of_one_image_equals_torch(rank: int) -> None:
    x = floats(2, 3, 4, 6) if rank == 4 else floats(3, 4, 6)
    assert_emits_like_torch(lambda x: aten.im2col.default(x, [2, 2], [1, 1], [1, 1], [2, 2]), (x,), dynamic=rank == 4)


def test_col2im_equals_torch() -> None:
    def function(x: torch.Tensor) -> Any:
        return aten.col2im.default(x, [4, 6], [2, 2], [1, 1], [1, 1], [2, 2])

    assert_emits_like_torch(function, (floats(2, 12, 12),), opset=18)
    assert_emits_like_torch(function, (floats(12, 12),), dynamic=False)
    with pytest.raises(FxquantError, match="opset 18"):
        assert_emits_like_torch(function, (floats(2, 12, 12),), opset=17)


SYM_MAX, SYM_MIN, SYM_FLOAT = (vars(torch)[name] for name in ("sym_max", "sym_min", "sym_float"))  # untyped in torch

SIZES: list[tuple[str, Function]] = [
    ("arithmetic", lambda n: 2 * n + 3 - n // 2),
    ("round-up", lambda n: -(-n // 2)),
    ("modulo", lambda n: n % 2 + 1),
    ("negative-modulo", lambda n: (-n) % 3 + 1),
    ("square", lambda n: n * n),
    ("maximum", lambda n: SYM_MAX(n, 3)),
    ("minimum", lambda n: SYM_MIN(n, 3)),
]


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize(("name", "function"), SIZES, ids=_ids(SIZES))
def test_size_arithmetic_equals_torch(name: str, function: Function, opset: int) -> None:
    assert_emits_like_torch(lambda x: aten.zeros.default([function(x.shape[0]), 2]), (floats(4, 3),), opset=opset)


REALS: list[tuple[str, Function]] = [
    ("divide", lambda n: n / 2),
    ("mixed", lambda n: 3 * (n / 4) - 0.5),
    ("to-float", lambda n: SYM_FLOAT(n) * 1.5),
]


@pytest.mark.parametrize(("name", "function"), REALS, ids=_ids(REALS))
def test_real_size_equals_torch(name: str, function: Function) -> None:
    assert_emits_like_torch(lambda x: aten.mul.Tensor(x, function(x.shape[0])), (X,))


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (("s0", 3, 4), ("s0", 12), [0, 12]),
        (("s0", 3, 4), ("3*s0", 4), [-1, 4]),
        (("s0", 3, "s1"), ("s0", 3, 1, "s1"), [0, 3, 1, -1]),
        (("s0", "s1", 4), ("s1", "s0", 4), None),
        (("s0", "s1", 4), ("s0", "s1", 2, 2), [0, 0, 2, 2]),
        ((2, 0), (0, 5), None),
        ((2, 0), (2, 0, 5), [2, 0, 5]),
        ((0, 2), (0, "s0"), None),
        ((3, 4), (), []),
    ],
)
def test_constant_shape_copies_and_infers(source: Any, target: Any, expected: Any) -> None:
    assert constant_shape(source, target) == expected


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(4)), split=st.sampled_from([(1, 4), (2, 2), (4, 1)]), merge=st.integers(0, 2))
def test_permute_then_reshape_equals_torch(order: list[int], split: tuple[int, int], merge: int) -> None:
    """A permuted batch, an axis split in two, two neighbours merged: sizes symbolic in any place."""

    def function(x: torch.Tensor) -> Any:
        moved = aten.permute.default(x, order)
        parts = aten.unflatten.int(moved, order.index(2), list(split))
        return aten.flatten.using_ints(parts, merge, merge + 1)

    assert_emits_like_torch(function, (X,), batches=(3,), opset=13)


BOUND = st.one_of(st.none(), st.integers(-8, 8))


@settings(max_examples=25, deadline=None)
@given(dim=st.integers(1, 3), start=BOUND, end=BOUND, step=st.integers(1, 3))
def test_slice_equals_torch(dim: int, start: int | None, end: int | None, step: int) -> None:
    assert_emits_like_torch(lambda x: aten.slice.Tensor(x, dim, start, end, step), (X,), batches=(3,))


def test_flatten_of_all_but_the_batch_is_one_operator() -> None:
    model = assert_emits_like_torch(lambda x: aten.flatten.using_ints(x, 1), (X,), only="Flatten")
    assert [node.op_type for node in model.graph] == ["Flatten"]


def test_reshape_with_a_symbolic_batch_has_a_constant_shape() -> None:
    model = assert_emits_like_torch(lambda x: aten.view.default(x, [x.shape[0], 3, 24]), (X,), only="Reshape")
    reshape = model.graph.node("view")
    shape = reshape.inputs[1]
    assert shape is not None and shape.const_value is not None
    assert shape.const_value.numpy().tolist() == [0, 3, 24]


def test_split_of_a_symbolic_axis_is_refused() -> None:
    with pytest.raises(FxquantError, match="not known now"):
        assert_emits_like_torch(lambda x: aten.split_with_sizes.default(x, [1, x.shape[0] - 1]), (floats(4, 3),))


def test_window_over_a_symbolic_axis_is_refused() -> None:
    with pytest.raises(FxquantError, match="axis 0, whose size"):
        assert_emits_like_torch(lambda x: aten.unfold.default(x, 0, 2, 1), (X,))


ROLES: list[tuple[Function, tuple[torch.Tensor, ...], Role]] = [
    (lambda x: aten.reshape.default(x, [-1]), (X,), Role.GRID_PRESERVING),
    (lambda x: aten.unbind.int(x, 1)[0], (X,), Role.GRID_PRESERVING),
    (lambda x, y: aten.cat.default([x, y]), (X, Y), Role.CONCAT),
    (lambda x: aten.pad.default(x, [1, 1]), (X,), Role.FLOAT),
    (lambda x: aten.reshape.default(x, [-1]), (integers(2, 3),), Role.INDEX),
    (lambda x: aten.cat.default([x, x]), (bools(2, 3),), Role.INDEX),
]


@pytest.mark.parametrize(("function", "inputs", "role"), ROLES)
def test_role_of_shape(function: Function, inputs: tuple[torch.Tensor, ...], role: Role) -> None:
    assert role_of(function, inputs) is role
