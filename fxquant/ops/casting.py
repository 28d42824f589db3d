"""Changes of dtype, and what changes nothing (copies and views that a user's pass may leave)."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import fx

from fxquant.ops._arguments import bind, bind_first, define, identity, operand, same_float_dtype
from fxquant.ops.base import OpDef, Role, Writer

aten = torch.ops.aten


def _emit_cast(node: fx.Node, w: Writer) -> ir.Value:
    """The node's recorded dtype decides: Cast, or Identity (which onnxruntime removes)."""
    source = bind_first(node)
    if w.dtype(source) == w.dtype(node):
        return identity(w, w.value(source))
    return w.cast(w.value(source), w.dtype(node))


def _emit_copy(node: fx.Node, w: Writer) -> ir.Value:
    """copy(self, src): src in self's shape and dtype."""
    bound = bind(node)
    value = operand(w, bound["src"], w.dtype(node))
    if w.shape(bound["src"]) == w.shape(node):
        return identity(w, value)
    result: ir.Value = w.op("Expand", [value, w.op("Shape", [w.value(bound["self"])])])
    return result


def cast_role(node: fx.Node) -> Role:
    """Within one dtype the output is the input."""
    return Role.GRID_PRESERVING if same_float_dtype(bind_first(node), node) else Role.FLOAT


_CASTS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.to.prim_dtype,
    aten._to_copy.default,
    aten.type_as.default,
    torch.ops.prims.convert_element_type.default,
)
_COPIES = (
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
    aten.positive.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
)

CASTING: tuple[OpDef, ...] = (
    define("cast", _CASTS, cast_role, _emit_cast, "Cast"),
    define("copy", _COPIES, Role.GRID_PRESERVING, _emit_cast, "Identity"),
    define("copy_into", [aten.copy.default], Role.FLOAT, _emit_copy, "Expand"),
)
