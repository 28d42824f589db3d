"""Sizes: sym_size and the Python arithmetic on it. A size is an int64 of shape (1,), a real one a double."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from fxquant.ops._arguments import SIZE_SQUARE_ROOT, axis_of, bind, ints, is_float_size
from fxquant.ops.base import Emitter, OpDef, Role, Writer

aten = torch.ops.aten


def runtime_size(w: Writer, x: fx.Node, axis: int) -> ir.Value:
    """Size of one axis of `x`, of shape (1,); Shape itself takes a range from opset 15 on."""
    result: ir.Value
    if w.opset >= 15:
        result = w.op("Shape", [w.value(x)], start=axis, end=axis + 1)
    else:
        result = w.op("Slice", [w.op("Shape", [w.value(x)]), ints(w, axis), ints(w, axis + 1)])
    return result


def _emit_sym_size(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    return runtime_size(w, bound["self"], axis_of(bound["dim"], len(w.shape(bound["self"]))))


def _number(w: Writer, value: Any, dtype: torch.dtype) -> ir.Value:
    if isinstance(value, fx.Node):
        have = torch.float64 if is_float_size(value) else torch.int64
        return w.value(value) if have == dtype else w.cast(w.value(value), dtype)
    return w.constant(np.array([value], dtype=np.float64 if dtype == torch.float64 else np.int64))


def _kind(*values: Any) -> torch.dtype:
    return torch.float64 if any(is_float_size(value) for value in values) else torch.int64


def _arithmetic(op_type: str) -> Emitter:
    def emit(node: fx.Node, w: Writer) -> ir.Value:
        dtype = _kind(*node.args)
        result: ir.Value = w.op(op_type, [_number(w, value, dtype) for value in node.args])
        return result

    return emit


def _emit_true_divide(node: fx.Node, w: Writer) -> ir.Value:
    result: ir.Value = w.op("Div", [_number(w, value, torch.float64) for value in node.args])
    return result


def _emit_floor_divide(node: fx.Node, w: Writer) -> ir.Value:
    """(a - a mod b) / b: Div alone rounds towards 0, and -(-n // 2) is how Python rounds up."""
    a, b = _operands_of_integers(node, w)
    rest = w.op("Mod", [a, b])
    result: ir.Value = w.op("Div", [w.op("Sub", [a, rest]), b])
    return result


def _emit_modulo(node: fx.Node, w: Writer) -> ir.Value:
    result: ir.Value = w.op("Mod", list(_operands_of_integers(node, w)))
    return result


def _operands_of_integers(node: fx.Node, w: Writer) -> tuple[ir.Value, ir.Value]:
    if _kind(*node.args) != torch.int64:
        raise w.refuse(node, "it divides a size that is a real number by whole steps")
    a, b = (_number(w, value, torch.int64) for value in node.args)
    return a, b


def _emit_to_float(node: fx.Node, w: Writer) -> ir.Value:
    return w.cast(_number(w, node.args[0], _kind(node.args[0])), torch.float64)


def _to_int(op_type: str | None) -> Emitter:
    """Through Floor or Ceil, or by the cast itself (which truncates)."""

    def emit(node: fx.Node, w: Writer) -> ir.Value:
        value = _number(w, node.args[0], torch.float64)
        return w.cast(value if op_type is None else w.op(op_type, [value]), torch.int64)

    return emit


def _emit_square_root(node: fx.Node, w: Writer) -> ir.Value:
    result: ir.Value = w.op("Sqrt", [_number(w, node.args[0], torch.float64)])
    return result


def _size_op(name: str, targets: list[Any], emit: Emitter, onnx_type: str) -> OpDef:
    return OpDef(name, tuple(targets), Role.INDEX, emit, (onnx_type,))


SIZES: tuple[OpDef, ...] = (
    _size_op("size", [aten.sym_size.int], _emit_sym_size, "Shape"),
    _size_op("size_add", [operator.add], _arithmetic("Add"), "Add"),
    _size_op("size_subtract", [operator.sub], _arithmetic("Sub"), "Sub"),
    _size_op("size_multiply", [operator.mul], _arithmetic("Mul"), "Mul"),
    _size_op("size_negate", [operator.neg], _arithmetic("Neg"), "Neg"),
    _size_op("size_power", [operator.pow], _arithmetic("Pow"), "Pow"),
    _size_op("size_floor_divide", [operator.floordiv], _emit_floor_divide, "Div"),
    _size_op("size_modulo", [operator.mod], _emit_modulo, "Mod"),
    _size_op("size_divide", [operator.truediv], _emit_true_divide, "Div"),
    _size_op("size_maximum", [torch.sym_max], _arithmetic("Max"), "Max"),
    _size_op("size_minimum", [torch.sym_min], _arithmetic("Min"), "Min"),
    _size_op("size_to_float", [torch.sym_float], _emit_to_float, "Cast"),
    _size_op("size_to_int", [torch.sym_int, math.trunc], _to_int(None), "Cast"),
    _size_op("size_floor", [math.floor], _to_int("Floor"), "Floor"),
    _size_op("size_ceil", [math.ceil], _to_int("Ceil"), "Ceil"),
    _size_op("size_square_root", [SIZE_SQUARE_ROOT], _emit_square_root, "Sqrt"),
)
