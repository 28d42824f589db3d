"""Reductions, running sums, and what sorts. onnxruntime runs maxima and minima on codes, sums and means in float."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from fxquant.ops._arguments import (
    MAX_INT,
    as_dtype,
    axis_of,
    bind,
    computable,
    define,
    finish,
    identity,
    ints,
    operand,
    scalar,
)
from fxquant.ops._emit import axes_of, reduce, reshape, squeeze
from fxquant.ops._sizes import runtime_size
from fxquant.ops.base import Emitted, Emitter, OpDef, Role, Writer

aten = torch.ops.aten
KEEPS = Role.GRID_PRESERVING


def _axes(bound: dict[str, Any], rank: int) -> list[int]:
    return axes_of(bound.get("dim"), rank)


def _reduced(w: Writer, op_type: str, x: ir.Value, axes: Sequence[int], keepdim: bool) -> ir.Value:
    """A scalar has no axis to reduce."""
    return reduce(w, op_type, x, axes, keepdim=keepdim) if axes else identity(w, x)


def _reduction(op_type: str) -> Emitter:
    """The emitter of a reduction that is computed in the output's dtype, over `dim` or over all axes."""

    def emit(node: fx.Node, w: Writer) -> ir.Value:
        bound = bind(node)
        dtype = computable(w.dtype(node))
        x = operand(w, bound["self"], dtype)
        axes = _axes(bound, len(w.shape(bound["self"])))
        return finish(node, w, _reduced(w, op_type, x, axes, bound.get("keepdim", False)), dtype)

    return emit


def _truth(op_type: str) -> Emitter:
    """any is the maximum of 0 and 1, all the minimum."""

    def emit(node: fx.Node, w: Writer) -> ir.Value:
        bound = bind(node)
        source = bound["self"]
        truth = as_dtype(w, w.value(source), w.dtype(source), torch.bool)
        axes = _axes(bound, len(w.shape(source)))
        found = _reduced(w, op_type, w.cast(truth, torch.int32), axes, bound.get("keepdim", False))
        return as_dtype(w, found, torch.int32, w.dtype(node))

    return emit


def _extreme_along(kind: str) -> Emitter:
    """max.dim and min.dim: values, and the indices of the first ones if anything reads them."""

    def emit(node: fx.Node, w: Writer) -> Emitted:
        bound = bind(node)
        source = bound["self"]
        have, rank = w.dtype(source), len(w.shape(source))
        if not rank:
            return identity(w, w.value(source)), w.operand(0, torch.int64)
        dtype = computable(have)
        axis = axis_of(bound["dim"], rank)
        x = operand(w, source, dtype)
        values = as_dtype(w, reduce(w, f"Reduce{kind}", x, [axis], keepdim=bound["keepdim"]), dtype, have)
        if not _reads(node, 1):
            return (values,)
        return values, _arg(w, kind, x, dtype, axis, bound["keepdim"])

    return emit


def _reads(node: fx.Node, output: int) -> bool:
    return any(len(user.args) < 2 or user.args[1] == output for user in node.users)


def _arg(w: Writer, kind: str, x: ir.Value, dtype: torch.dtype, axis: int, keepdim: bool) -> ir.Value:
    """onnxruntime's ArgMax and ArgMin have no int64; double holds every whole number below 2^53."""
    x = w.cast(x, torch.float64) if dtype == torch.int64 else x
    result: ir.Value = w.op(f"Arg{kind}", [x], axis=axis, keepdims=int(keepdim))
    return result


def _arg_extreme(kind: str) -> Emitter:
    def emit(node: fx.Node, w: Writer) -> ir.Value:
        bound = bind(node)
        source = bound["self"]
        dtype, rank = computable(w.dtype(source)), len(w.shape(source))
        x = operand(w, source, dtype)
        if bound["dim"] is not None and rank:
            return _arg(w, kind, x, dtype, axis_of(bound["dim"], rank), bound["keepdim"])
        found = _arg(w, kind, reshape(w, x, [-1]), dtype, 0, False)
        return reshape(w, found, [1] * rank) if bound["keepdim"] and rank else found

    return emit


