"""Arithmetic element by element, with torch's type promotion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from fxquant.numerics.codes import Grid
from fxquant.numerics.kernels.elementwise import add, multiply, overflow, scalar_is_first
from fxquant.ops._arguments import (
    bind,
    computable,
    define,
    finish,
    identity,
    input_as_output,
    operand,
    output_types,
    promoted,
    same_float_dtype,
)
from fxquant.ops.base import Emitted, Emitter, OpDef, Role, Writer
from fxquant.ops.kernels import PairKernel

aten = torch.ops.aten


def tensors_role(node: fx.Node) -> Role:
    """onnxruntime has an integer kernel where both operands are tensors: beside a Python number it has none."""
    bound = bind(node)
    pair = list(bound.values())[:2]
    return Role.COMPUTE if same_float_dtype(*pair) and bound.get("alpha", 1) == 1 else Role.FLOAT


def _why_no_pair(node: fx.Node) -> str:
    """Why onnxruntime computes a sum or product in float; "" if in integers."""
    return "" if tensors_role(node) is Role.COMPUTE else "onnxruntime has it for two tensors of one dtype, unscaled"


def _is_emitted_reversed(node: fx.Node) -> bool:
    """Whether a sum's second operand goes first, as it alone has the shape of the output.

    QLinearAdd rounds its two operands differently, and takes a broadcast first operand for the second or not as its
    layout will have it (numerics/kernels/elementwise.py). With the operand of full size first there is one order.
    """
    if tensors_role(node) is not Role.COMPUTE:
        return False
    first, second = (output_types(value)[0].shape for value in list(bind(node).values())[:2])
    full = output_types(node)[0].shape
    return first != full and second == full


def add_is_reversed(node: fx.Node, first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether onnxruntime's QLinearAdd has the second operand of `node`, of shapes `first` and `second`, first.

    Where both operands are broadcast, this is so before channels are put last.
    """
    reverses = _is_emitted_reversed(node)
    return reverses != (scalar_is_first(second, first) if reverses else scalar_is_first(first, second))


def _sum_overflows(node: fx.Node, operands: Sequence[Grid], out: Grid) -> str:
    return overflow(sum(grid.reach for grid in operands), out)


def _product_overflows(node: fx.Node, operands: Sequence[Grid], out: Grid) -> str:
    return overflow(math.prod(grid.reach for grid in operands), out)


def _emit_add(node: fx.Node, w: Writer) -> Emitted:
    if not _is_emitted_reversed(node):
        return _emit_plain_add(node, w)
    left, right = list(bind(node).values())[:2]
    result: ir.Value = w.op("Add", [w.value(right), w.value(left)])
    return result


def binary(op_type: str) -> Emitter:
    """The emitter of `op_type` on two operands promoted to one dtype; `alpha`, if there is one, scales the second."""

    def emit(node: fx.Node, w: Writer) -> ir.Value:
        bound = bind(node)
        left, right = list(bound.values())[:2]
        dtype = computable(promoted(w, left, right))
        second = _scaled(w, right, bound.get("alpha", 1), dtype)
        return finish(node, w, w.op(op_type, [operand(w, left, dtype), second]), dtype)

    return emit


_emit_plain_add = binary("Add")


def _scaled(w: Writer, value: Any, alpha: Any, dtype: torch.dtype) -> ir.Value:
    if alpha == 1 and not isinstance(alpha, fx.Node):
        return operand(w, value, dtype)
    result: ir.Value = w.op("Mul", [operand(w, value, dtype), operand(w, alpha, dtype)])
    return result


