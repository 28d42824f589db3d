"""What a layer of a random net is: a record that says which values it reads and how, and computes.

A value is numbered: the inputs of the net first, then what each layer gives, in order. Shapes are never stored: they
follow by running a record on tensors of the meta device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

Values: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class Layer:
    """One operation: `reads` are the numbers of the values that it reads."""

    reads: tuple[int, ...]

    def build(self, inputs: Values) -> nn.Module | None:
        """The module that holds its parameters, for inputs of these shapes (batch first); None if it has none."""
        return None

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """What it gives."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """What it counts as where programs are tallied by operation."""
        return type(self).__name__


@dataclass(frozen=True)
class Weights:
    """What a layer's parameters look like, beyond normal noise of standard deviation 1 / sqrt(products).

    Arguments:
        magnitude: power of ten that the weights are multiplied by.
        bias: power of ten that the biases are multiplied by; None: no bias.
        dead: so many output channels at the front have weights of zero.
        uneven: whether channel c is 10^(c mod 4) times smaller than channel 0.
        constant: whether all weights are one number.
    """

    magnitude: int = 0
    bias: int | None = 0
    dead: int = 0
    uneven: bool = False
    constant: bool = False

    def fill(self, module: nn.Module, generator: torch.Generator) -> None:
        """Fill `weight` (output channels first) and `bias` of a module."""
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        noise = torch.randn(weight.shape, generator=generator) / math.sqrt(max(1, weight[0].numel()))
        values = (torch.full_like(noise, 0.25) if self.constant else noise) * 10.0**self.magnitude
        if self.uneven:
            powers = torch.tensor([10.0 ** -(channel % 4) for channel in range(len(values))])
            values = values * powers.reshape(-1, *(1 for _ in values.shape[1:]))
        values[: self.dead] = 0
        weight.data.copy_(values)
        if isinstance(bias, Tensor) and self.bias is not None:
            bias.data.copy_(torch.randn(bias.shape, generator=generator) * 10.0**self.bias)


def channels_of(value: Tensor) -> int:
    """Size of axis 1."""
    return value.shape[1]
