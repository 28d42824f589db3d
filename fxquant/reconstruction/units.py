"""Unit: a part of the graph that is reconstructed at once, a layer or a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxquant.graph.program import Program


@dataclass(frozen=True)
class Unit:
    """Values that come in, weights whose rounding is learned, and the one value that is to be as in float.

    Arguments:
        name: of the unit, for messages, files and its seed: a node's, or a module path.
        weights: the nodes that call the weights' FakeQuants, each read by one layer of the unit.
        inputs: values, known from the quantized program, that the unit reads from outside.
        output: the value that is compared with the float program's.
        channel_axis: of the output: squared errors are summed along it, and averaged over all else.
        positions: at how many positions of each sample the output is compared, where it is a layer whose output is
            larger and can be had at single positions; None: at all.
        sizes: nodes that give the number of samples, as reshapes read it: that of the samples at hand.
    """

    name: str
    weights: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    output: fx.Node
    channel_axis: int
    positions: int | None = None
    sizes: tuple[fx.Node, ...] = ()

    @property
    def is_layer(self) -> bool:
        """Whether it has one weight."""
        return len(self.weights) == 1

    @property
    def layer(self) -> fx.Node:
        """Of a unit with one weight, the layer that reads it."""
        return next(user for user in self.weights[0].users if user.args[1:2] == (self.weights[0],))


def weight_of(program: Program, quantizer: fx.Node) -> torch.Tensor:
    """The weight that a FakeQuant's node reads."""
    source = quantizer.args[0]
    assert isinstance(source, fx.Node)
    return program.tensor(source)