def _emit_rsub(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    dtype = computable(promoted(w, bound["self"], bound["other"]))
    scaled = _scaled(w, bound["self"], bound["alpha"], dtype)
    return finish(node, w, w.op("Sub", [operand(w, bound["other"], dtype), scaled]), dtype)


def _emit_divide(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    mode = bound.get("rounding_mode")
    if mode == "floor":
        return _emit_floor_divide(node, w)
    left, right = bound["self"], bound["other"]
    dtype = w.dtype(node) if mode is None else computable(promoted(w, left, right))
    quotient = w.op("Div", [operand(w, left, dtype), operand(w, right, dtype)])
    if mode == "trunc" and dtype.is_floating_point:
        quotient = _truncate(w, quotient)
    return finish(node, w, quotient, dtype)


def _truncate(w: Writer, x: ir.Value) -> ir.Value:
    result: ir.Value = w.op("Mul", [w.op("Sign", [x]), w.op("Floor", [w.op("Abs", [x])])])
    return result


def _remainder(w: Writer, a: ir.Value, b: ir.Value, dtype: torch.dtype) -> ir.Value:
    """a modulo b with the sign of b, as Python has it (ONNX Mod has it for integers only)."""
    if not dtype.is_floating_point:
        result: ir.Value = w.op("Mod", [a, b])
        return result
    rest = w.op("Mod", [a, b], fmod=1)
    zero = w.operand(0.0, dtype)
    opposite = w.op("Xor", [w.op("Less", [rest, zero]), w.op("Less", [b, zero])])
    wrong = w.op("And", [opposite, w.op("Not", [w.op("Equal", [rest, zero])])])
    result = w.op("Where", [wrong, w.op("Add", [rest, b]), rest])
    return result


def _emit_floor_divide(node: fx.Node, w: Writer) -> ir.Value:
    """floor(a / b) as torch has it: (a - a mod b) / b, which rounding cannot push over a whole number like a / b."""
    left, right = list(bind(node).values())[:2]
    dtype = computable(promoted(w, left, right))
    a, b = operand(w, left, dtype), operand(w, right, dtype)
    quotient = w.op("Div", [w.op("Sub", [a, _remainder(w, a, b, dtype)]), b])
    if dtype.is_floating_point:
        by_zero = w.op("Equal", [b, w.operand(0.0, dtype)])
        quotient = w.op("Where", [by_zero, w.op("Div", [a, b]), w.op("Round", [quotient])])
    return finish(node, w, quotient, dtype)


def _emit_remainder(node: fx.Node, w: Writer) -> ir.Value:
    left, right = list(bind(node).values())[:2]
    dtype = computable(promoted(w, left, right))
    rest = _remainder(w, operand(w, left, dtype), operand(w, right, dtype), dtype)
    return finish(node, w, rest, dtype)


def _emit_fmod(node: fx.Node, w: Writer) -> ir.Value:
    left, right = list(bind(node).values())[:2]
    dtype = computable(promoted(w, left, right))
    return finish(node, w, w.op("Mod", [operand(w, left, dtype), operand(w, right, dtype)], fmod=1), dtype)


def _emit_power(node: fx.Node, w: Writer) -> ir.Value:
    """Always Pow, also for a square: onnxruntime would run Mul(x, x) between Q and DQ in integers."""
    base, exponent = list(bind(node).values())[:2]
    dtype = computable(w.dtype(node))
    return finish(node, w, w.op("Pow", [operand(w, base, dtype), operand(w, exponent, dtype)]), dtype)


def _emit_square(node: fx.Node, w: Writer) -> ir.Value:
    dtype = computable(w.dtype(node))
    x = operand(w, bind(node)["self"], dtype)
    return finish(node, w, w.op("Pow", [x, w.operand(2, dtype)]), dtype)


def unary(op_type: str) -> Emitter:
    """The emitter of `op_type` on one operand, computed in the output's dtype."""

    def emit(node: fx.Node, w: Writer) -> ir.Value:
        dtype = computable(w.dtype(node))
        return finish(node, w, w.op(op_type, [operand(w, bind(node)["self"], dtype)]), dtype)

    return emit


def _rounding(op_type: str) -> Emitter:
    def emit(node: fx.Node, w: Writer) -> ir.Value:
        x = input_as_output(node, w)
        if not w.dtype(node).is_floating_point:
            return identity(w, x)
        result: ir.Value = w.op(op_type, [x])
        return result

    return emit


def _emit_truncate(node: fx.Node, w: Writer) -> ir.Value:
    x = input_as_output(node, w)
    return _truncate(w, x) if w.dtype(node).is_floating_point else identity(w, x)


def _emit_rsqrt(node: fx.Node, w: Writer) -> ir.Value:
    result: ir.Value = w.op("Reciprocal", [w.op("Sqrt", [input_as_output(node, w)])])
    return result


def _log_of_base(base: float) -> Emitter:
    def emit(node: fx.Node, w: Writer) -> ir.Value:
        log = w.op("Log", [input_as_output(node, w)])
        result: ir.Value = w.op("Div", [log, w.operand(math.log(base), w.dtype(node))])
        return result

    return emit


def _emit_log1p(node: fx.Node, w: Writer) -> ir.Value:
    result: ir.Value = w.op("Log", [w.op("Add", [input_as_output(node, w), w.operand(1.0, w.dtype(node))])])
    return result


def _emit_expm1(node: fx.Node, w: Writer) -> ir.Value:
    result: ir.Value = w.op("Sub", [w.op("Exp", [input_as_output(node, w)]), w.operand(1.0, w.dtype(node))])
    return result


def _emit_exp2(node: fx.Node, w: Writer) -> ir.Value:
    result: ir.Value = w.op("Pow", [w.operand(2.0, w.dtype(node)), input_as_output(node, w)])
    return result


def _fused_add(op_type: str) -> Emitter:
    """self + value * (tensor1 op tensor2)."""

    def emit(node: fx.Node, w: Writer) -> ir.Value:
        bound = bind(node)
        dtype = computable(w.dtype(node))
        inner = w.op(op_type, [operand(w, bound["tensor1"], dtype), operand(w, bound["tensor2"], dtype)])
        if bound["value"] != 1:
            inner = w.op("Mul", [inner, operand(w, bound["value"], dtype)])
        return finish(node, w, w.op("Add", [operand(w, bound["self"], dtype), inner]), dtype)

    return emit


def _emit_lerp(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    dtype = w.dtype(node)
    start, end, weight = (operand(w, bound[key], dtype) for key in ("self", "end", "weight"))
    result: ir.Value = w.op("Add", [start, w.op("Mul", [weight, w.op("Sub", [end, start])])])
    return result


def _unaries() -> tuple[OpDef, ...]:
    plain = "abs neg sqrt exp log sin cos tan asin acos atan sinh cosh asinh acosh atanh erf reciprocal sign"
    rounded = "floor ceil round"
    types = {name: name.capitalize() for name in f"{plain} {rounded}".split()}
    return tuple(
        define(name, [getattr(aten, name).default], Role.FLOAT, unary(types[name]), types[name])
        for name in plain.split()
    ) + tuple(
        define(name, [getattr(aten, name).default], Role.FLOAT, _rounding(types[name]), types[name])
        for name in rounded.split()
    )


_FLOOR_DIVIDES = (aten.floor_divide.default, aten.floor_divide.Scalar)

ELEMENTWISE: tuple[OpDef, ...] = (
    define(
        "add",
        [aten.add.Tensor, aten.add.Scalar],
        tensors_role,
        _emit_add,
        "Add",
        kernel=PairKernel("QLinearAdd", _why_no_pair, add, add_is_reversed, overflows=_sum_overflows),
    ),
    define(
        "multiply",
        [aten.mul.Tensor, aten.mul.Scalar],
        tensors_role,
        binary("Mul"),
        "Mul",
        kernel=PairKernel("QLinearMul", _why_no_pair, multiply, overflows=_product_overflows),
    ),
    define("subtract", [aten.sub.Tensor, aten.sub.Scalar], Role.FLOAT, binary("Sub"), "Sub"),
    define("reverse_subtract", [aten.rsub.Tensor, aten.rsub.Scalar], Role.FLOAT, _emit_rsub, "Sub"),
    define(
        "divide",
        [aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode],
        Role.FLOAT,
        _emit_divide,
        "Div",
    ),
    define("floor_divide", _FLOOR_DIVIDES, Role.FLOAT, _emit_floor_divide, "Div"),
    define(
        "remainder",
        [aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor],
        Role.FLOAT,
        _emit_remainder,
        "Mod",
    ),
    define("fmod", [aten.fmod.Tensor, aten.fmod.Scalar], Role.FLOAT, _emit_fmod, "Mod"),
    define(
        "power",
        [aten.pow.Tensor_Scalar, aten.pow.Scalar, aten.pow.Tensor_Tensor],
        Role.FLOAT,
        _emit_power,
        "Pow",
    ),
    define("square", [aten.square.default], Role.FLOAT, _emit_square, "Pow"),
    define("minimum", [aten.minimum.default, aten.min.other], Role.FLOAT, binary("Min"), "Min"),
    define("maximum", [aten.maximum.default, aten.max.other], Role.FLOAT, binary("Max"), "Max"),
    define("truncate", [aten.trunc.default], Role.FLOAT, _emit_truncate),
    define("reciprocal_square_root", [aten.rsqrt.default], Role.FLOAT, _emit_rsqrt),
    define("log2", [aten.log2.default], Role.FLOAT, _log_of_base(2.0)),
    define("log10", [aten.log10.default], Role.FLOAT, _log_of_base(10.0)),
    define("log1p", [aten.log1p.default], Role.FLOAT, _emit_log1p),
    define("expm1", [aten.expm1.default], Role.FLOAT, _emit_expm1),
    define("exp2", [aten.exp2.default], Role.FLOAT, _emit_exp2),
    define("addcmul", [aten.addcmul.default], Role.FLOAT, _fused_add("Mul")),
    define("addcdiv", [aten.addcdiv.default], Role.FLOAT, _fused_add("Div")),
    define("lerp", [aten.lerp.Scalar, aten.lerp.Tensor], Role.FLOAT, _emit_lerp),
    *_unaries(),
)
