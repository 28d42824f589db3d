"""Learn whether each weight of a layer is rounded up or down, so that the layer's output stays as in float."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fxquant.graph.program import Program
from fxquant.graph.rewriter import Rewriter
from fxquant.ops.base import Role
from fxquant.reconstruction import Unit

from .layers import CONVOLUTIONS
from .quantized_layers import QuantizedLayer
from .rounding_run import LearnsRounding
from .values import role_of


@dataclass(frozen=True)
class AdaRound(LearnsRounding):
    """AdaRound (Nagel 2020, arXiv:2004.10568): layer by layer, in graph order, each on the inputs that the layers
    before it, already rounded, give; against the layer's output in float. Grids stay as calibrated; biases too.

    1. The activation behind a layer counts, if it alone reads the layer: what a relu cuts off may be wrong.
    2. Otherwise the layer's own output does.

    3. Where on the samples rounding to nearest is no worse, or on those that were held back (`check_every`) better by
       more than chance, that is kept (a near miss, with all errors): what few samples teach need not hold for others.
       Either way the weight lies on its grid, which is frozen.

    4. A convolution with a larger output than `positions` is compared at so many positions of each sample, drawn once:
       neighbours say nearly the same, and a step costs as much on the first maps as on the last. A depthwise one is
       compared everywhere if the windows of so many positions hold more numbers than its input.

    Declines, with the reason: what `quantized_layers` declines; a layer whose inputs and outputs have no common number
    of samples along axis 0, or sizes that differ from batch to batch. Contract: QUANTIZES.
    """

    name: ClassVar[str] = "adaround"

    def units(self, program: Program, rewriter: Rewriter, layers: Sequence[QuantizedLayer]) -> Iterable[Unit]:
        """One for each layer."""
        return [layer_unit(program, layer, self.positions) for layer in layers]


def layer_unit(program: Program, layer: QuantizedLayer, positions: int | None = None) -> Unit:
    """A layer with the activation that alone reads it (case 1), or without (case 2)."""
    output = layer.node
    readers = list(output.users)
    if len(readers) == 1 and role_of(program, readers[0]) is Role.ACTIVATION:
        output = readers[0]
    axis = 1 if layer.node.target in CONVOLUTIONS else -1
    return Unit(layer.node.name, (layer.quantizer,), (layer.input,), output, axis, positions)
