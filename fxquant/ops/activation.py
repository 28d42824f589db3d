"""Activations. A Clip or Relu disappears in the quantizer behind it; Sigmoid, Softmax, LeakyRelu run on integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from fxquant.numerics.codes import Grid
from fxquant.numerics.grids import clip_codes
from fxquant.numerics.kernels.softmax import overflow, softmax
from fxquant.numerics.kernels.tables import leaky_relu, sigmoid
from fxquant.ops._arguments import (
    axis_of,
    bind,
    bind_first,
    computable,
    define,
    finish,
    input_as_output,
    operand,
    output_types,
    promoted,
    same_float_dtype,
)
from fxquant.ops._emit import unsqueeze
from fxquant.ops.base import Emitter, OpDef, Role, Writer
from fxquant.ops.elementwise import unary
from fxquant.ops.kernels import GeneralKernel, UnaryKernel
from fxquant.spec import Limits

aten = torch.ops.aten

SHORTEST_SYMBOLIC = 2  # capture takes a symbolic size to be above 1
UNIT = Limits(0.0, 1.0)


def _with(op_type: str, attributes: Callable[[dict[str, Any]], dict[str, Any]]) -> Emitter:
    """The emitter of a one-input operator whose attributes come from the node's arguments."""

    def emit(node: fx.Node, w: Writer) -> ir.Value:
        result: ir.Value = w.op(op_type, [input_as_output(node, w)], **attributes(bind(node)))
        return result

    return emit


def _clip(node: fx.Node, w: Writer, low: Any, high: Any) -> ir.Value:
    """Clip with scalar bounds, as onnxruntime wants it before a quantizer; Min and Max where a bound is no scalar."""
    dtype = computable(w.dtype(node))
    x = operand(w, bind(node)["self"], dtype)
    if any(isinstance(bound, fx.Node) and w.shape(bound) for bound in (low, high)):
        x = x if low is None else w.op("Max", [x, operand(w, low, dtype)])
        x = x if high is None else w.op("Min", [x, operand(w, high, dtype)])
        return finish(node, w, x, dtype)
    bounds = [None if bound is None else operand(w, bound, dtype) for bound in (low, high)]
    return finish(node, w, w.op("Clip", [x, *bounds]), dtype)


