"""Normalization: batch, layer, group, instance and RMS norm, vector norms, and dropout, which is the identity here.

onnxruntime has no integer kernel for any of them: they are float islands (fold-batch-norm removes most batch norms
before). Where an opset has no operator for one, or onnxruntime's CPU provider none, it is decomposed:

    layer norm, opset < 17:  d = x - mean(x);  y = d / sqrt(mean(d d) + eps) * w + b
    group norm:              InstanceNormalization over [N, groups, rest], then * w + b per channel
    rms norm:                y = x / sqrt(mean(x x) + eps) * w
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx, nn

from fxquant.numerics.live_batch_norm import LiveBatchNorm
from fxquant.ops._arguments import bind
from fxquant.ops._emit import (
    argument,
    axes_of,
    called_module,
    filled,
    optional_value,
    reduce,
    reshape,
    reshape_like,
    unsqueeze,
)
from fxquant.ops.base import OpDef, Role, Writer

aten = torch.ops.aten


def _input(node: fx.Node) -> fx.Node:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return x


def _emit_batch_norm_module(node: fx.Node, writer: Writer) -> ir.Value:
    module = called_module(node)
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    if module.running_mean is None or module.running_var is None:
        raise writer.refuse(node, "it normalizes by its batch's own statistics", "Use track_running_stats=True.")
    tensors = [module.weight, module.bias, module.running_mean, module.running_var]
    values = [None if tensor is None else _constant(writer, tensor) for tensor in tensors]
    return _batch_normalization(node, writer, values, module.eps)


def _constant(writer: Writer, tensor: torch.Tensor) -> ir.Value:
    return writer.constant(tensor.detach().cpu().numpy())


def _emit_batch_norm(node: fx.Node, writer: Writer) -> ir.Value:
    if argument(node, "training") or argument(node, "running_mean") is None:
        raise writer.refuse(node, "it normalizes by its batch's own statistics", "Capture the model in eval mode.")
    values = [optional_value(node, key, writer) for key in ("weight", "bias", "running_mean", "running_var")]
    return _batch_normalization(node, writer, values, argument(node, "eps"))


def _batch_normalization(node: fx.Node, writer: Writer, tensors: Sequence[ir.Value | None], eps: float) -> ir.Value:
    """BatchNormalization of scale, bias, mean, var; a missing scale is 1, a missing bias 0."""
    scale, bias, mean, var = tensors
    channels, dtype = writer.shape(_input(node))[1], writer.dtype(node)
    assert isinstance(channels, int)
    scale = filled(writer, [channels], 1.0, dtype) if scale is None else scale
    bias = filled(writer, [channels], 0.0, dtype) if bias is None else bias
    value: ir.Value = writer.op(
        "BatchNormalization", [writer.value(_input(node)), scale, bias, mean, var], epsilon=float(eps)
    )
    return value


def _affine(node: fx.Node, writer: Writer, value: ir.Value, trailing: int) -> ir.Value:
    """value * weight + bias, the parameters followed by `trailing` axes of size 1."""
    for key, op_type in (("weight", "Mul"), ("bias", "Add")):
        parameter = optional_value(node, key, writer) if key in bind(node) else None
        if parameter is not None:
            shaped = unsqueeze(writer, parameter, range(1, trailing + 1)) if trailing else parameter
            value = writer.op(op_type, [value, shaped])
    return value


def _over_deviation(writer: Writer, x: ir.Value, axes: Sequence[int], eps: float, dtype: torch.dtype) -> ir.Value:
    """x / sqrt(mean(x x) + eps) over `axes`."""
    square = writer.op("Pow", [x, writer.operand(2.0, like=dtype)])  # onnxruntime's LayerNormFusion looks for a Pow
    mean = reduce(writer, "ReduceMean", square, axes, keepdim=True)
    deviation = writer.op("Sqrt", [writer.op("Add", [mean, writer.operand(float(eps), like=dtype)])])
    value: ir.Value = writer.op("Div", [x, deviation])
    return value


def _normal_axes(node: fx.Node) -> list[int]:
    return list(range(-len(argument(node, "normalized_shape")), 0))


def _emit_layer_norm(node: fx.Node, writer: Writer) -> ir.Value:
    x, dtype, eps = writer.value(_input(node)), writer.dtype(node), float(argument(node, "eps"))
    axes = _normal_axes(node)
    if writer.opset < 17:
        centred = writer.op("Sub", [x, reduce(writer, "ReduceMean", x, axes, keepdim=True)])
        return _affine(node, writer, _over_deviation(writer, centred, axes, eps, dtype), trailing=0)
    scale = optional_value(node, "weight", writer)
    if scale is None:
        scale = filled(writer, argument(node, "normalized_shape"), 1.0, dtype)
    value: ir.Value = writer.op(
        "LayerNormalization", [x, scale, optional_value(node, "bias", writer)], axis=axes[0], epsilon=eps
    )
    return value


def _emit_rms_norm(node: fx.Node, writer: Writer) -> ir.Value:
    eps, dtype = argument(node, "eps"), writer.dtype(node)
    eps = torch.finfo(dtype).eps if eps is None else eps
    value = _over_deviation(writer, writer.value(_input(node)), _normal_axes(node), eps, dtype)
    return _affine(node, writer, value, trailing=0)


def _emit_group_norm(node: fx.Node, writer: Writer) -> ir.Value:
    groups, dtype, shape = int(argument(node, "num_groups")), writer.dtype(node), writer.shape(_input(node))
    x = writer.value(_input(node))
    ones, zeros = filled(writer, [groups], 1.0, dtype), filled(writer, [groups], 0.0, dtype)
    grouped = reshape(writer, x, [0, groups, -1])
    normal = writer.op("InstanceNormalization", [grouped, ones, zeros], epsilon=float(argument(node, "eps")))
    return _affine(node, writer, reshape_like(writer, normal, shape, x), trailing=len(shape) - 2)


def _emit_instance_norm(node: fx.Node, writer: Writer) -> ir.Value:
    eps, dtype = argument(node, "eps"), writer.dtype(node)
    values = [optional_value(node, key, writer) for key in ("weight", "bias", "running_mean", "running_var")]
    if not argument(node, "use_input_stats"):
        return _batch_normalization(node, writer, values, eps)
    channels = writer.shape(_input(node))[1]
    assert isinstance(channels, int)
    scale = filled(writer, [channels], 1.0, dtype) if values[0] is None else values[0]
    bias = filled(writer, [channels], 0.0, dtype) if values[1] is None else values[1]
    value: ir.Value = writer.op("InstanceNormalization", [writer.value(_input(node)), scale, bias], epsilon=float(eps))
    return value


def _emit_vector_norm(node: fx.Node, writer: Writer) -> ir.Value:
    """(sum |x|^p)^(1/p); p = 0 counts what is not 0, and infinities are the extremes."""
    x, dtype, order = writer.value(_input(node)), writer.dtype(node), float(argument(node, "ord"))
    if writer.dtype(_input(node)) != dtype:
        x = writer.cast(x, dtype)
    axes, keepdim = axes_of(argument(node, "dim"), len(writer.shape(_input(node)))), bool(argument(node, "keepdim"))
    if order in (1.0, 2.0):
        return reduce(writer, f"ReduceL{int(order)}", x, axes, keepdim=keepdim)
    if math.isinf(order):
        return reduce(writer, "ReduceMax" if order > 0 else "ReduceMin", writer.op("Abs", [x]), axes, keepdim=keepdim)
    if order == 0.0:
        nonzero = writer.op("Not", [writer.op("Equal", [x, writer.operand(0.0, like=dtype)])])
        return reduce(writer, "ReduceSum", writer.cast(nonzero, dtype), axes, keepdim=keepdim)
    powers = writer.op("Pow", [writer.op("Abs", [x]), writer.operand(order, like=dtype)])
    total = reduce(writer, "ReduceSum", powers, axes, keepdim=keepdim)
    value: ir.Value = writer.op("Pow", [total, writer.operand(1.0 / order, like=dtype)])
    return value


def _emit_identity(node: fx.Node, writer: Writer) -> ir.Value:
    value: ir.Value = writer.op("Identity", [writer.value(_input(node))])
    return value


def _emit_input(node: fx.Node, writer: Writer) -> ir.Value:
    """A live batch norm outside training: nothing, the layer in front of it does it."""
    return writer.value(_input(node))


def _float(name: str, target: Any, emit: Any, *onnx_types: str) -> OpDef:
    targets = target if isinstance(target, tuple) else (target,)
    return OpDef(name=name, targets=targets, role=Role.FLOAT, emit=emit, onnx_types=onnx_types)


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

NORMALIZATION: tuple[OpDef, ...] = (
    _float("batch_norm", _BATCH_NORMS, _emit_batch_norm_module, "BatchNormalization"),
    _float("batch_norm_functional", aten.batch_norm.default, _emit_batch_norm, "BatchNormalization"),
    _float("layer_norm", aten.layer_norm.default, _emit_layer_norm, "LayerNormalization"),
    _float("group_norm", aten.group_norm.default, _emit_group_norm, "GroupNormalization"),
    _float("instance_norm", aten.instance_norm.default, _emit_instance_norm, "InstanceNormalization"),
    _float("rms_norm", aten.rms_norm.default, _emit_rms_norm, "RMSNormalization"),
    _float("vector_norm", aten.linalg_vector_norm.default, _emit_vector_norm, "ReduceL1", "ReduceL2"),
    OpDef(
        name="live_batch_norm",
        targets=(LiveBatchNorm,),
        role=Role.ACTIVATION,
        emit=_emit_input,
    ),
    OpDef(
        name="dropout",
        targets=(nn.modules.dropout._DropoutNd,),
        role=Role.GRID_PRESERVING,
        emit=_emit_identity,
        onnx_types=("Dropout",),
    ),
)