def _variance(node: fx.Node, w: Writer) -> tuple[ir.Value, ir.Value]:
    """Variance and mean; `correction` is subtracted from the number of elements (`unbiased` subtracts 1)."""
    bound = bind(node)
    source, dtype = bound["self"], w.dtype(bound["self"])
    axes = _axes(bound, len(w.shape(source)))
    keepdim = bound.get("keepdim", False)
    mean = reduce(w, "ReduceMean", w.value(source), axes, keepdim=True)
    difference = w.op("Sub", [w.value(source), mean])
    total = reduce(w, "ReduceSum", w.op("Pow", [difference, w.operand(2.0, dtype)]), axes, keepdim=keepdim)
    correction = bound.get("correction", int(bound.get("unbiased", True)))
    count = _count(w, source, axes, 1 if correction is None else correction)
    return w.op("Div", [total, count]), mean if keepdim else squeeze(w, mean, axes)


def _count(w: Writer, x: fx.Node, axes: Sequence[int], correction: float) -> ir.Value:
    known, symbolic = 1, []
    for axis in axes:
        size = w.shape(x)[axis]
        if isinstance(size, int):
            known *= size
        else:
            symbolic.append(axis)
    if not symbolic:
        return w.operand(float(max(known - correction, 0)), w.dtype(x))
    product = ints(w, known)
    for axis in symbolic:
        product = w.op("Mul", [product, runtime_size(w, x, axis)])
    count = w.op("Sub", [w.cast(squeeze(w, product, [0]), w.dtype(x)), w.operand(float(correction), w.dtype(x))])
    result: ir.Value = w.op("Max", [count, w.operand(0.0, w.dtype(x))])
    return result


def _emit_variance(node: fx.Node, w: Writer) -> ir.Value:
    return _variance(node, w)[0]


def _emit_deviation(node: fx.Node, w: Writer) -> ir.Value:
    result: ir.Value = w.op("Sqrt", [_variance(node, w)[0]])
    return result


def _emit_variance_and_mean(node: fx.Node, w: Writer) -> Emitted:
    return _variance(node, w)


def _emit_deviation_and_mean(node: fx.Node, w: Writer) -> Emitted:
    variance, mean = _variance(node, w)
    return w.op("Sqrt", [variance]), mean


