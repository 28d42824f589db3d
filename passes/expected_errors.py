"""The mean error that a quantized weight makes at a layer's output, from the mean of what the layer reads.

    E[Wq x + b] - E[W x + b] = sum over inputs and taps (Wq - W) E[x]

(Nagel et al. 2019, arXiv:1906.04721, section 4.2.) The sum is the layer itself with the weight Wq - W, applied to an
input that is E[x] everywhere: so zero padding, groups, strides and transposed layers leave out at the borders what they
leave out in the network.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx

from fxquant.graph.program import Program, value_type
from fxquant.numerics.fake_quant import Mode

from .bias_layers import BiasedLayer
from .layers import CONVOLUTIONS, as_layer
from .moments import Moments
from .value_moments import Known


def expected_error(program: Program, reference: Program | None, layer: BiasedLayer, known: Known) -> torch.Tensor | str:
    """Of each output channel, float64; or why it is not known.

    Arguments:
        reference: has the layer's float weight; None: the program itself has.
        known: what is known of the layer's input.
    """
    if isinstance(known, str):
        return known
    if as_layer(layer.node) is None:
        return f"{layer.node.target} is no convolution or linear"
    error = weight_error(program, reference, layer)
    if isinstance(error, str):
        return error
    source = _constant_input(layer, known, error)
    if isinstance(source, str):
        return source
    called: Any = layer.node.target
    with torch.no_grad():
        output = called(source.to(error), error, None, *_geometry(layer, error))
    found: torch.Tensor = output.double().movedim(layer.axis, 0).flatten(1).mean(1)
    return found if bool(torch.isfinite(found).all()) else f"the mean of what {layer.node.name} reads is not finite"


def weight_error(program: Program, reference: Program | None, layer: BiasedLayer) -> torch.Tensor | str:
    """Wq - W of a layer; or why W is not known."""
    stored = layer.weight.args[0]
    assert isinstance(stored, fx.Node)
    if stored.op != "get_attr":
        return f"its weight is computed, by {stored.name}"
    weight = program.tensor(stored).detach()
    quantizer = copy.deepcopy(layer.weight_quant(program))  # a forward may write its grid anew
    with torch.no_grad():
        quantized: torch.Tensor = quantizer(weight)
    if reference is not None:
        return quantized - reference.tensor(reference.node(stored.name)).detach()
    if quantizer.mode is Mode.FROZEN and torch.equal(quantized, weight):
        return "its weight holds codes already, and what it was in float is not known: method 'empirical' measures"
    return quantized - weight


def _constant_input(layer: BiasedLayer, known: Moments, weight: torch.Tensor) -> torch.Tensor | str:
    """One example of the layer's input that is the mean of each channel everywhere."""
    found = value_type(layer.input)
    if found is None or known.axis != (1 if layer.node.target in CONVOLUTIONS else len(found.shape) - 1):
        return f"{layer.node.name} does not take its channels from where those of {layer.input.name} are"
    if layer.node.target not in CONVOLUTIONS:
        return known.mean[None]
    sizes: list[int] = [size for size in found.shape[2:] if isinstance(size, int)]
    if len(sizes) < len(found.shape) - 2:
        if _is_transposed(layer.node):
            return f"{layer.node.name} is transposed, and the size of {layer.input.name} is not known"
        sizes = _span(layer.node, weight)
    return known.mean.reshape(1, -1, *[1] * len(sizes)).expand(1, -1, *sizes)


def _is_transposed(node: fx.Node) -> bool:
    return bool(node.args[6])


def _span(node: fx.Node, weight: torch.Tensor) -> list[int]:
    """How many positions the kernel covers along each axis."""
    dilation: Any = node.args[5]
    return [step * (taps - 1) + 1 for step, taps in zip(dilation, weight.shape[2:], strict=True)]


def _geometry(layer: BiasedLayer, weight: torch.Tensor) -> list[Any]:
    """A convolution's arguments behind the bias; without padding where sizes are not known: borders do not count."""
    geometry: list[Any] = list(layer.node.args[3:])
    found = value_type(layer.input)
    assert found is not None
    if geometry and any(not isinstance(size, int) for size in found.shape[2:]):
        geometry[1] = [0] * len(geometry[1])
    return geometry
