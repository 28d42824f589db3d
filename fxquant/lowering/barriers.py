"""Where onnxruntime would silently rewrite a graph, and a barrier prevents it.

A barrier is a Max of one input: it computes nothing, and no transformer of onnxruntime 1.31.1 sees through it (an
Identity is removed). Each case was measured, onnxruntime at level ALL against none (test_barriers.py repeats it):

1. WeightBiasQuantization makes int8 of the float weight, and int32 of the float bias, of a layer between
   DequantizeLinear and QuantizeLinear: 10 % of the values moved. Barrier before the QuantizeLinear.
2. DequantizeLinear -> MatMul with a float input becomes MatMulNBits, which quantizes that input to 8 bits: all values
   moved. Barrier behind the DequantizeLinear.
3. DoubleQDQPairsRemover merges two quantizers in a row into one: 99 % of the values moved. Barrier between them.
"""

from __future__ import annotations

import torch
from torch import fx

from fxquant.graph.program import value_type
from fxquant.lowering.scene import Layer, Scene


def needs_barrier_before_quantizer(node: fx.Node, scene: Scene) -> bool:
    """Whether a barrier belongs before the QuantizeLinear of `node`, an activation's FakeQuant (cases 1 and 3)."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if scene.is_activation_quantizer(source):
        return not scene.encodings.encoding(source).same_grid(scene.encodings.encoding(node))
    layer = scene.layer(scene.origin(source))
    return layer is not None and scene.is_quantized(layer.x) and _has_float_parameter(layer, scene)


def needs_barrier_behind_weight(node: fx.Node, weight: fx.Node, scene: Scene) -> bool:
    """Whether a barrier belongs behind the DequantizeLinear of `weight`, which `node` reads (case 2)."""
    layer = scene.layer(node)
    if layer is None or layer.weight is not weight or not scene.is_quantizer(weight) or scene.is_quantized(layer.x):
        return False
    kind = value_type(node)
    is_gemm = node.target is torch.ops.aten.linear.default and kind is not None and len(kind.shape) == 2
    return not is_gemm and "MatMul" in _types(layer, scene)


def _has_float_parameter(layer: Layer, scene: Scene) -> bool:
    if not scene.is_quantizer(layer.weight):
        return True
    return layer.bias is not None and scene.program.bias_fake_quant(layer.bias) is None


def _types(layer: Layer, scene: Scene) -> tuple[str, ...]:
    definition = scene.definition(layer.node)
    assert definition is not None
    return definition.types_for(layer.node)
