"""Reading and writing by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from fxquant.ops._arguments import axis_of, bind, computable, define, finish, identity, ints, operand, scalar
from fxquant.ops._emit import unsqueeze
from fxquant.ops._rearrange import gather, known_size
from fxquant.ops.base import OpDef, Role, Writer

aten = torch.ops.aten
KEEPS = Role.GRID_PRESERVING


def index_value(w: Writer, index: fx.Node) -> ir.Value:
    """An index tensor in a dtype that ONNX indexes with."""
    dtype = w.dtype(index)
    return w.value(index) if dtype in (torch.int32, torch.int64) else w.cast(w.value(index), torch.int64)


def _emit_index(node: fx.Node, w: Writer) -> ir.Value:
    """x[i]: one index is a Gather along its axis; a mask, and several indices, are a GatherND."""
    bound = bind(node)
    x, indices = bound["self"], list(bound["indices"])
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    if not axes:
        return identity(w, w.value(x))
    if any(w.dtype(indices[axis]) in (torch.bool, torch.uint8) for axis in axes):
        return _masked(node, w, x, [indices[axis] for axis in axes], axes)
    if len(axes) == 1:
        result: ir.Value = w.op("Gather", [w.value(x), index_value(w, indices[axes[0]])], axis=axes[0])
        return result
    return _gather_nd(w, x, [indices[axis] for axis in axes], axes)


def index_role(node: fx.Node) -> Role:
    """One integer index is one Gather, which fuses on codes."""
    indices = [index for index in bind(node)["indices"] if index is not None]
    return KEEPS if len(indices) == 1 else Role.FLOAT


def _masked(node: fx.Node, w: Writer, x: fx.Node, masks: Sequence[fx.Node], axes: Sequence[int]) -> ir.Value:
    if len(masks) > 1 or axes[0] != 0:
        raise w.refuse(node, "it indexes with a mask that is not its only and first index")
    places = w.op("Transpose", [w.op("NonZero", [operand(w, masks[0], torch.bool)])], perm=[1, 0])
    result: ir.Value = w.op("GatherND", [w.value(x), places])
    return result


def _gather_nd(w: Writer, x: fx.Node, indices: Sequence[fx.Node], axes: Sequence[int]) -> ir.Value:
    """The indexed axes go first; GatherND puts the indices' common shape there, which then goes where torch has it."""
    rank = len(w.shape(x))
    others = [axis for axis in range(rank) if axis not in axes]
    value = w.value(x)
    if [*axes, *others] != list(range(rank)):
        value = w.op("Transpose", [value], perm=[*axes, *others])
    result: ir.Value = w.op("GatherND", [value, _stacked(w, indices)])
    adjacent = list(axes) == list(range(axes[0], axes[0] + len(axes)))
    if not adjacent or axes[0] == 0:
        return result
    new = max(len(w.shape(index)) for index in indices)
    before = [new + position for position in range(axes[0])]
    perm = [*before, *range(new), *range(new + axes[0], new + len(others))]
    return w.op("Transpose", [result], perm=perm) if new else result


def _stacked(w: Writer, indices: Sequence[fx.Node]) -> ir.Value:
    """Index tensors broadcast to one shape, side by side in a new last axis."""
    values = [operand(w, index, torch.int64) for index in indices]
    rank = max(len(w.shape(index)) for index in indices)
    if any(w.shape(index) != w.shape(indices[0]) for index in indices):
        total = values[0]
        for value in values[1:]:
            total = w.op("Add", [total, value])
        shape = w.op("Shape", [total])
        values = [w.op("Expand", [value, shape]) for value in values]
    result: ir.Value = w.op("Concat", [unsqueeze(w, value, [rank]) for value in values], axis=-1)
    return result


