"""Convolutions: `aten.convolution.default(x, w, b, stride, padding, dilation, transposed, output_padding, groups)`.

    x: [N, C, *spatial]    w: [out, C / groups, *kernel], transposed: [C, out / groups, *kernel]    b: [out] or None

Plain ones (1 to 3 spatial axes; grouped, depthwise, dilated, strided) become onnxruntime's QLinearConv between Q/DQ.
It has no integer kernel for ConvTranspose, which therefore is a float island. The weight of a grouped transposed
convolution can have one scale for each index of its axis 1 only: out / groups of them, shared by the groups, because
a DequantizeLinear has one axis.

`fxquant.padded_convolution` (fxquant/numerics/padded_convolution.py) takes the same arguments with two pads for each
axis: ONNX's Conv, and its integer kernel, have them.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import fx

from fxquant.numerics.padded_convolution import PADDED_CONVOLUTION
from fxquant.ops._emit import argument, optional_value
from fxquant.ops.base import OpDef, Role, Writer
from fxquant.ops.kernels import ProductKernel


def is_transposed(node: fx.Node) -> bool:
    """Whether a convolution node is a transposed convolution."""
    return bool(argument(node, "transposed"))


def _channel_axis(node: fx.Node) -> int:
    return 1 if is_transposed(node) else 0


def _role(node: fx.Node) -> Role:
    return Role.FLOAT if is_transposed(node) else Role.WEIGHTED


def _onnx_types(node: fx.Node) -> tuple[str, ...]:
    return ("ConvTranspose",) if is_transposed(node) else ("Conv",)


def _emit_convolution(node: fx.Node, writer: Writer) -> ir.Value:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    spatial = len(writer.shape(weight)) - 2
    padding = list(argument(node, "padding")) * (1 if node.target is PADDED_CONVOLUTION else 2)
    if len(padding) != 2 * spatial or len(writer.shape(node)) != spatial + 2:
        reason = f"padding {padding} and output {writer.shape(node)} do not belong to {spatial} spatial axes"
        raise writer.refuse(node, reason, "Write the convolution on a batch, with full-rank lists, as capture does.")
    extra = _output_padding(node, padding, writer)
    inputs = [writer.operand(node.args[0]), writer.weight(weight), optional_value(node, "bias", writer)]
    value: ir.Value = writer.op(
        "ConvTranspose" if is_transposed(node) else "Conv",
        inputs,
        kernel_shape=list(writer.shape(weight)[2:]),
        strides=list(argument(node, "stride")),
        pads=padding,
        dilations=list(argument(node, "dilation")),
        group=argument(node, "groups"),
        output_padding=extra if is_transposed(node) else None,
    )
    return value


def _output_padding(node: fx.Node, pads: list[int], writer: Writer) -> list[int]:
    """What ONNX's output_padding can say (less than the stride); the rest is taken off the end `pads`, in place."""
    extra = list(argument(node, "output_padding"))
    for axis, stride in enumerate(argument(node, "stride")):
        if extra[axis] >= stride and is_transposed(node):
            pads[len(extra) + axis] -= extra[axis]
            extra[axis] = 0
    if min(pads) < 0:
        reason = f"output_padding={list(argument(node, 'output_padding'))} exceeds both stride and padding"
        raise writer.refuse(node, reason, "Use a smaller output_padding and pad the output.")
    return extra


def _declines(node: fx.Node) -> str:
    return "onnxruntime has no integer kernel for ConvTranspose" if is_transposed(node) else ""


CONVOLUTION: tuple[OpDef, ...] = (
    OpDef(
        name="convolution",
        targets=(torch.ops.aten.convolution.default, PADDED_CONVOLUTION),
        role=Role.WEIGHTED,
        emit=_emit_convolution,
        onnx_types=("Conv", "ConvTranspose"),
        weight=1,
        bias=2,
        channel_axis=_channel_axis,
        kernel=ProductKernel("QLinearConv", _declines, left_axis=1, right_axis=1, channels=1, writes_float=False),
        role_of=_role,
        types_of=_onnx_types,
    ),
)