def _emit_clamp(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    return _clip(node, w, bound.get("min"), bound.get("max"))


def _emit_hardtanh(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    return _clip(node, w, bound["min_val"], bound["max_val"])


def _emit_relu6(node: fx.Node, w: Writer) -> ir.Value:
    return _clip(node, w, 0, 6)


def clip_role(node: fx.Node) -> Role:
    """A quantizer absorbs a clip whose bounds are known now."""
    bound = bind(node)
    bounds = (bound.get("min"), bound.get("max"))
    return Role.FLOAT if any(isinstance(value, fx.Node) for value in bounds) else Role.ACTIVATION


def activation_bounds(node: fx.Node) -> tuple[float, float] | None:
    """Lowest and highest output of a relu or clip, None if not constants; a live batch norm cuts nothing."""
    if node.op == "call_module":
        return float("-inf"), float("inf")
    if node.target in (aten.relu.default, aten.relu6.default):
        return 0.0, float("inf") if node.target is aten.relu.default else 6.0
    low: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("min", node.kwargs.get("min_val"))
    high: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("max", node.kwargs.get("max_val"))
    if node.target is aten.hardtanh.default:
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    return (float("-inf") if low is None else float(low)), (float("inf") if high is None else float(high))


def bound_that_cuts(bounds: tuple[float, float], grid: Grid) -> float | None:
    """The first of a relu's or clip's bounds that cuts off more than the codes of the grid behind it do; None if none.

    It is how onnxruntime decides whether to run the operation in front on integers.
    """
    low, high = clip_codes(*bounds, grid.scale, grid.zero_point)
    if bool((low > grid.qmin).any()):
        return bounds[0]
    return bounds[1] if bool((high < grid.qmax).any()) else None


def _emit_relu(node: fx.Node, w: Writer) -> ir.Value:
    """onnxruntime's Relu has no kernel for int64."""
    if w.dtype(node).is_floating_point:
        result: ir.Value = w.op("Relu", [w.value(bind(node)["self"])])
        return result
    dtype = computable(w.dtype(node))
    return finish(node, w, w.op("Max", [operand(w, bind(node)["self"], dtype), w.operand(0, dtype)]), dtype)


def _emit_prelu(node: fx.Node, w: Writer) -> ir.Value:
    """The slope's one axis is the input's axis 1; ONNX aligns from the right."""
    x, slope = list(bind(node).values())
    value = operand(w, slope, w.dtype(node))
    trailing = len(w.shape(x)) - 2
    if len(w.shape(slope)) == 1 and w.shape(slope) != (1,) and trailing > 0:
        value = unsqueeze(w, value, list(range(1, trailing + 1)))
    result: ir.Value = w.op("PRelu", [operand(w, x, w.dtype(node)), value])
    return result


def _emit_elu(node: fx.Node, w: Writer) -> ir.Value:
    """scale * Elu(x), its argument times input_scale below 0."""
    bound = bind(node)
    dtype = w.dtype(node)
    x = input_as_output(node, w)
    if bound["input_scale"] != 1:
        negative = w.op("Mul", [w.op("Min", [x, w.operand(0.0, dtype)]), w.operand(bound["input_scale"], dtype)])
        x = w.op("Add", [w.op("Relu", [x]), negative])
    result: ir.Value = w.op("Elu", [x], alpha=bound["alpha"])
    return result if bound["scale"] == 1 else w.op("Mul", [result, w.operand(bound["scale"], dtype)])


def _emit_silu(node: fx.Node, w: Writer) -> ir.Value:
    x = input_as_output(node, w)
    result: ir.Value = w.op("Mul", [x, w.op("Sigmoid", [x])])
    return result


def _emit_mish(node: fx.Node, w: Writer) -> ir.Value:
    x = input_as_output(node, w)
    result: ir.Value = w.op("Mul", [x, w.op("Tanh", [w.op("Softplus", [x])])])
    return result


def _emit_softplus(node: fx.Node, w: Writer) -> ir.Value:
    """log(1 + exp(beta x)) / beta; where beta x > threshold torch returns x, off by less than exp(-threshold)."""
    bound = bind(node)
    dtype, beta = w.dtype(node), bound["beta"]
    x = input_as_output(node, w)
    inner = x if beta == 1 else w.op("Mul", [x, w.operand(beta, dtype)])
    result: ir.Value = w.op("Softplus", [inner])
    if beta != 1:
        result = w.op("Div", [result, w.operand(beta, dtype)])
    if bound["threshold"] < 15:
        result = w.op("Where", [w.op("Greater", [inner, w.operand(bound["threshold"], dtype)]), x, result])
    return result


def _emit_log_sigmoid(node: fx.Node, w: Writer) -> ir.Value:
    result: ir.Value = w.op("Neg", [w.op("Softplus", [w.op("Neg", [input_as_output(node, w)])])])
    return result


def _emit_hardswish(node: fx.Node, w: Writer) -> ir.Value:
    """HardSwish is an operator from opset 14 on."""
    x = input_as_output(node, w)
    if w.opset >= 14:
        result: ir.Value = w.op("HardSwish", [x])
        return result
    result = w.op("Mul", [x, w.op("HardSigmoid", [x], alpha=1 / 6, beta=0.5)])
    return result


def _emit_gelu(node: fx.Node, w: Writer) -> ir.Value:
    """Gelu is an operator from opset 20 on; below, in the form that onnxruntime recognises."""
    approximate = bind(node)["approximate"]
    x = input_as_output(node, w)
    if w.opset >= 20:
        result: ir.Value = w.op("Gelu", [x], approximate=approximate)
        return result
    return _gelu_tanh(w, x, w.dtype(node)) if approximate == "tanh" else _gelu_erf(w, x, w.dtype(node))


def _gelu_erf(w: Writer, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    erf = w.op("Erf", [w.op("Div", [x, w.operand(math.sqrt(2.0), dtype)])])
    product = w.op("Mul", [x, w.op("Add", [erf, w.operand(1.0, dtype)])])
    result: ir.Value = w.op("Mul", [product, w.operand(0.5, dtype)])
    return result


def _gelu_tanh(w: Writer, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    cube = w.op("Mul", [w.op("Pow", [x, w.operand(3.0, dtype)]), w.operand(0.044715, dtype)])
    inner = w.op("Mul", [w.op("Add", [x, cube]), w.operand(math.sqrt(2.0 / math.pi), dtype)])
    half = w.op("Mul", [x, w.operand(0.5, dtype)])
    result: ir.Value = w.op("Mul", [half, w.op("Add", [w.op("Tanh", [inner]), w.operand(1.0, dtype)])])
    return result


def _softmax(op_type: str) -> Emitter:
    def emit(node: fx.Node, w: Writer) -> ir.Value:
        axis = axis_of(bind(node)["dim"], len(w.shape(node)))
        result: ir.Value = w.op(op_type, [input_as_output(node, w)], axis=axis)
        return result

    return emit


def _why_cast(node: fx.Node) -> str:
    """Why no integer kernel reads the input of `node`: it is cast first."""
    return "" if same_float_dtype(bind_first(node), node) else "its input is cast first"


def _softmax_codes(node: fx.Node, args: Sequence[Any], out: Grid) -> torch.Tensor:
    x = args[0]
    return softmax(x.integers, x.grid, out, axis_of(bind(node)["dim"], x.centred.ndim))


def _softmax_overflows(node: fx.Node, operands: Sequence[Grid], out: Grid) -> str:
    """A length that is not known now may be the shortest."""
    shape = output_types(node)[0].shape
    length = shape[axis_of(bind(node)["dim"], len(shape))] if shape else 1
    return overflow(float(out.scale), length if isinstance(length, int) else SHORTEST_SYMBOLIC)


def _emit_glu(node: fx.Node, w: Writer) -> ir.Value:
    axis = axis_of(bind(node)["dim"], len(w.shape(node)))
    half = w.shape(node)[axis]
    if not isinstance(half, int):
        raise w.refuse(node, f"it halves an axis of symbolic size (axis {axis})")
    left, right = w.op("Split", [input_as_output(node, w), w.sizes([half, half])], outputs=2, axis=axis)
    result: ir.Value = w.op("Mul", [left, w.op("Sigmoid", [right])])
    return result


def _emit_threshold(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    dtype = computable(promoted(w, bound["self"]))
    x = operand(w, bound["self"], dtype)
    above = w.op("Greater", [x, operand(w, bound["threshold"], dtype)])
    return finish(node, w, w.op("Where", [above, x, operand(w, bound["value"], dtype)]), dtype)


def _alpha(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda bound: {"alpha": float(bound[name])}


_CLAMPS = (aten.clamp.default, aten.clamp.Tensor, aten.clip.default, aten.clip.Tensor)
_ONE_SIDED = (aten.clamp_min.default, aten.clamp_min.Tensor, aten.clamp_max.default, aten.clamp_max.Tensor)
_LOG_SOFTMAXES = (aten.log_softmax.int, aten._log_softmax.default)

ACTIVATION: tuple[OpDef, ...] = (
    define("relu", [aten.relu.default], Role.ACTIVATION, _emit_relu, "Relu"),
    define("relu6", [aten.relu6.default], Role.ACTIVATION, _emit_relu6, "Clip"),
    define("hardtanh", [aten.hardtanh.default], Role.ACTIVATION, _emit_hardtanh, "Clip"),
    define("clamp", _CLAMPS, clip_role, _emit_clamp, "Clip"),
    define("clamp_one_side", _ONE_SIDED, Role.FLOAT, _emit_clamp, "Clip"),
    define(
        "leaky_relu",
        [aten.leaky_relu.default],
        Role.COMPUTE,
        _with("LeakyRelu", _alpha("negative_slope")),
        "LeakyRelu",
        kernel=UnaryKernel("QLinearLeakyRelu", _why_cast, lambda node: leaky_relu(float(bind(node)["negative_slope"]))),
    ),
    define("prelu", [aten.prelu.default, aten._prelu_kernel.default], Role.FLOAT, _emit_prelu, "PRelu"),
    define("elu", [aten.elu.default], Role.FLOAT, _emit_elu, "Elu"),
    define("selu", [aten.selu.default], Role.FLOAT, unary("Selu"), "Selu"),
    define("celu", [aten.celu.default], Role.FLOAT, _with("Celu", _alpha("alpha")), "Celu"),
    define(
        "sigmoid",
        [aten.sigmoid.default],
        Role.FIXED_RANGE,
        unary("Sigmoid"),
        "Sigmoid",
        output_range=UNIT,
        kernel=UnaryKernel("QLinearSigmoid", _why_cast, lambda node: sigmoid),
    ),
    define(
        "softmax",
        [aten.softmax.int, aten._softmax.default],
        Role.FIXED_RANGE,
        _softmax("Softmax"),
        "Softmax",
        output_range=UNIT,
        kernel=GeneralKernel("QLinearSoftmax", _why_cast, _softmax_codes, overflows=_softmax_overflows),
    ),
    define("log_softmax", _LOG_SOFTMAXES, Role.FLOAT, _softmax("LogSoftmax"), "LogSoftmax"),
    define("tanh", [aten.tanh.default], Role.FLOAT, unary("Tanh"), "Tanh"),
    define("silu", [aten.silu.default], Role.FLOAT, _emit_silu),
    define("mish", [aten.mish.default], Role.FLOAT, _emit_mish, "Mish"),
    define("softplus", [aten.softplus.default], Role.FLOAT, _emit_softplus, "Softplus"),
    define("log_sigmoid", [aten.log_sigmoid.default], Role.FLOAT, _emit_log_sigmoid),
    define("hardswish", [aten.hardswish.default], Role.FLOAT, _emit_hardswish, "HardSwish"),
    define(
        "hardsigmoid",
        [aten.hardsigmoid.default],
        Role.FLOAT,
        _with("HardSigmoid", lambda _: {"alpha": 1 / 6, "beta": 0.5}),
        "HardSigmoid",
    ),
    define("gelu", [aten.gelu.default], Role.FLOAT, _emit_gelu, "Gelu"),
    define("glu", [aten.glu.default], Role.FLOAT, _emit_glu),
    define("threshold", [aten.threshold.default], Role.FLOAT, _emit_threshold),
    define(
        "hardshrink",
        [aten.hardshrink.default],
        Role.FLOAT,
        _with("Shrink", lambda bound: {"lambd": float(bound["lambd"]), "bias": 0.0}),
        "Shrink",
    ),
    define(
        "softshrink",
        [aten.softshrink.default],
        Role.FLOAT,
        _with("Shrink", lambda bound: {"lambd": float(bound["lambd"]), "bias": float(bound["lambd"])}),
        "Shrink",
    ),
)
