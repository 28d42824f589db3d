"""What onnxruntime (x64) would compute differently, or refuse, without saying where: refused here, by name.

Each guard looks at one node and returns what is wrong with it, or None. What can be prevented is (barriers.py).
Measured on onnxruntime 1.31.1; tests/lowering/test_guards.py shows, for each, the wrong answer or the refusal.
Programs for other targets are not guarded, and their files say that they are not certified on onnxruntime.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from fxquant.errors import ExportError
from fxquant.graph.program import describe, value_type
from fxquant.lowering.encodings import Array
from fxquant.lowering.scene import Layer, Scene
from fxquant.ops.base import Role
from fxquant.ops.kernels import KERNEL_BITS
from fxquant.spec import Encoding

LARGEST_ACCUMULATOR = 2**31 - 1


@dataclass(frozen=True)
class Finding:
    """What is wrong with a node, and what to do about it."""

    reason: str
    remedy: str


Guard = Callable[[fx.Node, Scene], Finding | None]


def run_guards(scene: Scene) -> None:
    """Raise ExportError for the first node that a guard finds fault with; it names the others too."""
    found = [
        (node, hit) for node in scene.program.graph.nodes for guard in GUARDS if (hit := guard(node, scene)) is not None
    ]
    if not found:
        return
    node, first = found[0]
    others = list(dict.fromkeys(other.name for other, _ in found[1:]))
    more = f" Nodes with faults besides: {', '.join(others)}." if others else ""
    raise ExportError(
        f"export: onnxruntime would not compute what node '{node.name}' computes",
        place=describe(node),
        got=first.reason,
        remedy=first.remedy + more,
    )


def weight_axis(node: fx.Node, scene: Scene) -> Finding | None:
    """A weight quantized along an axis that is not its output channels': onnxruntime ignores the axis (60 steps)."""
    found = _integer_layer(node, scene)
    if found is None or not scene.is_quantizer(found.layer.weight):
        return None  # per_channel_operand finds what a transposition hides
    layer, axis = found.layer, found.weight.spec.granularity.axis
    kind = value_type(layer.weight)
    if not found.weight.scale.ndim or axis is None or kind is None or axis % len(kind.shape) == layer.channel_axis:
        return None
    return Finding(
        f"its weight '{layer.weight.name}' has a scale for each index of axis {axis}, and onnxruntime reads scales "
        f"along axis {layer.channel_axis}, whatever the file says",
        f"Quantize that weight per channel along axis {layer.channel_axis} (pass 'select-per-channel'), or per tensor.",
    )


def bias_scale(node: fx.Node, scene: Scene) -> Finding | None:
    """A bias whose scale is not the layer's own input's times weight's: onnxruntime ignores it.

    QLinearConv tolerates 1 % and runs in float beyond, QGemm does not look: a quarter of the codes wrong at 1 %, all
    at 50 %.
    """
    found = _integer_layer(node, scene)
    layer = None if found is None else found.layer
    if found is None or layer is None or layer.bias is None or scene.program.bias_fake_quant(layer.bias) is None:
        return None
    if found.x.scale.ndim:
        return None  # per_channel_activation has found that
    wanted = found.x.scale * found.weight.scale
    given = scene.encodings.encoding(layer.bias).scale
    if given.shape == wanted.shape and torch.equal(given, wanted):
        return None
    named = ", ".join(str(arg) for arg in layer.bias.args[1:])
    return Finding(
        f"the scale of its bias '{layer.bias.name}' comes from {named}, and the layer reads {layer.x.name} and "
        f"{layer.weight.name}",
        "Run 'quantize-bias' after the last pass that changes what layers read.",
    )


def per_channel_activation(node: fx.Node, scene: Scene) -> Finding | None:
    """Integer kernels take one scale for an activation; onnxruntime fuses several, and fails when it runs."""
    if not scene.is_activation_quantizer(node) or not scene.encodings.encoding(node).scale.ndim:
        return None
    return Finding(
        f"value '{node.args[0]}' is an activation with a scale for each channel", "Quantize activations per tensor."
    )