def _emit_index_select(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    axis = axis_of(bound["dim"], len(w.shape(bound["self"])))
    index = index_value(w, bound["index"])
    if not w.shape(bound["index"]):
        index = unsqueeze(w, index, [0])
    result: ir.Value = w.op("Gather", [w.value(bound["self"]), index], axis=axis)
    return result


def _emit_gather(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    axis = axis_of(bound["dim"], len(w.shape(bound["self"])))
    result: ir.Value = w.op("GatherElements", [w.value(bound["self"]), index_value(w, bound["index"])], axis=axis)
    return result


def _emit_scatter(node: fx.Node, w: Writer) -> ir.Value:
    """scatter and scatter_add; a source larger than the index is cut to it, as torch reads it."""
    bound = bind(node)
    index = index_value(w, bound["index"])
    dtype = w.dtype(node)
    if "value" in bound:
        updates = w.op("Expand", [operand(w, bound["value"], dtype), w.op("Shape", [index])])
    else:
        updates = _cut(w, bound["src"], bound["index"], index)
    adds = node.target is aten.scatter_add.default
    axis = axis_of(bound["dim"], len(w.shape(node)))
    inputs = [w.value(bound["self"]), index, updates]
    result: ir.Value = w.op("ScatterElements", inputs, axis=axis, reduction="add" if adds else None)
    return result


def _cut(w: Writer, source: fx.Node, index: fx.Node, index_in_onnx: ir.Value) -> ir.Value:
    value = w.value(source)
    if w.shape(source) == w.shape(index):
        return value
    rank = len(w.shape(source))
    inputs = [value, ints(w, *[0] * rank), w.op("Shape", [index_in_onnx]), ints(w, *range(rank))]
    result: ir.Value = w.op("Slice", inputs)
    return result


def _emit_slice_scatter(node: fx.Node, w: Writer) -> ir.Value:
    """x with x[..., start:end:step, ...] replaced: the places of x beside those of src, gathered in their new order."""
    bound = bind(node)
    axis = axis_of(bound["dim"], len(w.shape(node)))
    size = known_size(node, w, bound["self"], axis)
    if any(isinstance(bound[key], fx.Node) for key in ("start", "end", "step")):
        raise w.refuse(node, "it writes to a slice whose bounds are not known now")
    places = np.arange(size)[slice(bound["start"], bound["end"], bound["step"])]
    return _overwritten(w, w.value(bound["self"]), w.value(bound["src"]), places, size, axis)


def _emit_select_scatter(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    axis = axis_of(bound["dim"], len(w.shape(node)))
    size = known_size(node, w, bound["self"], axis)
    places = np.array([axis_of(bound["index"], size)])
    return _overwritten(w, w.value(bound["self"]), unsqueeze(w, w.value(bound["src"]), [axis]), places, size, axis)


def _overwritten(
    w: Writer, x: ir.Value, source: ir.Value, places: np.ndarray[Any, Any], size: int, axis: int
) -> ir.Value:
    order = np.arange(size)
    order[places] = size + np.arange(len(places))
    return gather(w, w.op("Concat", [x, source], axis=axis), order, axis)


def _emit_index_put(node: fx.Node, w: Writer) -> ir.Value:
    """x[i, j] = values for integer indices of the leading axes; x[mask] = number."""
    bound = bind(node)
    x, indices, values = bound["self"], list(bound["indices"]), bound["values"]
    if len(indices) == 1 and w.dtype(indices[0]) == torch.bool:
        return _put_where(node, w, x, indices[0], values)
    if any(index is None or w.dtype(index) == torch.bool for index in indices):
        raise w.refuse(node, "it writes by indices that are not all integers of the leading axes")
    places = _stacked(w, indices)
    lead = w.op("Slice", [w.op("Shape", [places]), ints(w, 0), ints(w, -1)])
    rest = w.op("Slice", [w.op("Shape", [w.value(x)]), ints(w, len(indices)), ints(w, len(w.shape(x)))])
    updates = w.op("Expand", [operand(w, values, w.dtype(node)), w.op("Concat", [lead, rest], axis=0)])
    reduction = "add" if bound["accumulate"] else None
    result: ir.Value = w.op("ScatterND", [w.value(x), places, updates], reduction=reduction)
    return result


def _put_where(node: fx.Node, w: Writer, x: fx.Node, mask: fx.Node, values: fx.Node) -> ir.Value:
    if w.shape(values) not in ((), (1,)) or bind(node)["accumulate"]:
        raise w.refuse(node, "it writes several values, or adds, where a mask says")
    missing = len(w.shape(x)) - len(w.shape(mask))
    condition = w.value(mask)
    if missing:
        condition = unsqueeze(w, condition, [len(w.shape(mask)) + axis for axis in range(missing)])
    dtype = computable(w.dtype(node))
    chosen = w.op("Where", [condition, operand(w, values, dtype), operand(w, x, dtype)])
    return finish(node, w, chosen, dtype)


def _emit_one_hot(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    if bound["num_classes"] == -1:
        raise w.refuse(node, "it counts its classes from the data", "Give one_hot a num_classes.")
    inputs = [w.value(bound["self"]), scalar(w, bound["num_classes"]), ints(w, 0, 1)]
    result: ir.Value = w.op("OneHot", inputs)
    return result


INDEXING: tuple[OpDef, ...] = (
    define("index", [aten.index.Tensor], index_role, _emit_index, "Gather", "GatherND"),
    define("index_select", [aten.index_select.default], KEEPS, _emit_index_select, "Gather"),
    define("gather", [aten.gather.default], KEEPS, _emit_gather, "GatherElements"),
    define("scatter", [aten.scatter.src, aten.scatter.value], Role.FLOAT, _emit_scatter, "ScatterElements"),
    define("scatter_add", [aten.scatter_add.default], Role.FLOAT, _emit_scatter, "ScatterElements", since_opset=16),
    define("slice_scatter", [aten.slice_scatter.default], Role.FLOAT, _emit_slice_scatter),
    define("select_scatter", [aten.select_scatter.default], Role.FLOAT, _emit_select_scatter),
    define("index_put", [aten.index_put.default], Role.FLOAT, _emit_index_put, "ScatterND"),
    define("one_hot", [aten.one_hot.default], Role.INDEX, _emit_one_hot, "OneHot"),
)
