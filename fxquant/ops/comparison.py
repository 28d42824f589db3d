"""Comparisons, logic on booleans and integers, and what a mask selects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from fxquant.numerics.codes import Codes, Grid
from fxquant.numerics.kernels.tables import number_codes, regrid
from fxquant.ops._arguments import bind, computable, define, finish, is_float, operand, promoted, same_float_dtype
from fxquant.ops.base import Emitter, OpDef, Role, Writer
from fxquant.ops.kernels import GeneralKernel

aten = torch.ops.aten


def _compare(op_type: str, *, negated: bool = False) -> Emitter:
    def emit(node: fx.Node, w: Writer) -> ir.Value:
        left, right = list(bind(node).values())
        dtype = computable(promoted(w, left, right))
        result: ir.Value = w.op(op_type, [operand(w, left, dtype), operand(w, right, dtype)])
        return w.op("Not", [result]) if negated else result

    return emit


def _test(*op_types: str, negated: bool = False) -> Emitter:
    """Whether any of the tests (IsNaN, IsInf) holds; what is no float fails them all."""

    def emit(node: fx.Node, w: Writer) -> ir.Value:
        source = bind(node)["self"]
        if not is_float(source):  # x < x: False in every place
            whole = operand(w, source, computable(w.dtype(source)))
            never: ir.Value = w.op("Less", [whole, whole])
            return w.op("Not", [never]) if negated else never
        result: ir.Value = w.op(op_types[0], [w.value(source)])
        for op_type in op_types[1:]:
            result = w.op("Or", [result, w.op(op_type, [w.value(source)])])
        return w.op("Not", [result]) if negated else result

    return emit


def _logical(op_type: str) -> Emitter:
    def emit(node: fx.Node, w: Writer) -> ir.Value:
        result: ir.Value = w.op(op_type, [operand(w, value, torch.bool) for value in bind(node).values()])
        return result

    return emit


def _bitwise(op_type: str) -> Emitter:
    """And, Or, Xor, Not on booleans; the Bitwise operators of opset 18 on integers."""

    def emit(node: fx.Node, w: Writer) -> ir.Value:
        dtype = w.dtype(node)
        if dtype != torch.bool and w.opset < 18:
            raise w.refuse(node, f"ONNX has Bitwise{op_type} from opset 18 on, and the export is at opset {w.opset}")
        name = op_type if dtype == torch.bool else f"Bitwise{op_type}"
        result: ir.Value = w.op(name, [operand(w, value, dtype) for value in bind(node).values()])
        return result

    return emit


def _where(w: Writer, node: fx.Node, condition: Any, chosen: Any, other: Any) -> ir.Value:
    """The output's dtype is the promoted one."""
    mask = operand(w, condition, torch.bool)
    dtype = computable(w.dtype(node))
    return finish(node, w, w.op("Where", [mask, operand(w, chosen, dtype), operand(w, other, dtype)]), dtype)


def _emit_where(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    return _where(w, node, bound["condition"], bound["self"], bound["other"])


def _emit_masked_fill(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    return _where(w, node, bound["mask"], bound["value"], bound["self"])


def where_role(node: fx.Node) -> Role:
    """onnxruntime has QLinearWhere for two tensors; beside a Python number it has no integer kernel."""
    bound = bind(node)
    both = same_float_dtype(bound["self"], bound["other"])
    return Role.COMPUTE if both else Role.FLOAT


def _why_no_where(node: fx.Node) -> str:
    """Why onnxruntime selects in float; a Python number beside a tensor gets a grid of its own (number_codes)."""
    bound = bind(node)
    pair = (bound["self"], bound["value" if "value" in bound else "other"])
    tensors = [value for value in pair if isinstance(value, fx.Node)]
    if not tensors or not same_float_dtype(node, *tensors):
        return "onnxruntime has QLinearWhere for two tensors of one dtype, or one and a number"
    if len(tensors) == 1 and any(user.op != "call_module" for user in node.users):
        return "onnxruntime quantizes its number only where a quantizer alone reads it"
    return ""


def _where_codes(node: fx.Node, args: Sequence[Any], out: Grid) -> torch.Tensor:
    condition, chosen, other = args
    return torch.where(condition.to(torch.bool), _regridded(chosen, out), _regridded(other, out))


def _masked_fill_codes(node: fx.Node, args: Sequence[Any], out: Grid) -> torch.Tensor:
    kept, mask, value = args
    return torch.where(mask.to(torch.bool), _regridded(value, out), _regridded(kept, out))


def _regridded(part: Any, out: Grid) -> torch.Tensor:
    """Codes on the grid `out` of Codes or of a number."""
    if isinstance(part, Codes):
        return regrid(part.integers, part.grid, out)
    return regrid(*number_codes(float(part), out.scale.device), out)


def _comparison(name: str, short: str, op_type: str, *more: Any, negated: bool = False) -> OpDef:
    packet = getattr(aten, short)
    return define(name, [packet.Tensor, packet.Scalar, *more], Role.INDEX, _compare(op_type, negated=negated), op_type)


def _both(name: str) -> list[Any]:
    """`bitwise_and` and `__and__`, with a tensor or a number."""
    found: list[Any] = []
    for packet in (getattr(aten, f"bitwise_{name}"), getattr(aten, f"__{name}__")):
        found += [packet.Tensor, packet.Scalar]
    return found


COMPARISON: tuple[OpDef, ...] = (
    _comparison("equal", "eq", "Equal"),
    _comparison("not_equal", "ne", "Equal", negated=True),
    _comparison("less", "lt", "Less"),
    _comparison("less_or_equal", "le", "LessOrEqual"),
    _comparison("greater", "gt", "Greater"),
    _comparison("greater_or_equal", "ge", "GreaterOrEqual"),
    define("is_nan", [aten.isnan.default], Role.INDEX, _test("IsNaN"), "IsNaN"),
    define("is_infinite", [aten.isinf.default], Role.INDEX, _test("IsInf"), "IsInf"),
    define("is_finite", [aten.isfinite.default], Role.INDEX, _test("IsInf", "IsNaN", negated=True)),
    define("logical_and", [aten.logical_and.default], Role.INDEX, _logical("And"), "And"),
    define("logical_or", [aten.logical_or.default], Role.INDEX, _logical("Or"), "Or"),
    define("logical_xor", [aten.logical_xor.default], Role.INDEX, _logical("Xor"), "Xor"),
    define("logical_not", [aten.logical_not.default], Role.INDEX, _logical("Not"), "Not"),
    define("bitwise_and", _both("and"), Role.INDEX, _bitwise("And"), "And", "BitwiseAnd"),
    define("bitwise_or", _both("or"), Role.INDEX, _bitwise("Or"), "Or", "BitwiseOr"),
    define("bitwise_xor", _both("xor"), Role.INDEX, _bitwise("Xor"), "Xor", "BitwiseXor"),
    define("bitwise_not", [aten.bitwise_not.default], Role.INDEX, _bitwise("Not"), "Not", "BitwiseNot"),
    define(
        "where",
        [aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar],
        where_role,
        _emit_where,
        "Where",
        kernel=GeneralKernel("QLinearWhere", _why_no_where, _where_codes),
    ),
    define(
        "masked_fill",
        [aten.masked_fill.Scalar, aten.masked_fill.Tensor],
        Role.FLOAT,
        _emit_masked_fill,
        "Where",
        kernel=GeneralKernel("QLinearWhere", _why_no_where, _masked_fill_codes),
    ),
)
