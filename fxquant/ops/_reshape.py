"""Reshape, in all its spellings."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import fx

from fxquant.ops._arguments import axis_of, bind, define, ints
from fxquant.ops._sizes import runtime_size
from fxquant.ops.base import OpDef, Role, Size, Writer

aten = torch.ops.aten


def constant_shape(source: Sequence[int | str], target: Sequence[int | str]) -> list[int] | None:
    """`target` as ONNX's Reshape takes it: 0 copies the size that `source` has at that place, one -1 is inferred.

    None if more than one size is neither known nor at its place, or if a size really is 0 and cannot be copied.
    """
    shape: list[int] = []
    for axis, size in enumerate(target):
        at_place = axis < len(source) and source[axis] == size
        if isinstance(size, str):
            shape.append(0 if at_place else -1)
        elif size == 0 and not at_place:
            return None
        else:
            shape.append(size)
    return shape if shape.count(-1) <= 1 and not (-1 in shape and 0 in target) else None


def reshaped(node: fx.Node, w: Writer, x: fx.Node, sizes: Sequence[Size] | None = None) -> ir.Value:
    """`x` in the shape of `node`; `sizes` are the arguments that say it, where there are any."""
    constant = constant_shape(w.shape(x), w.shape(node))
    if constant is None and sizes is not None and 0 in w.shape(node):
        raise w.refuse(node, f"it reshapes {w.shape(x)} to {w.shape(node)}, with no element")
    if constant is not None:
        shape = ints(w, *constant)
    elif sizes is not None:
        shape = w.sizes(sizes)
    else:
        shape = _runtime_shape(node, w, x)
    result: ir.Value = w.op("Reshape", [w.value(x), shape])
    return result


def _runtime_shape(node: fx.Node, w: Writer, x: fx.Node) -> ir.Value:
    """Symbolic sizes are read from the axis of `x` that has the same size; one that no axis has is inferred."""
    source, parts, inferred = list(w.shape(x)), [], 0
    for size in w.shape(node):
        if isinstance(size, str) and size in source:
            parts.append(runtime_size(w, x, source.index(size)))
        else:
            parts.append(ints(w, -1 if isinstance(size, str) else size))
            inferred += isinstance(size, str)
    if inferred > 1:
        raise w.refuse(node, f"it reshapes {w.shape(x)} to {w.shape(node)}: more than one size is not known now")
    result: ir.Value = w.op("Concat", parts, axis=0)
    return result


def _emit_reshape(node: fx.Node, w: Writer) -> ir.Value:
    x, sizes = list(bind(node).values())
    return reshaped(node, w, x, sizes)


def _emit_reshape_as(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    x, other = bound["self"], bound["other"]
    if constant_shape(w.shape(x), w.shape(node)) is not None:
        return reshaped(node, w, x)
    result: ir.Value = w.op("Reshape", [w.value(x), w.op("Shape", [w.value(other)])])
    return result


def _emit_flatten(node: fx.Node, w: Writer) -> ir.Value:
    """flatten(1) is ONNX's Flatten, any other a Reshape."""
    bound = bind(node)
    x = bound["self"]
    rank = len(w.shape(x))
    start, end = (axis_of(bound[key], rank) for key in ("start_dim", "end_dim"))
    if rank >= 2 and (start, end) == (1, rank - 1):
        result: ir.Value = w.op("Flatten", [w.value(x)], axis=1)
        return result
    return reshaped(node, w, x)


def _emit_unflatten(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    return reshaped(node, w, bound["self"])


_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)

RESHAPE: tuple[OpDef, ...] = (
    define("reshape", _RESHAPES, Role.GRID_PRESERVING, _emit_reshape, "Reshape"),
    define(
        "reshape_as", [aten.reshape_as.default, aten.view_as.default], Role.GRID_PRESERVING, _emit_reshape_as, "Reshape"
    ),
    define("flatten", [aten.flatten.using_ints], Role.GRID_PRESERVING, _emit_flatten, "Flatten", "Reshape"),
    define("unflatten", [aten.unflatten.int], Role.GRID_PRESERVING, _emit_unflatten, "Reshape"),
)
