"""Estimator: sees tensors, and says which range [low, high] a grid should cover.

Buffers have the encoding's shape (Granularity.encoding_shape), so that they move and save with the module. Estimators
work on rows: a tensor [encodings, elements], one row for each encoding.
"""

from __future__ import annotations

import torch
from torch import nn

from fxquant.numerics.peers import Peers
from fxquant.spec import Granularity, QuantSpec


class Estimator(nn.Module):
    """Base of the estimators.

    Buffers: `low` and `high` (float32), what `observe` has seen so far; inf and -inf before anything was seen.

    Arguments:
        spec: the grid that the range is for.
        shape: the encoding's shape.
        number: the number in the estimator's brackets, or its default; None if it takes none.

    With `peers`, what all processes see counts as one tensor: `observe` and `range` are collective then.
    """

    low: torch.Tensor
    high: torch.Tensor
    peers: Peers | None = None

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...] = (), number: float | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.number = number
        self.register_buffer("low", torch.full(shape, float("inf")))
        self.register_buffer("high", torch.full(shape, float("-inf")))

    @property
    def has_range(self) -> bool:
        """Whether anything was observed, for every encoding."""
        return bool((self.low <= self.high).all())

    def reset(self) -> None:
        """Forget everything observed."""
        self.low.fill_(float("inf"))
        self.high.fill_(float("-inf"))

    def observe(self, x: torch.Tensor) -> None:
        """Take a tensor into account; empty tensors say nothing."""
        seen = seen_by_all(x, self.spec.granularity, self.low.shape, self.peers)
        if seen is not None:
            self.update(*seen)

    def update(self, rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        """Take one tensor into account: its rows, and their extremes in the encoding's shape."""
        raise AssertionError("abstract")

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Low and high (float32, of the encoding's shape) of the range that the grid should cover."""
        return self.low, self.high

    def range_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The range of `x` by itself; everything observed before is forgotten."""
        self.reset()
        self.observe(x)
        return self.range()


def rows_of(x: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """`x` as [encodings, elements], encodings in the order of the flattened encoding."""
    if granularity.axis is None:
        return x.reshape(1, -1)
    axis = granularity.axis % x.ndim
    if granularity.block is None:
        return x.movedim(axis, 0).reshape(x.shape[axis], -1)
    blocks = x.reshape(*x.shape[:axis], -1, granularity.block, *x.shape[axis + 1 :])
    return blocks.movedim(axis + 1, -1).reshape(-1, granularity.block)


def extremes(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest value of each row, [encodings]; NaN where there is one."""
    if len(rows) > 1:
        return rows.amin(dim=1), rows.amax(dim=1)  # torch.aminmax along an axis takes twenty times as long
    low, high = torch.aminmax(rows)
    return low[None], high[None]


def seen_by_all(
    x: torch.Tensor, granularity: Granularity, shape: torch.Size, peers: Peers | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The rows of `x`, and the extremes (of `shape`) of what it and the peers' tensors hold; None if all are empty."""
    if peers is None and x.numel() == 0:
        return None
    if x.numel():
        rows = rows_of(x.detach().to(torch.float32), granularity)
        low, high = extremes(rows)
    else:
        rows = x.new_empty(shape.numel(), 0, dtype=torch.float32)
        low, high = (rows.new_full((len(rows),), end) for end in (float("inf"), float("-inf")))
    if peers is not None:
        low, high = peers.extremes(low, high)
        if bool((low > high).any()):
            return None
    return rows, low.view(shape), high.view(shape)


class MinMax(Estimator):
    """The lowest and highest value ever seen."""

    def update(self, rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        """Widen the range."""
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))


class MovingAverage(Estimator):
    """Moving average of each tensor's extremes: m <- m + momentum * (new - m), started at the first tensor's."""

    def update(self, rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        """Move the range towards the new extremes."""
        assert self.number is not None
        first = self.low > self.high
        self.low.copy_(torch.where(first, low, self.low + self.number * (low - self.low)))
        self.high.copy_(torch.where(first, high, self.high + self.number * (high - self.high)))
