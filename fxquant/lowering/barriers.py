"""Where onnxruntime would silently rewrite a graph, and a barrier prevents it.

A barrier is a Max of one input: it computes nothing, and no transformer of onnxruntime 1.31.1 sees through it (an
Identity is removed). Each case was measured, onnxruntime at level ALL against none (test_barriers.py repeats it):

1. WeightBiasQuantization makes int8 of the float weight, and int32 of the float bias, of a layer between
   DequantizeLinear and QuantizeLinear: 10 % of the values moved. Barrier before the QuantizeLinear.
2. DequantizeLinear -> MatMul with a float input becomes MatMulNBits, which quantizes that input to 8 bits: all values
   moved. Barrier behind the DequantizeLinear.
3. DoubleQDQPairsRemover merges two quantizers in a row into one: 99 % of the values moved. Barrier between them.
4. QLinearSoftmax multiplies exponentials of up to FLT_MAX / (e^5 length) by floor(1 / output scale): where that exceeds
   e^5 length (near-uniform attention, whose grid is fine) it overflows, and codes are up to 255 off. Barrier before the
   QuantizeLinear, so that the softmax runs in float.
"""

from __future__ import annotations

import math

import onnx_ir as ir
from torch import fx

from fxquant.graph.program import value_type
from fxquant.lowering.scene import Layer, Scene
from fxquant.spec import Encoding

SOFTMAX_HEADROOM = 0.99 * math.exp(5.0)  # times length: largest 1 / output scale of QLinearSoftmax
SHORTEST_SYMBOLIC = 2  # capture takes a symbolic size to be above 1
_REARRANGE = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Expand", "Gather"})


def needs_barrier_before_quantizer(node: fx.Node, scene: Scene) -> bool:
    """Whether a barrier belongs before the QuantizeLinear of `node`, an activation's FakeQuant (cases 1, 3 and 4)."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if scene.is_activation_quantizer(source):
        return not scene.encodings.encoding(source).same_grid(scene.encodings.encoding(node))
    if _overflows_in_softmax(source, scene.encodings.encoding(node), scene):
        return True
    layer = scene.layer(scene.origin(source))
    return layer is not None and scene.is_quantized(layer.x) and _has_float_parameter(layer, scene)


def needs_barrier_behind_weight(product: ir.Node) -> bool:
    """Whether a barrier belongs before the second input of an ONNX node, because it is a product of case 2."""
    if product.op_type != "MatMul":
        return False
    left, right = product.inputs
    return _is_dequantized_constant(right) and not _is_dequantized(left)


def _overflows_in_softmax(node: fx.Node, encoding: Encoding, scene: Scene) -> bool:
    """Case 4; a length that is not known now may be the shortest."""
    definition = scene.definition(node)
    if definition is None or "Softmax" not in definition.types_for(node):
        return False
    x, axis, kind = node.args[0], node.args[1], value_type(node)
    assert isinstance(x, fx.Node) and isinstance(axis, int) and kind is not None
    if not kind.shape or not scene.is_quantized(x):
        return False
    length = kind.shape[axis]
    known = length if isinstance(length, int) else SHORTEST_SYMBOLIC
    return 1.0 / float(encoding.scale) > SOFTMAX_HEADROOM * known


def _is_dequantized_constant(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    codes = None if producer is None or producer.op_type != "DequantizeLinear" else producer.inputs[0]
    return codes is not None and codes.const_value is not None


def _is_dequantized(value: ir.Value | None) -> bool:
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type not in _REARRANGE:
            return producer.op_type == "DequantizeLinear"
        value = producer.inputs[0]
    return False


def _has_float_parameter(layer: Layer, scene: Scene) -> bool:
    if not scene.is_quantizer(layer.weight):
        return True
    return layer.bias is not None and scene.program.bias_fake_quant(layer.bias) is None
