"""The layers with parameters: convolutions, linear layers, normalisation, and parameters as operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fuzz.layer import Layer, Values, Weights, channels_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Convolution(Layer):
    """A convolution over all axes behind the channels; where `before` and `after` differ, F.pad pads in front of it."""

    channels: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    before: int = 0
    after: int = 0
    weights: Weights = Weights()

    @property
    def kind(self) -> str:
        """Convolution; by what makes its kernel another one."""
        return "Convolution" if self.groups == 1 else "Convolution (groups)"

    def build(self, inputs: Values) -> nn.Module:
        """A Conv1d, Conv2d or Conv3d."""
        (x,) = inputs
        return _CONVOLUTIONS[x.ndim - 3](
            channels_of(x),
            self.channels,
            self.kernel,
            stride=self.stride,
            padding=self.before if self.before == self.after else 0,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.weights.bias is not None,
        )

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        (x,) = inputs
        assert module is not None
        if self.before != self.after:
            x = F.pad(x, [self.before, self.after] * (x.ndim - 2))
        return (module(x),)


@dataclass(frozen=True)
class TransposedConvolution(Layer):
    """A transposed convolution over one or two axes."""

    channels: int
    kernel: int = 2
    stride: int = 1
    weights: Weights = Weights()

    def build(self, inputs: Values) -> nn.Module:
        """A ConvTranspose1d or ConvTranspose2d."""
        (x,) = inputs
        bias = self.weights.bias is not None
        return _TRANSPOSED[x.ndim - 3](channels_of(x), self.channels, self.kernel, stride=self.stride, bias=bias)

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        assert module is not None
        return (module(inputs[0]),)


@dataclass(frozen=True)
class Linear(Layer):
    """A linear layer on the last axis."""

    features: int
    weights: Weights = Weights()

    def build(self, inputs: Values) -> nn.Module:
        """An nn.Linear."""
        return nn.Linear(inputs[0].shape[-1], self.features, bias=self.weights.bias is not None)

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        assert module is not None
        return (module(inputs[0]),)


@dataclass(frozen=True)
class Again(Layer):
    """The layer number `layer` once more, with the same weights, on another value."""

    layer: int


@dataclass(frozen=True)
class BatchNorm(Layer):
    """A batch norm in eval mode, whose statistics and factors are not those that it is born with."""

    weights: Weights = Weights()

    def build(self, inputs: Values) -> nn.Module:
        """A BatchNorm1d, 2d or 3d."""
        (x,) = inputs
        return _NORMS[x.ndim - 2](channels_of(x)).eval()

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        assert module is not None
        return (module(inputs[0]),)


@dataclass(frozen=True)
class LayerNorm(Layer):
    """A layer norm over the last axis."""

    weights: Weights = Weights()

    def build(self, inputs: Values) -> nn.Module:
        """An nn.LayerNorm."""
        return nn.LayerNorm(inputs[0].shape[-1])

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        assert module is not None
        return (module(inputs[0]),)


class Operand(nn.Module):
    """A parameter `weight`, or a bool buffer `mask`, that broadcasts over the batch."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))
        self.bias = None
        self.register_buffer("mask", torch.zeros(shape, dtype=torch.bool))


@dataclass(frozen=True)
class WithParameter(Layer):
    """The sum or product with a parameter of one number a channel; or a choice by a constant mask between both."""

    how: Literal["add", "multiply", "where"] = "add"
    weights: Weights = Weights()

    @property
    def kind(self) -> str:
        """How the two are joined."""
        return f"{self.how} a parameter"

    def build(self, inputs: Values) -> nn.Module:
        """An Operand of shape [channels, 1, ...]."""
        (x,) = inputs
        return Operand(torch.Size((channels_of(x), *(1 for _ in x.shape[2:]))))

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        (x,) = inputs
        assert isinstance(module, Operand) and isinstance(module.mask, Tensor)
        if self.how == "where":
            return (torch.where(module.mask, x, module.weight),)
        return (x + module.weight if self.how == "add" else x * module.weight,)
