"""The layers without parameters: arithmetic, activations, pools, and what moves values about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fuzz.layer import Layer, Values

UNARY: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "hardsigmoid": F.hardsigmoid,
    "neg": torch.neg,
    "abs": torch.abs,
    "elu": F.elu,
    "softplus": F.softplus,
    "square": torch.square,
}
PAIRS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "multiply": torch.mul,
    "subtract": torch.sub,
    "maximum": torch.maximum,
    "where": lambda x, y: torch.where(x > 0, x, y),
}
NumberOperation: TypeAlias = Literal["add", "multiply", "subtract", "reverse_subtract", "divide"]
_MAX_POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE_POOLS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_ADAPTIVE_POOLS = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


@dataclass(frozen=True)
class Unary(Layer):
    """An operation of UNARY."""

    how: str = "relu"

    @property
    def kind(self) -> str:
        """Its name in UNARY."""
        return self.how

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        return (UNARY[self.how](inputs[0]),)


@dataclass(frozen=True)
class Clamp(Layer):
    """Values held between two numbers; None leaves a side open."""

    low: float | None = 0.0
    high: float | None = None

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        return (torch.clamp(inputs[0], self.low, self.high),)


@dataclass(frozen=True)
class Softmax(Layer):
    """A softmax over one axis."""

    axis: int = -1

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        return (torch.softmax(inputs[0], self.axis),)


@dataclass(frozen=True)
class Pair(Layer):
    """An operation of PAIRS on two values whose shapes broadcast."""

    how: str = "add"

    @property
    def kind(self) -> str:
        """Its name in PAIRS."""
        return self.how

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        return (PAIRS[self.how](inputs[0], inputs[1]),)


@dataclass(frozen=True)
class WithNumber(Layer):
    """Arithmetic with a Python number, on either side."""

    how: NumberOperation = "add"
    number: float = 1.0

    @property
    def kind(self) -> str:
        """How the two are joined."""
        return f"{self.how} a number"

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        (x,) = inputs
        match self.how:
            case "add":
                return (x + self.number,)
            case "multiply":
                return (x * self.number,)
            case "subtract":
                return (x - self.number,)
            case "reverse_subtract":
                return (self.number - x,)
            case "divide":
                return (x / self.number,)


@dataclass(frozen=True)
class Product(Layer):
    """The matrix product of two values, the second transposed if that is said."""

    transposed: bool = True

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        x, y = inputs
        return (torch.matmul(x, y.transpose(-1, -2) if self.transposed else y),)


@dataclass(frozen=True)
class Attention(Layer):
    """scaled_dot_product_attention of query, key and value."""

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        query, key, value = inputs
        return (F.scaled_dot_product_attention(query, key, value),)


@dataclass(frozen=True)
class Pool(Layer):
    """A maximum or average pool over all axes behind the channels."""

    how: Literal["maximum", "average"] = "maximum"
    kernel: int = 2
    stride: int = 1
    padding: int = 0
    ceil_mode: bool = False
    count_padding: bool = True

    @property
    def kind(self) -> str:
        """Which pool."""
        return f"{self.how} pool"

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        (x,) = inputs
        axes = x.ndim - 3
        if self.how == "maximum":
            return (_MAX_POOLS[axes](x, self.kernel, self.stride, self.padding, ceil_mode=self.ceil_mode),)
        pool = _AVERAGE_POOLS[axes]
        return (pool(x, self.kernel, self.stride, self.padding, self.ceil_mode, self.count_padding),)


@dataclass(frozen=True)
class AdaptivePool(Layer):
    """An adaptive average pool to `size` along every axis behind the channels."""

    size: int = 1

    @property
    def kind(self) -> str:
        """Global or not."""
        return "global average pool" if self.size == 1 else "adaptive average pool"

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        (x,) = inputs
        return (_ADAPTIVE_POOLS[x.ndim - 3](x, self.size),)


@dataclass(frozen=True)
class Mean(Layer):
    """The mean over some axes."""

    axes: tuple[int, ...] = (-1,)
    keep: bool = False

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        return (inputs[0].mean(self.axes, keepdim=self.keep),)


@dataclass(frozen=True)
class Concat(Layer):
    """Values joined along an axis; a value may occur twice."""

    axis: int = 1

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        return (torch.cat(inputs, self.axis),)


@dataclass(frozen=True)
class Split(Layer):
    """A value cut in two behind `first` indices of an axis; chunk instead of split where that cuts alike."""

    axis: int = 1
    first: int = 1
    chunk: bool = False

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        (x,) = inputs
        size = x.shape[self.axis]
        parts = x.chunk(2, self.axis) if self.chunk else torch.split(x, [self.first, size - self.first], self.axis)
        return tuple(parts)


@dataclass(frozen=True)
class Slice(Layer):
    """Indices `start` to `stop` of an axis, each `step`-th."""

    axis: int = 1
    start: int = 0
    stop: int = 1
    step: int = 1

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        (x,) = inputs
        return (x[(slice(None),) * self.axis + (slice(self.start, self.stop, self.step),)],)


@dataclass(frozen=True)
class Permute(Layer):
    """Axes in another order; two of them swapped by transpose."""

    order: tuple[int, ...] = (0,)
    by_transpose: bool = False

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        (x,) = inputs
        return (x.transpose(self.order[0], self.order[1]) if self.by_transpose else x.permute(self.order),)


@dataclass(frozen=True)
class Flatten(Layer):
    """All axes from `start` on as one."""

    start: int = 1

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        return (inputs[0].flatten(self.start),)


@dataclass(frozen=True)
class Unflatten(Layer):
    """One axis as two, the first of them of `size`; by reshape."""

    axis: int = 1
    size: int = 1

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        (x,) = inputs
        sizes = [*x.shape[: self.axis], self.size, x.shape[self.axis] // self.size, *x.shape[self.axis + 1 :]]
        return (x.reshape([-1, *sizes[1:]]),)


@dataclass(frozen=True)
class Interpolate(Layer):
    """A value of rank 4 enlarged."""

    how: Literal["nearest", "bilinear"] = "nearest"
    factor: int = 2
    align_corners: bool = False

    @property
    def kind(self) -> str:
        """Which interpolation."""
        return f"interpolate {self.how}"

    def run(self, inputs: Values, module: nn.Module | None) -> Values:
        """See Layer.run."""
        corners = self.align_corners if self.how == "bilinear" else None
        return (F.interpolate(inputs[0], scale_factor=self.factor, mode=self.how, align_corners=corners),)
