"""LayerProduct: a convolution or linear layer as the matrix product that it is.

For each group g, with rows r (positions of the output) and columns k (input channels of the group times taps of the
kernel):

    y[g, r, o] = sum_k x[g, r, k] * w[g, o, k]        (+ bias)

A convolution's rows are unfolded from its padded input. A transposed one is a convolution of stride 1, with the kernel
turned around, of its input with stride - 1 zeros between elements and dilation * (kernel - 1) - padding around them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from fxquant.numerics.padded_convolution import PADDED_CONVOLUTION
from fxquant.ops._emit import argument

aten = torch.ops.aten
_CONVOLUTIONS = (aten.convolution.default, PADDED_CONVOLUTION)
CHUNK = 2**22  # elements of unfolded input that are held at a time: 16 MiB


@dataclass(frozen=True)
class LayerProduct:
    """The matrix product of the layer that `node` calls: linear, addmm or matmul with a weight, any convolution."""

    node: fx.Node

    @property
    def _is_convolution(self) -> bool:
        return self.node.target in _CONVOLUTIONS

    @property
    def groups(self) -> int:
        """How many products stand side by side."""
        return int(argument(self.node, "groups")) if self._is_convolution else 1

    @property
    def _is_transposed(self) -> bool:
        return self._is_convolution and bool(argument(self.node, "transposed"))

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """What has the weight's shape, as [groups, outputs, columns]."""
        if not self._is_convolution:
            rows = weight if self.node.target is aten.linear.default else weight.transpose(-1, -2)
            return rows.reshape(1, -1, rows.shape[-1])
        groups = self.groups
        split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        if self._is_transposed:
            split = split.transpose(1, 2).flip(tuple(range(3, split.ndim)))
        return split.reshape(groups, split.shape[1], -1)

    def weight(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse of `matrix`, for a weight of the shape of `like`."""
        if not self._is_convolution:
            rows = matrix.reshape(matrix.shape[1:])
            return (rows if self.node.target is aten.linear.default else rows.transpose(-1, -2)).reshape(like.shape)
        if not self._is_transposed:
            return matrix.reshape(like.shape)
        inside = like.shape[0] // self.groups
        split = matrix.reshape(self.groups, like.shape[1], inside, *like.shape[2:])
        return split.flip(tuple(range(3, split.ndim))).transpose(1, 2).reshape(like.shape)

    def rows(self, x: torch.Tensor, kernel: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """The input, float32 [groups, rows, columns], piece by piece.

        Arguments:
            x: what the layer reads.
            kernel: the shape of its weight.
        """
        if not self._is_convolution:
            flat = x.reshape(1, -1, x.shape[-1]).float()
            yield from torch.split(flat, max(CHUNK // max(x.shape[-1], 1), 1), dim=1)
            return
        for example in torch.split(x.float(), 1):
            yield from self._unfold(example, kernel[2:])

    def _unfold(self, x: torch.Tensor, kernel: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """The rows of one example: of all groups, or of so many at a time that they fit in a chunk."""
        stride, dilation = argument(self.node, "stride"), argument(self.node, "dilation")
        x = self._spread(x, kernel) if self._is_transposed else F.pad(x, pads_of(self.node, len(kernel)))
        for axis, size in enumerate(kernel):
            step = 1 if self._is_transposed else stride[axis]
            x = x.unfold(2 + axis, dilation[axis] * (size - 1) + 1, step)
            x = x[..., :: dilation[axis]]
        spatial = len(kernel)
        outer = x.shape[2 : 2 + spatial]
        split = x.reshape(self.groups, x.shape[1] // self.groups, *outer, *kernel)
        split = split.movedim(1, 1 + spatial)  # [groups, *outer, channels, *kernel]
        columns = split[0].numel() // max(outer.numel(), 1)
        lines = max(CHUNK // max(columns * self.groups * outer[1:].numel(), 1), 1)
        for piece in torch.split(split, lines, dim=1):
            yield piece.reshape(self.groups, -1, columns)

    def _spread(self, x: torch.Tensor, kernel: tuple[int, ...]) -> torch.Tensor:
        """A transposed convolution's input with zeros between and around its elements."""
        node, spatial = self.node, len(kernel)
        stride, dilation = argument(node, "stride"), argument(node, "dilation")
        padding, extra = argument(node, "padding"), argument(node, "output_padding")
        sizes = [(x.shape[2 + axis] - 1) * stride[axis] + 1 for axis in range(spatial)]
        spread = x.new_zeros(*x.shape[:2], *sizes)
        every = spread
        for axis, step in enumerate(stride):
            every = every[(slice(None),) * (2 + axis) + (slice(None, None, step),)]
        every.copy_(x)
        ends: list[int] = []
        for axis in reversed(range(spatial)):
            around = dilation[axis] * (kernel[axis] - 1) - padding[axis]
            ends += [around, around + extra[axis]]
        return F.pad(spread, ends)  # a negative end cuts off


def pads_of(node: fx.Node, spatial: int) -> list[int]:
    """The zeros around a convolution's input, as F.pad takes them: the last axis first."""
    padding: Any = list(argument(node, "padding"))
    begin, end = (padding[:spatial], padding[spatial:]) if node.target is PADDED_CONVOLUTION else (padding, padding)
    return [pad for axis in reversed(range(spatial)) for pad in (begin[axis], end[axis])]


class SecondMoment:
    """Sum of x^T x over all rows of a product's inputs: GPTQ's Hessian, but for a factor of 2.

    It says what any change d of a row of weights does to the output: the squared error is d G d^T.

    Attributes:
        total: float64 [groups, columns, columns]; None before any row was seen.
    """

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Count rows, float32 [groups, rows, columns]: multiplied in float32, summed in float64."""
        piece = torch.bmm(rows.transpose(1, 2), rows).double()
        self.total = piece if self.total is None else self.total.add_(piece)


def squared_errors(difference: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Squared error of each output channel, summed over all rows, float64 [groups, outputs]: d G d^T.

    `difference`: of the weight's matrix, [groups, outputs, columns].
    """
    wide = difference.double()
    return (torch.bmm(wide, moment) * wide).sum(-1).clamp(min=0.0)