def per_channel_operand(node: fx.Node, scene: Scene) -> Finding | None:
    """A constant with several scales that is not itself a layer's weight or bias.

    onnxruntime refuses the fused kernel when it runs, or, behind a transposition, takes its scales for those of the
    output channels (95 % wrong codes).
    """
    if scene.role(node) not in (Role.WEIGHTED, Role.COMPUTE, Role.CONCAT):
        return None
    layer = scene.layer(node)
    own = () if layer is None else (layer.weight, layer.bias)
    sources = [(source, scene.quantizer_of(source)) for source in node.all_input_nodes]
    if any(quantizer is None for source, quantizer in sources if layer is None or source is not layer.bias):
        return None  # a float island
    for source, quantizer in sources:
        if quantizer is None or (quantizer is source and source in own):
            continue
        if scene.encodings.is_constant_quantizer(quantizer) and scene.encodings.encoding(quantizer).scale.ndim:
            return Finding(
                f"its operand '{source.name}' is a constant with a scale for each {_part(quantizer, scene)}",
                "Quantize that operand per tensor, or quantize what is computed from it (pass 'fold-constants').",
            )
    return None


def _part(quantizer: fx.Node, scene: Scene) -> str:
    return "channel" if scene.encodings.encoding(quantizer).spec.granularity.block is None else "block"


def signed_activation(node: fx.Node, scene: Scene) -> Finding | None:
    """QDQS8ToU8Transformer turns some of the s8 activations into u8, and residual graphs drop to float."""
    if not scene.is_activation_quantizer(node):
        return None
    spec = scene.encodings.encoding(node).spec
    if not spec.signed or spec.bits > KERNEL_BITS:
        return None
    return Finding(
        f"value '{node.args[0]}' is a signed activation ({spec}), which onnxruntime on x64 rewrites to unsigned in "
        "part of a graph",
        "Quantize activations unsigned and asymmetric: the same values, shifted by 128 codes.",
    )


def two_grids(node: fx.Node, scene: Scene) -> Finding | None:
    """A value with two different quantizers: no kernel can write both."""
    quantizers = [user for user in node.users if scene.is_activation_quantizer(user) and user.args[0] is node]
    if len(quantizers) < 2:
        return None
    grids = [scene.encodings.encoding(user) for user in quantizers]
    if all(grids[0].same_grid(other) for other in grids[1:]):
        return None
    names = ", ".join(user.name for user in quantizers)
    return Finding(
        f"its value has {len(quantizers)} different grids ({names})",
        "Let its consumers agree on one spec, or leave one of them in float.",
    )


def accumulator(node: fx.Node, scene: Scene) -> Finding | None:
    """A sum of products that may exceed int32: onnxruntime wraps around silently."""
    found = _integer_layer(node, scene)
    largest = _largest_product(node, scene) if found is None else _largest_sum(found, scene)
    if largest is None or largest <= LARGEST_ACCUMULATOR:
        return None
    return Finding(
        f"its int32 accumulator may reach {largest:.4g}, beyond {LARGEST_ACCUMULATOR}",
        "Quantize its weight to fewer bits, raise its weight's scale (a large bias needs it; where training moved the "
        "bias after encodings were frozen, freeze them later), or leave it in float.",
    )


GUARDS: tuple[Guard, ...] = (
    weight_axis,
    bias_scale,
    per_channel_activation,
    per_channel_operand,
    signed_activation,
    two_grids,
    accumulator,
)


@dataclass(frozen=True)
class _IntegerLayer:
    """A layer that onnxruntime runs on integers, and the grids of its input and weight."""

    layer: Layer
    x: Encoding
    weight: Encoding


