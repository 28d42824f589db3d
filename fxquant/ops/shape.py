"""Views, axes, slices, joins: what changes a tensor's shape and none of its values.

Reshape gets a constant shape wherever at most one size has to be inferred: onnxruntime infers shapes through it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from fxquant.numerics.codes import Grid
from fxquant.numerics.kernels.tables import regrid
from fxquant.ops._arguments import (
    MAX_INT,
    axis_of,
    bind,
    define,
    identity,
    ints,
    operand,
    output_types,
    same_float_dtype,
    scalar,
)
from fxquant.ops._emit import axes_of, squeeze, unsqueeze
from fxquant.ops._padding import PADDING
from fxquant.ops._rearrange import REARRANGE
from fxquant.ops._reshape import RESHAPE
from fxquant.ops._sizes import SIZES
from fxquant.ops.base import OpDef, Role, Writer
from fxquant.ops.kernels import GeneralFormula, GeneralKernel

aten = torch.ops.aten
KEEPS = Role.GRID_PRESERVING


def _transpose(w: Writer, x: fx.Node, perm: Sequence[int]) -> ir.Value:
    if list(perm) == sorted(perm):
        return identity(w, w.value(x))
    result: ir.Value = w.op("Transpose", [w.value(x)], perm=list(perm))
    return result


def _emit_permute(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    rank = len(w.shape(node))
    return _transpose(w, bound["self"], [axis_of(dim, rank) for dim in bound["dims"]])


def _emit_transpose(node: fx.Node, w: Writer) -> ir.Value:
    x, *dims = list(bind(node).values())
    rank = len(w.shape(node))
    perm = list(range(rank))
    if rank:
        first, second = (axis_of(dim, rank) for dim in dims or (-2, -1))
        perm[first], perm[second] = perm[second], perm[first]
    return _transpose(w, x, perm)


def _emit_t(node: fx.Node, w: Writer) -> ir.Value:
    """All axes reversed: `t` of a matrix, `numpy_T` of any tensor."""
    return _transpose(w, bind(node)["self"], list(range(len(w.shape(node))))[::-1])


def _emit_movedim(node: fx.Node, w: Writer) -> ir.Value:
    x, source, destination = list(bind(node).values())
    rank = len(w.shape(node))
    froms = [axis_of(dim, rank) for dim in ([source] if isinstance(source, int) else source)]
    tos = [axis_of(dim, rank) for dim in ([destination] if isinstance(destination, int) else destination)]
    others = iter([axis for axis in range(rank) if axis not in froms])
    placed = dict(zip(tos, froms, strict=True))
    return _transpose(w, x, [placed[axis] if axis in placed else next(others) for axis in range(rank)])


def _emit_squeeze(node: fx.Node, w: Writer) -> ir.Value:
    """Of the named axes (all, if none is named) those of size 1 go."""
    x, *dims = list(bind(node).values())
    shape = w.shape(x)
    named = axes_of(dims[0] if dims else None, len(shape)) if dims != [[]] else []
    axes = [axis for axis in named if axis < len(shape) and shape[axis] == 1]
    return squeeze(w, w.value(x), axes) if axes else identity(w, w.value(x))


def _emit_unsqueeze(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    return unsqueeze(w, w.value(bound["self"]), [axis_of(bound["dim"], len(w.shape(node)))])


def _emit_expand(node: fx.Node, w: Writer) -> ir.Value:
    """Axes that keep their size are 1 in ONNX's Expand: the shape stays constant where only the batch is symbolic."""
    bound = bind(node)
    x, sizes = bound["self"], list(bound["size"])
    shape = w.shape(x)
    new = len(sizes) - len(shape)
    grows = [axis < new or shape[axis - new] == 1 for axis in range(len(sizes))]
    target = [size if grow and size != -1 else 1 for size, grow in zip(sizes, grows, strict=True)]
    if not new and all(isinstance(size, int) and size == 1 for size in target):
        return identity(w, w.value(x))
    result: ir.Value = w.op("Expand", [w.value(x), w.sizes(target)])
    return result