def _emit_cumsum(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    dtype = computable(w.dtype(node))
    x = operand(w, bound["self"], dtype)
    rank = len(w.shape(node))
    if not rank:
        return identity(w, finish(node, w, x, dtype))
    axis = scalar(w, axis_of(bound["dim"], rank))
    return finish(node, w, w.op("CumSum", [x, axis]), dtype)


def _emit_diff(node: fx.Node, w: Writer) -> ir.Value:
    """x[1:] - x[:-1] along an axis, n times; of booleans, whether they differ."""
    bound = bind(node)
    axis = axis_of(bound["dim"], len(w.shape(node)))
    is_bool = w.dtype(node) == torch.bool
    dtype = torch.bool if is_bool else computable(w.dtype(node))
    parts = [operand(w, bound[key], dtype) for key in ("prepend", "self", "append") if bound[key] is not None]
    x = w.op("Concat", parts, axis=axis) if len(parts) > 1 else parts[0]
    for _ in range(bound["n"]):
        later = w.op("Slice", [x, ints(w, 1), ints(w, MAX_INT), ints(w, axis)])
        earlier = w.op("Slice", [x, ints(w, 0), ints(w, -1), ints(w, axis)])
        x = w.op("Xor", [later, earlier]) if is_bool else w.op("Sub", [later, earlier])
    return finish(node, w, x, dtype) if bound["n"] else identity(w, finish(node, w, x, dtype))


def _top(w: Writer, x: fx.Node, count: ir.Value, dim: int, largest: bool, is_sorted: bool) -> Emitted:
    dtype = computable(w.dtype(x))
    axis = axis_of(dim, len(w.shape(x)))
    inputs = [operand(w, x, dtype), count]
    values, indices = w.op("TopK", inputs, outputs=2, axis=axis, largest=int(largest), sorted=int(is_sorted))
    return as_dtype(w, values, dtype, w.dtype(x)), indices


def _emit_topk(node: fx.Node, w: Writer) -> Emitted:
    bound = bind(node)
    return _top(w, bound["self"], w.sizes([bound["k"]]), bound["dim"], bound["largest"], bound["sorted"])


def _emit_sort(node: fx.Node, w: Writer) -> Emitted:
    bound = bind(node)
    x = bound["self"]
    axis = axis_of(bound["dim"], len(w.shape(x)))
    size = w.shape(x)[axis]
    count = ints(w, size) if isinstance(size, int) else runtime_size(w, x, axis)
    return _top(w, x, count, axis, bound["descending"], True)


def _emit_argsort(node: fx.Node, w: Writer) -> ir.Value:
    found = _emit_sort(node, w)
    assert isinstance(found, tuple)
    return found[1]


_VARIANCES = (aten.var.correction, aten.var.dim, aten.var.default)
_DEVIATIONS = (aten.std.correction, aten.std.dim, aten.std.default)

REDUCTION: tuple[OpDef, ...] = (
    define("mean", [aten.mean.dim, aten.mean.default], Role.FLOAT, _reduction("ReduceMean"), "ReduceMean"),
    define("sum", [aten.sum.dim_IntList, aten.sum.default], Role.FLOAT, _reduction("ReduceSum"), "ReduceSum"),
    define("product", [aten.prod.default, aten.prod.dim_int], Role.FLOAT, _reduction("ReduceProd"), "ReduceProd"),
    define("maximum_of", [aten.amax.default, aten.max.default], KEEPS, _reduction("ReduceMax"), "ReduceMax"),
    define("minimum_of", [aten.amin.default, aten.min.default], KEEPS, _reduction("ReduceMin"), "ReduceMin"),
    define("maximum_along", [aten.max.dim], KEEPS, _extreme_along("Max"), "ReduceMax"),
    define("minimum_along", [aten.min.dim], KEEPS, _extreme_along("Min"), "ReduceMin"),
    define("argmax", [aten.argmax.default], Role.INDEX, _arg_extreme("Max"), "ArgMax"),
    define("argmin", [aten.argmin.default], Role.INDEX, _arg_extreme("Min"), "ArgMin"),
    define("log_sum_exp", [aten.logsumexp.default], Role.FLOAT, _reduction("ReduceLogSumExp"), "ReduceLogSumExp"),
    define("any", [aten.any.default, aten.any.dim, aten.any.dims], Role.INDEX, _truth("ReduceMax")),
    define("all", [aten.all.default, aten.all.dim, aten.all.dims], Role.INDEX, _truth("ReduceMin")),
    define("variance", _VARIANCES, Role.FLOAT, _emit_variance),
    define("standard_deviation", _DEVIATIONS, Role.FLOAT, _emit_deviation),
    define("variance_and_mean", [aten.var_mean.correction, aten.var_mean.dim], Role.FLOAT, _emit_variance_and_mean),
    define("deviation_and_mean", [aten.std_mean.correction, aten.std_mean.dim], Role.FLOAT, _emit_deviation_and_mean),
    define("cumulative_sum", [aten.cumsum.default], Role.FLOAT, _emit_cumsum, "CumSum"),
    define("diff", [aten.diff.default], Role.FLOAT, _emit_diff, "Sub"),
    define("topk", [aten.topk.default], Role.FLOAT, _emit_topk, "TopK"),
    define("sort", [aten.sort.default, aten.sort.stable], Role.FLOAT, _emit_sort, "TopK"),
    define("argsort", [aten.argsort.default], Role.INDEX, _emit_argsort, "TopK"),
)
