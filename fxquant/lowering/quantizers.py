"""FakeQuant nodes in ONNX.

    activation v    QuantizeLinear -> [Clip] -> DequantizeLinear      the latter reads `v.codes`, and writes `v_fq`
    weight w        initializer `w.codes` -> DequantizeLinear         INT8/UINT8 up to 8 bits, INT16/UINT16 up to 16;
                                                                      per tensor, channel (axis) or block (block_size)
    bias b          initializer `b.codes` (INT32) -> DequantizeLinear, scale f(sx * sw)

The Clip is there for grids narrower than their dtype; on codes, because that is the one onnxruntime fuses across. Grids
of 9 to 15 bits are clipped before QuantizeLinear instead.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from fxquant.lowering.barriers import needs_barrier_before_quantizer
from fxquant.lowering.encodings import storage_dtype
from fxquant.lowering.writer import GraphWriter
from fxquant.numerics.codes import Grid
from fxquant.numerics.rounding import along_axis, dequantize
from fxquant.ops.activation import activation_bounds, bound_that_cuts
from fxquant.ops.base import Emitted
from fxquant.spec import Encoding, QuantSpec


def emit_quantizer(node: fx.Node, writer: GraphWriter) -> Emitted:
    """A FakeQuant or BiasFakeQuant node; one that is off passes its input on."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if not writer.encodings.is_off(node) and writer.dtype(source) is not torch.float32:
        reason = f"its value is {writer.dtype(source)}, and its grid is float32"
        raise writer.refuse(node, reason, "Capture the model in float32 (model.float()), or leave that value in float.")
    if writer.is_constant(node):
        return writer.weight(node)
    if writer.encodings.is_off(node):
        return writer.value(source)
    return _emit_activation(node, source, writer)


def _emit_activation(node: fx.Node, source: fx.Node, writer: GraphWriter) -> ir.Value:
    encoding = writer.encodings.encoding(node)
    dtype = storage_dtype(node, encoding.spec, writer.opset)
    if encoding.spec.granularity.block is not None:
        raise writer.refuse(node, "an activation is quantized in blocks", "Quantize activations per tensor.")
    axis = None
    if encoding.scale.ndim:
        assert encoding.spec.granularity.axis is not None
        axis = encoding.spec.granularity.axis % len(writer.shape(source))
    grid = [writer.constant(encoding.scale.numpy()), writer.constant(encoding.zero_point.numpy().astype(dtype))]
    real = writer.value(source)
    if writer.is_guarded and needs_barrier_before_quantizer(real, grid, node, writer.scene):
        real = writer.barrier(real, source.name)
    is_narrow = (encoding.spec.qmin, encoding.spec.qmax) != (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if is_narrow and dtype.itemsize > 1:
        real = _clip_reals(real, source, encoding, writer)
        is_narrow = False
    codes = _emit_codes(source.name, [real, *grid], axis, encoding.spec if is_narrow else None, writer)
    codes.shape, codes.type = writer.onnx_shape(writer.type_of(source)), ir.TensorType(ir.DataType.from_numpy(dtype))
    return writer.place("DequantizeLinear", [codes, *grid], node.name, axis=axis)


def _emit_codes(
    name: str, inputs: list[ir.Value], axis: int | None, narrow: QuantSpec | None, writer: GraphWriter
) -> ir.Value:
    if narrow is None:
        return writer.place("QuantizeLinear", inputs, f"{name}.codes", name=f"{name}.quantize", axis=axis)
    wide = writer.place("QuantizeLinear", inputs, f"{name}.quantize", axis=axis)
    assert inputs[2].dtype is not None
    bounds = [writer.constant(np.array(bound, inputs[2].dtype.numpy())) for bound in (narrow.qmin, narrow.qmax)]
    return writer.place("Clip", [wide, *bounds], f"{name}.codes", name=f"{name}.clip")


def _clip_reals(real: ir.Value, source: fx.Node, encoding: Encoding, writer: GraphWriter) -> ir.Value:
    """`real` within the grid's range: onnxruntime has no Clip of 16-bit codes (and no integer kernel to keep fused)."""
    spec, rank = encoding.spec, len(writer.shape(source))
    bounds = [dequantize(torch.tensor(code), encoding.scale, encoding.zero_point) for code in (spec.qmin, spec.qmax)]
    low, high = (along_axis(bound, spec.granularity, rank).numpy() for bound in bounds)
    above = writer.place("Max", [real, writer.constant(low)], f"{source.name}.clip_low")
    return writer.place("Min", [above, writer.constant(high)], f"{source.name}.clip_high")


def is_left_to_quantizer(node: fx.Node, writer: GraphWriter) -> bool:
    """Whether a relu or clip need not be written, because the quantizer that alone reads it clips as much.

    onnxruntime 1.31.1 removes such an activation itself, and runs what is in front on integers, but for two cases:

    1. Behind a linear of rank above 2, a Gemm between two Reshapes, it removes the Relu too late for the
       QuantizeLinear to move up to the Gemm, which then gives floats.
    2. On a grid narrower than its dtype it compares a Clip with the dtype's codes (6 / scale = 15 is below 255), and
       keeps it: it does not see that the Clip of codes behind cuts at 15.
    """
    users, bounds = list(node.users), activation_bounds(node)
    if bounds is None or len(users) != 1 or writer.program.fake_quant(users[0]) is None:
        return False
    if writer.encodings.is_off(users[0]):
        return False
    encoding = writer.encodings.encoding(users[0])
    spec, dtype = encoding.spec, np.iinfo(storage_dtype(users[0], encoding.spec, writer.opset))
    if not _is_within(bounds, encoding, (spec.qmin, spec.qmax)):
        return False
    return _is_behind_reshaped_product(node, writer) or not _is_within(bounds, encoding, (dtype.min, dtype.max))


def _is_behind_reshaped_product(node: fx.Node, writer: GraphWriter) -> bool:
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.target is not torch.ops.aten.linear.default:
        return False
    return len(writer.shape(source)) > 2 and len(source.users) == 1


def _is_within(bounds: tuple[float, float], encoding: Encoding, codes: tuple[int, int]) -> bool:
    """Whether every value that [low, high] cuts off is cut off by codes (lowest, highest), too."""
    return bound_that_cuts(bounds, Grid(encoding.scale, encoding.zero_point, *codes)) is None
