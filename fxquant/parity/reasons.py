"""Why onnxruntime left a node in float: the rules of its CPU provider's QDQ selectors, asked of the file it was given.

Sources: `qdq_selectors.cc` and `qdq_util.cc` of onnxruntime, re-measured on 1.31.1 (Relu and Clip bounds, bias scale
tolerance, zero point input present, equal grids around what only moves codes).
"""

from __future__ import annotations

import platform

import numpy as np
import onnx

from fxquant.numerics.runtime import Array, RuntimeOptions
from fxquant.parity.onnx_file import OnnxFile, attribute, input_name

_MOVES_CODES = frozenset(
    "Reshape Flatten Transpose Squeeze Unsqueeze Slice Tile Gather GatherElements Split DepthToSpace Resize MaxPool "
    "ReduceMax ReduceMin".split()
)
_TAKES_16_BITS = frozenset({"Reshape", "Transpose", "GatherElements"})
_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
_FUSES = (
    _LAYERS
    | _MOVES_CODES
    | frozenset("Add Mul Concat Where AveragePool GlobalAveragePool Sigmoid LeakyRelu Softmax ArgMax Relu Clip".split())
)
_NEEDS_NO_OUTPUT_GRID = frozenset({"Gemm", "MatMul", "ArgMax"})
# A bias scale is accepted within 1e-6 + 0.01 * sx * sw of sx * sw (measured at seven magnitudes of sx * sw, both ways).
_BIAS_ABSOLUTE, _BIAS_RELATIVE = 1e-6, 0.01
_INT8, _UINT8 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8
_INT16, _UINT16 = onnx.TensorProto.INT16, onnx.TensorProto.UINT16


def why_float(file: OnnxFile, node: onnx.NodeProto, options: RuntimeOptions) -> str:
    """The first rule that a node of `file` breaks, in words; "no known reason" if it breaks none known here."""
    if not options.level.fuses:
        return f"onnxruntime fuses nothing at level {options.level.value}"
    if dict(options.config).get("session.disable_quant_qdq") == "1":
        return "session.disable_quant_qdq is set"
    if node.op_type not in _FUSES or (node.op_type == "Resize" and attribute(node, "mode", b"nearest") != b"nearest"):
        return f"onnxruntime has no integer kernel for {_spelled(node)}"
    found = (
        _why_blocks(file, node)
        or _why_inputs(file, node)
        or _why_dtype(file, node, options)
        or _why_output(file, node)
        or _why_type(file, node)
    )
    return found or "no known reason"


def _spelled(node: onnx.NodeProto) -> str:
    return (
        f"{node.op_type} (mode {attribute(node, 'mode', b'').decode()})" if node.op_type == "Resize" else node.op_type
    )


def _data_inputs(node: onnx.NodeProto) -> list[str]:
    """The inputs that must come from DequantizeLinear: no biases, sizes, indices, conditions and bounds."""
    counts = {"Conv": 2, "Gemm": 2, "MatMul": 2, "Add": 2, "Mul": 2, "Concat": len(node.input)}
    if node.op_type == "Where":
        return list(node.input[1:3])
    return [name for name in node.input[: counts.get(node.op_type, 1)] if name]


def _dequantizer(file: OnnxFile, tensor: str) -> onnx.NodeProto | None:
    producer = file.producer(tensor)
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def _why_blocks(file: OnnxFile, node: onnx.NodeProto) -> str:
    """Why a layer cannot run on integers whose weight has a scale for each block, behind a barrier or not."""
    weight = file.producer(input_name(node, 1)) if node.op_type in _LAYERS else None
    if weight is not None and weight.op_type == "Max":
        weight = file.producer(weight.input[0])
    block = 0 if weight is None or weight.op_type != "DequantizeLinear" else attribute(weight, "block_size", 0)
    return f"its weight is quantized in blocks of {block}, which no integer kernel takes" if block else ""


def _why_inputs(file: OnnxFile, node: onnx.NodeProto) -> str:
    if node.op_type in ("Relu", "Clip"):
        return ""
    bare = [name for name in _data_inputs(node) if _dequantizer(file, name) is None]
    return f"its input '{bare[0]}' is not quantized" if bare else ""


def _why_dtype(file: OnnxFile, node: onnx.NodeProto, options: RuntimeOptions) -> str:
    types = [(name, _codes_type(file, name)) for name in _data_inputs(node)]
    wide = [name for name, kind in types if kind in (_INT16, _UINT16)]
    if wide and node.op_type not in _TAKES_16_BITS:
        return f"its input '{wide[0]}' has 16-bit codes"
    other = [name for name, kind in types if kind not in (0, _INT8, _UINT8, _INT16, _UINT16)]
    if other:
        return f"its input '{other[0]}' has codes of fewer than 8 bits"
    allowed = dict(options.config).get("session.qdqisint8allowed") == "1"
    is_x64 = platform.machine().lower() in ("x86_64", "amd64")
    activations = types[:1] if node.op_type in _LAYERS and not _is_activation(file, node, 1) else types
    signed = [name for name, kind in activations if kind == _INT8]
    if signed and is_x64 and not allowed:
        return f"its input '{signed[0]}' is a signed activation, which x64 kernels do not take"
    if node.op_type in ("Add", "Mul", "Where") and len({kind for _, kind in types}) > 1:
        return "its inputs have codes of different dtypes"
    return ""