def _emit_expand_as(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    result: ir.Value = w.op("Expand", [w.value(bound["self"]), w.op("Shape", [w.value(bound["other"])])])
    return result


def _slice(w: Writer, x: fx.Node, dim: int, start: Any, end: Any, step: int = 1) -> ir.Value:
    axis = axis_of(dim, len(w.shape(x)))
    start = 0 if start is None else start
    end = MAX_INT if end is None else end
    if (start, step) == (0, 1) and not isinstance(end, fx.Node) and end == MAX_INT:
        return identity(w, w.value(x))
    result: ir.Value = w.op("Slice", [w.value(x), w.sizes([start]), w.sizes([end]), ints(w, axis), ints(w, step)])
    return result


def _emit_slice(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    return _slice(w, bound["self"], bound["dim"], bound["start"], bound["end"], bound["step"])


def _emit_narrow(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    start, length = bound["start"], bound["length"]
    axis = axis_of(bound["dim"], len(w.shape(bound["self"])))
    if isinstance(start, int) and isinstance(length, int):
        size = w.shape(bound["self"])[axis]
        if start < 0 and start + length >= 0:  # up to the end, which -0 does not say
            return _slice(w, bound["self"], axis, start, None)
        whole = isinstance(size, int) and start == 0 and length == size
        return _slice(w, bound["self"], axis, start, None if whole else start + length)
    stop = w.op("Add", [w.sizes([start]), w.sizes([length])])
    result: ir.Value = w.op("Slice", [w.value(bound["self"]), w.sizes([start]), stop, ints(w, axis)])
    return result


def _emit_select(node: fx.Node, w: Writer) -> ir.Value:
    """One Gather with a scalar index drops the axis; it fuses on codes, which Slice and Squeeze would not."""
    bound = bind(node)
    axis = axis_of(bound["dim"], len(w.shape(bound["self"])))
    result: ir.Value = w.op("Gather", [w.value(bound["self"]), scalar(w, bound["index"])], axis=axis)
    return result


def _emit_unbind(node: fx.Node, w: Writer) -> tuple[ir.Value, ...]:
    """A Gather for each output: each fuses on codes by itself."""
    bound = bind(node)
    axis = axis_of(bound["dim"], len(w.shape(bound["self"])))
    x = w.value(bound["self"])
    return tuple(w.op("Gather", [x, scalar(w, index)], axis=axis) for index in range(len(output_types(node))))


def _emit_split(node: fx.Node, w: Writer) -> tuple[ir.Value, ...]:
    """split, split_with_sizes and chunk: the recorded output sizes are the sections.

    onnxruntime splits codes only if each part is read; where some are not, each part that is read is a Slice.
    """
    bound = bind(node)
    axis = axis_of(bound["dim"], len(w.shape(bound["self"])))
    sizes = [kind.shape[axis] for kind in output_types(node)]
    sections = [size for size in sizes if isinstance(size, int)]
    if len(sections) < len(sizes):
        raise w.refuse(node, f"it splits axis {axis}, whose parts have sizes {sizes} that are not known now")
    read = [user.args[1] for user in node.users if user.target is operator.getitem]
    if len(read) == len(node.users) and len(set(read)) < len(sections):
        return _slices(w, w.value(bound["self"]), sections, axis, read)
    found = w.op("Split", [w.value(bound["self"]), w.sizes(sections)], outputs=len(sections), axis=axis)
    return found if isinstance(found, tuple) else (found,)


def _slices(w: Writer, x: ir.Value, sections: Sequence[int], axis: int, read: Sequence[Any]) -> tuple[ir.Value, ...]:
    """One Slice for each part that is read; `x` itself stands where the others would be."""
    parts, start = [x] * len(sections), 0
    for index, size in enumerate(sections):
        if index in read or index - len(sections) in read:
            parts[index] = w.op("Slice", [x, ints(w, start), ints(w, start + size), ints(w, axis)])
        start += size
    return tuple(parts)


def _emit_getitem(node: fx.Node, w: Writer) -> ir.Value:
    source, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(index, int):
        raise w.refuse(node, f"it takes {index!r} of {source!r}, not one output of a node")
    return w.values(source)[index]


def getitem_role(node: fx.Node) -> Role:
    """An output of what passes codes through is on the input's grid; of anything else (topk, var_mean) it is not."""
    source = node.args[0]
    return KEEPS if isinstance(source, fx.Node) and source.target in _KEEPING_SEVERAL else Role.FLOAT


def _emit_cat(node: fx.Node, w: Writer) -> ir.Value:
    """An empty tensor of rank 1 joins anything in torch; ONNX knows no such exception."""
    bound = bind(node)
    rank = len(w.shape(node))
    tensors = [x for x in bound["tensors"] if len(w.shape(x)) == rank]
    values = [operand(w, x, w.dtype(node)) for x in tensors]
    result: ir.Value = w.op("Concat", values, axis=axis_of(bound["dim"], rank))
    return result


def _emit_stack(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    axis = axis_of(bound["dim"], len(w.shape(node)))
    values = [unsqueeze(w, operand(w, x, w.dtype(node)), [axis]) for x in bound["tensors"]]
    result: ir.Value = w.op("Concat", values, axis=axis)
    return result


def _why_not_joined(node: fx.Node) -> str:
    """Why onnxruntime joins the tensors in float; "" if it joins codes."""
    tensors = bind(node)["tensors"]
    if not same_float_dtype(*tensors, node):
        return "some of its inputs are cast first"
    ranks = {len(output_types(x)[0].shape) for x in tensors}
    return "" if len(ranks) == 1 else "some of its inputs are empty"


def _joined_codes(join: Callable[[list[torch.Tensor], int], torch.Tensor]) -> GeneralFormula:
    def codes(node: fx.Node, args: Sequence[Any], out: Grid) -> torch.Tensor:
        return join([regrid(x.integers, x.grid, out) for x in args[0]], bind(node)["dim"])

    return codes


_SPLITS = (aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default)
_KEEPING_SEVERAL = frozenset({*_SPLITS, aten.unbind.int, aten.max.dim, aten.min.dim})
_CATS = (aten.cat.default, aten.concat.default, aten.concatenate.default)
_TRANSPOSES = (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, aten.mT.default)

SHAPE: tuple[OpDef, ...] = (
    *RESHAPE,
    define("permute", [aten.permute.default], KEEPS, _emit_permute, "Transpose"),
    define("transpose", _TRANSPOSES, KEEPS, _emit_transpose, "Transpose"),
    define("reverse_axes", [aten.t.default, aten.numpy_T.default], KEEPS, _emit_t, "Transpose"),
    define("movedim", [aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int], KEEPS, _emit_movedim, "Transpose"),
    define("squeeze", [aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims], KEEPS, _emit_squeeze, "Squeeze"),
    define("unsqueeze", [aten.unsqueeze.default], KEEPS, _emit_unsqueeze, "Unsqueeze"),
    define("expand", [aten.expand.default, aten.broadcast_to.default], KEEPS, _emit_expand, "Expand"),
    define("expand_as", [aten.expand_as.default], KEEPS, _emit_expand_as, "Expand"),
    define("slice", [aten.slice.Tensor], KEEPS, _emit_slice, "Slice"),
    define("narrow", [aten.narrow.default], KEEPS, _emit_narrow, "Slice"),
    define("select", [aten.select.int], KEEPS, _emit_select, "Gather"),
    define("unbind", [aten.unbind.int], KEEPS, _emit_unbind, "Gather"),
    define("split", _SPLITS, KEEPS, _emit_split, "Split"),
    define("getitem", [operator.getitem], getitem_role, _emit_getitem),
    define(
        "concat",
        _CATS,
        Role.CONCAT,
        _emit_cat,
        "Concat",
        kernel=GeneralKernel("QLinearConcat", _why_not_joined, _joined_codes(torch.cat)),
    ),
    define(
        "stack",
        [aten.stack.default],
        Role.CONCAT,
        _emit_stack,
        "Concat",
        kernel=GeneralKernel("QLinearConcat", _why_not_joined, _joined_codes(torch.stack)),
    ),
    *PADDING,
    *REARRANGE,
    *SIZES,
)
