"""Where onnxruntime would silently rewrite a graph, and a barrier prevents it.

A barrier is a Max of one input: it computes nothing, and no transformer of onnxruntime 1.31.1 sees through it (an
Identity is removed). What is asked is asked of the ONNX nodes as they are written, because what rewrites them sees no
others: dropout is an Identity there, a quantizer that is off is nothing. Each case was measured, onnxruntime at level
ALL against none (tests/lowering/test_barriers.py repeats it):

1. WeightBiasQuantization makes int8 of the float weight, and int32 of the float bias, of a layer between
   DequantizeLinear and QuantizeLinear: 10 to 40 % of the codes moved. The layer may be reached through what is folded
   into it first (a pad in front; a product, sum or batch norm with constants behind), and through what the codes are
   moved across (Reshape, MaxPool ...). Barrier before the QuantizeLinear.
2. DequantizeLinear -> MatMul, or Gemm without transB, with a float input becomes MatMulNBits, which quantizes that
   input to 8 bits: all values moved. An input on a grid counts as float behind an operation that onnxruntime does not
   move codes across (Gather, Flatten, Relu ...). Barrier behind the DequantizeLinear.
3. DoubleQDQPairsRemover merges two quantizers in a row into one, also where what lay between them vanished (Identity,
   sums with 0, transpositions that cancel): 99 % of the values moved. Barrier between them.
4. Integer kernels that overflow on the grids that they are given (Kernel.overflows). QLinearSoftmax multiplies
   exponentials of up to FLT_MAX / (e^5 length) by floor(1 / output scale): where that exceeds e^5 length (near-uniform
   attention, whose grid is fine) codes are up to 255 off. QLinearAdd and QLinearMul convert to int32 before they
   saturate: beyond 2^31 steps of the output the lowest code comes out instead of the highest. QLinearGlobalAveragePool
   does not run outside a range of its multiplier. Barrier before the QuantizeLinear, so that they run in float.
5. PadFusion makes a Pad with zeros part of the pool behind it. A MaxPool then pads with -inf (half of the values wrong
   where they are negative), a padded AveragePool in ceil mode gets another shape, and one without becomes an integer
   kernel that no program says. Barrier before the pool.
6. A weight dequantized in blocks (8-bit codes, grids around the layer) is fused into QLinearConv, QLinearMatMul or
   MatMulIntegerToFloat all the same, which then fail when they run, as they take one scale for a channel. (4-bit
   element types and Gemm are not fused.) Barrier behind the DequantizeLinear, which keeps the layer in float.

A barrier where none is needed costs one Max: what is looked through here runs in float in any case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from torch import fx

from fxquant.graph.program import input_slots, value_type
from fxquant.lowering.scene import Scene
from fxquant.numerics.codes import Grid
from fxquant.ops.base import Role
from fxquant.spec import Encoding

_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_PRODUCTS = frozenset({"MatMul", "Gemm"})
_TAKES_BLOCKS = frozenset({"Conv", "MatMul"})
_POOLS = frozenset({"MaxPool", "AveragePool"})
_FOLDED = frozenset({"Add", "Sub", "Mul", "Div", "BatchNormalization"})  # with constants, into the layer in front
_REMOVED = frozenset({"Identity", "Dropout", "Cast"})
_MOVED_ACROSS = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice"})  # DequantizeLinear is
_VANISHING = _REMOVED | _MOVED_ACROSS | _FOLDED | {"Expand", "Flatten", "Gather"}


def needs_barrier_before_quantizer(real: ir.Value, grid: Sequence[ir.Value], node: fx.Node, scene: Scene) -> bool:
    """Whether a barrier belongs before the QuantizeLinear of an activation's FakeQuant (cases 1, 3 and 4).

    Arguments:
        real: what it will read.
        grid: its scale and zero point, initializers.
        node: the FakeQuant node.
        scene: its program.
    """
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return (
        _shows_float_parameter(real)
        or _repeats_quantizer(real, grid)
        or _overflows(source, scene.encodings.encoding(node), scene)
    )


def input_to_guard(node: ir.Node) -> int | None:
    """Which input of an ONNX node a barrier belongs before (cases 2, 5 and 6); None for most."""
    if node.op_type in _PRODUCTS and _reads_weight_alone(node):
        return 1
    if node.op_type in _TAKES_BLOCKS and _reads_blocks(node):
        return 1
    if node.op_type in _POOLS and _is_padded(node.inputs[0]):
        return 0
    return None


def _reads_weight_alone(product: ir.Node) -> bool:
    """Case 2."""
    transposed = product.attributes.get("transB")
    if transposed is not None and transposed.as_int():
        return False
    left, right = product.inputs[:2]
    weight = _dequantizer(right, _REMOVED | {"Transpose"})
    if weight is None or weight.inputs[0] is None or weight.inputs[0].const_value is None:
        return False
    return _dequantizer(left, _REMOVED | _MOVED_ACROSS) is None


def _reads_blocks(layer: ir.Node) -> bool:
    """Case 6."""
    weight = _dequantizer(layer.inputs[1], _REMOVED | _MOVED_ACROSS)
    return weight is not None and "block_size" in weight.attributes


def _shows_float_parameter(real: ir.Value) -> bool:
    """Case 1: a layer with a parameter in float, its input on a grid, is what `real` comes from."""
    is_found = False
    for node in _chain(real):
        if node.op_type in _LAYERS:
            return (is_found or any(map(_is_float_constant, node.inputs[1:]))) and _is_on_grid(node.inputs[0])
        is_found = is_found or (node.op_type in _FOLDED and any(map(_is_float_constant, node.inputs)))
    return False


def _is_padded(value: ir.Value | None) -> bool:
    """Case 5."""
    types = (node.op_type for node in _chain(value) if node.op_type not in _REMOVED)
    return next(types, "") == "Pad"


def _is_on_grid(value: ir.Value | None) -> bool:
    """Whether `value` is dequantized codes, but for operations that may be folded into the layer behind (a Pad)."""
    for node in _chain(value):
        if node.op_type in _LAYERS:
            return False
        if node.op_type == "DequantizeLinear":
            return True
    return False


def _repeats_quantizer(real: ir.Value, grid: Sequence[ir.Value]) -> bool:
    """Case 3: `real` is on another grid already."""
    found = _dequantizer(real, _VANISHING)
    return found is not None and not all(map(_is_same_constant, found.inputs[1:], grid))


def _overflows(node: fx.Node, encoding: Encoding, scene: Scene) -> bool:
    """Case 4."""
    while scene.role(node) is Role.ACTIVATION and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    definition = scene.definition(node)
    if definition is None or definition.kernel is None:
        return False
    sources = [source for source in input_slots(node) if (kind := value_type(source)) is not None and kind.is_float]
    quantizers = [scene.quantizer_of(source) for source in sources]
    operands = [None if found is None else _grid(scene.encodings.encoding(found)) for found in quantizers]
    return bool(definition.kernel.why_overflow(node, operands, _grid(encoding)))


def _grid(encoding: Encoding) -> Grid:
    return Grid(encoding.scale, encoding.zero_point, encoding.spec.qmin, encoding.spec.qmax)


def _dequantizer(value: ir.Value | None, through: frozenset[str]) -> ir.Node | None:
    """The DequantizeLinear that `value` comes from, perhaps through operations of the types `through`."""
    for node in _chain(value):
        if node.op_type == "DequantizeLinear":
            return node
        if node.op_type not in through:
            return None
    return None


def _chain(value: ir.Value | None) -> Iterator[ir.Node]:
    """The nodes that `value` comes from, the last one first: to a DequantizeLinear, or to what has several inputs."""
    while value is not None and (node := value.producer()) is not None:
        yield node
        if node.op_type == "DequantizeLinear":
            return
        varying = [item for item in node.inputs if item is not None and item.const_value is None]
        if len(varying) != 1 and node.op_type not in _MOVED_ACROSS | {"Expand"}:  # whose others are sizes
            return
        value = node.inputs[0] if len(varying) != 1 else varying[0]


def _is_float_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.const_value.dtype.is_floating_point()


def _is_same_constant(one: ir.Value | None, other: ir.Value) -> bool:
    if one is None or one.const_value is None or other.const_value is None:
        return False
    return np.array_equal(one.const_value.numpy(), other.const_value.numpy())