def _integer_layer(node: fx.Node, scene: Scene) -> _IntegerLayer | None:
    """`node` as a layer with quantized input and constant weight (perhaps transposed) of at most 8 bits; else None.

    A weight in blocks makes none.
    """
    layer = scene.layer(node)
    if layer is None or layer.role is not Role.WEIGHTED:
        return None
    x, weight = scene.quantizer_of(layer.x), scene.quantizer_of(layer.weight)
    if x is None or weight is None or not scene.encodings.is_constant_quantizer(weight):
        return None
    found = _IntegerLayer(layer, scene.encodings.encoding(x), scene.encodings.encoding(weight))
    is_in_blocks = found.weight.spec.granularity.block is not None  # it is kept in float (barriers)
    return found if max(found.x.spec.bits, found.weight.spec.bits) <= KERNEL_BITS and not is_in_blocks else None


def _span(encoding: Encoding) -> tuple[int, int]:
    """Lowest and highest code minus zero point."""
    return encoding.spec.qmin - int(encoding.zero_point.max()), encoding.spec.qmax - int(encoding.zero_point.min())


def _largest_sum(found: _IntegerLayer, scene: Scene) -> int:
    """Largest magnitude of the accumulator over all channels and inputs on the grid, or a loose bound that suffices."""
    layer = found.layer
    low, high = _span(found.x)
    bias: Array = np.zeros(1, dtype=np.int64)
    if layer.bias is not None and scene.program.bias_fake_quant(layer.bias) is not None:
        bias = scene.encodings.stored(layer.bias).codes.astype(np.int64)
    loose = _products(layer) * max(-low, high) * found.weight.spec.steps + int(np.abs(bias).max(initial=0))
    if loose <= LARGEST_ACCUMULATOR or not scene.is_quantizer(layer.weight):
        return loose  # whatever the weights are
    weight = _centred_codes(layer, scene)
    positive, negative = np.clip(weight, 0, None).sum(axis=1), np.clip(weight, None, 0).sum(axis=1)
    above = positive * high + negative * low + np.clip(bias, 0, None)
    below = positive * low + negative * high + np.clip(bias, None, 0)
    return int(max(above.max(initial=0), -below.min(initial=0)))


def _products(layer: Layer) -> int:
    """How many products one accumulator sums up."""
    kind = value_type(layer.weight)
    assert kind is not None
    shape = [size for size in kind.shape if isinstance(size, int)]
    return math.prod(shape) // max(shape[layer.channel_axis], 1)


def _centred_codes(layer: Layer, scene: Scene) -> Array:
    """Weight codes minus zero points, int64, of shape [output channels, products]."""
    stored = scene.encodings.stored(layer.weight)
    zero = stored.zero_point.astype(np.int64)
    if stored.axis is not None:
        shape = [1] * stored.codes.ndim
        shape[stored.axis] = -1
        zero = zero.reshape(shape)
    centred: Array = np.moveaxis(stored.codes.astype(np.int64) - zero, layer.channel_axis, 0)
    return centred.reshape(len(centred), -1)


def _largest_product(node: fx.Node, scene: Scene) -> int | None:
    """Largest magnitude of a product of two activations: K * max|a| * max|b|."""
    definition = scene.definition(node)
    if (
        definition is None
        or definition.role_for(node) is not Role.COMPUTE
        or "MatMul" not in definition.types_for(node)
    ):
        return None
    factors = [arg for arg in node.args[:2] if isinstance(arg, fx.Node)]
    sources = [scene.quantizer_of(factor) for factor in factors]
    kind = value_type(factors[0])
    if kind is None or any(source is None for source in sources):
        return None
    grids = [scene.encodings.encoding(source) for source in sources if source is not None]
    length = kind.shape[-1]
    if not isinstance(length, int) or any(grid.spec.bits > KERNEL_BITS for grid in grids):
        return None
    reach = [max(-low, high) for low, high in map(_span, grids)]
    return length * reach[0] * reach[1]