def _is_activation(file: OnnxFile, node: onnx.NodeProto, index: int) -> bool:
    dequantizer = _dequantizer(file, input_name(node, index))
    return dequantizer is not None and not file.is_constant(dequantizer.input[0])


def _codes_type(file: OnnxFile, tensor: str) -> int:
    dequantizer = _dequantizer(file, tensor)
    if dequantizer is None:
        return 0
    return file.element_type(dequantizer.input[0]) or file.element_type(input_name(dequantizer, 2))


def _why_output(file: OnnxFile, node: onnx.NodeProto) -> str:
    if node.op_type in _NEEDS_NO_OUTPUT_GRID:
        return ""
    for name in node.output:
        reason = _why_unquantized(file, name)
        if reason:
            return reason
    return ""


def _why_unquantized(file: OnnxFile, tensor: str) -> str:
    if tensor in file.output_names:
        return "its output is a graph output in float"
    readers = file.consumers(tensor)
    quantizers = [reader for reader in readers if reader.op_type == "QuantizeLinear"]
    if len(readers) == len(quantizers) == 1:
        return ""
    if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        return _why_unquantized(file, readers[0].output[0]) or _why_kept(file, readers[0])
    if len(readers) == 1:
        return f"its output is not quantized ('{readers[0].name}' reads it in float)"
    if not readers:
        return "nothing reads its output"
    return f"its output has {len(readers)} readers ({', '.join(reader.name for reader in readers)})"


def _why_kept(file: OnnxFile, clip: onnx.NodeProto) -> str:
    """Why a Relu or Clip cannot be left to the QuantizeLinear behind it."""
    readers = file.consumers(clip.output[0])
    if len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
        return ""
    scale, zero_point = file.constant(readers[0].input[1]), file.constant(input_name(readers[0], 2))
    if scale is None or zero_point is None:
        return f"{clip.op_type} '{clip.name}' is in front of a grid that is not constant"
    grid = np.iinfo(zero_point.dtype)
    low, high = _bounds(file, clip)
    if _code(low, scale, zero_point) > grid.min:
        return f"{clip.op_type} '{clip.name}' cuts at {low:g}, above the lowest value of the grid behind it"
    if _code(high, scale, zero_point) < grid.max:
        return f"{clip.op_type} '{clip.name}' cuts at {high:g}, below the highest value of the grid behind it"
    return ""


def _bounds(file: OnnxFile, clip: onnx.NodeProto) -> tuple[float, float]:
    if clip.op_type == "Relu":
        return 0.0, float("inf")
    low, high = (file.constant(name) if name else None for name in (input_name(clip, 1), input_name(clip, 2)))
    return (-np.inf if low is None else float(low)), (np.inf if high is None else float(high))


def _code(bound: float, scale: Array, zero_point: Array) -> float:
    return float(np.rint(np.float32(bound) / scale.ravel()[0]) + int(zero_point.ravel()[0]))


def _why_type(file: OnnxFile, node: onnx.NodeProto) -> str:
    if node.op_type in ("Relu", "Clip"):
        return _why_kept(file, node) or "the operation in front of it stayed in float"
    if node.op_type in _MOVES_CODES:
        return _why_grids(file, node)
    return _why_bias(file, node) if node.op_type in ("Conv", "Gemm") else ""


def _why_grids(file: OnnxFile, node: onnx.NodeProto) -> str:
    dequantizer = _dequantizer(file, node.input[0])
    assert dequantizer is not None, "inputs were checked before"
    if not input_name(dequantizer, 2):
        return "the grid in front of it leaves its zero point out"
    for output in node.output:
        for reader in file.consumers(output):
            if reader.op_type == "QuantizeLinear" and not _same_grid(file, dequantizer, reader):
                return "the grids in front of it and behind it differ"
    return ""


def _same_grid(file: OnnxFile, one: onnx.NodeProto, other: onnx.NodeProto) -> bool:
    pairs = [(file.constant(input_name(one, i)), file.constant(input_name(other, i))) for i in (1, 2)]
    return all(a is not None and b is not None and np.array_equal(a, b) for a, b in pairs)


def _why_bias(file: OnnxFile, node: onnx.NodeProto) -> str:
    name = input_name(node, 2)
    if node.op_type == "Gemm" and (attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0):
        return "its alpha or beta is not 1"
    if not name:
        return ""
    bias = _dequantizer(file, name)
    if bias is None:
        return "its bias is not quantized to int32"
    scales = [
        _scale(file, _dequantizer(file, input_name(node, 0))),
        _scale(file, _dequantizer(file, input_name(node, 1))),
    ]
    stored = _scale(file, bias)
    if node.op_type != "Conv" or stored is None or scales[0] is None or scales[1] is None:
        return ""
    expected = scales[0] * scales[1]
    refused = np.abs(stored - expected) > _BIAS_ABSOLUTE + _BIAS_RELATIVE * expected
    off = np.abs(stored / expected - 1).max()
    return f"its bias scale is {off:.1%} off input scale x weight scale" if refused.any() else ""


def _scale(file: OnnxFile, dequantizer: onnx.NodeProto | None) -> Array | None:
    if dequantizer is None:
        return None
    scale = file.constant(dequantizer.input[1])
    return None if scale is None else scale.ravel().astype(np.float64)
