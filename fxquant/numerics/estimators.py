"""Range estimators: they see tensors, and say which range [low, high] a grid should cover.

An estimator keeps running statistics of shape () or (channels,) in buffers, so that they move and save with the module.
"""

from __future__ import annotations

import torch
from torch import nn

from fxquant.errors import SpecError, nearest
from fxquant.spec import Granularity


class Estimator(nn.Module):
    """Base of the estimators: `observe` sees a tensor, `low` and `high` (float32) are the range so far.

    Before anything was seen low is inf and high is -inf.
    """

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, granularity: Granularity, channels: int | None) -> None:
        super().__init__()
        self.granularity = granularity
        shape = () if channels is None else (channels,)
        self.register_buffer("low", torch.full(shape, float("inf")))
        self.register_buffer("high", torch.full(shape, float("-inf")))

    @property
    def has_range(self) -> bool:
        """Whether anything was observed."""
        return bool((self.low <= self.high).all())

    def reset(self) -> None:
        """Forget everything observed."""
        self.low.fill_(float("inf"))
        self.high.fill_(float("-inf"))

    def observe(self, x: torch.Tensor) -> None:
        """Take a tensor into account; empty tensors say nothing."""
        if x.numel() == 0:
            return
        self.update(*extremes(x.detach().to(torch.float32), self.granularity))

    def update(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Take the extremes of one tensor into account."""
        raise AssertionError("abstract")


def extremes(x: torch.Tensor, granularity: Granularity) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest value of `x`, of shape () or, per channel, (channels,)."""
    if granularity.axis is None:
        low, high = torch.aminmax(x)
        return low, high
    flat = x.movedim(granularity.axis, 0).reshape(x.shape[granularity.axis], -1)
    low, high = torch.aminmax(flat, dim=1)
    return low, high


class MinMax(Estimator):
    """The lowest and highest value ever seen."""

    def update(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Widen the range."""
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))


class MovingAverage(Estimator):
    """Moving average of each tensor's extremes: m <- m + momentum * (new - m), started at the first tensor's."""

    momentum = 0.1

    def update(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Move the range towards the new extremes."""
        first = self.low > self.high
        self.low.copy_(torch.where(first, low, self.low + self.momentum * (low - self.low)))
        self.high.copy_(torch.where(first, high, self.high + self.momentum * (high - self.high)))


ESTIMATORS: dict[str, type[Estimator]] = {"min-max": MinMax, "moving-average": MovingAverage}


def make_estimator(name: str, granularity: Granularity, channels: int | None) -> Estimator:
    """The estimator called `name`; an unknown name is a SpecError that lists the known ones."""
    if name not in ESTIMATORS:
        raise SpecError(f"estimator '{name}' is unknown", remedy=nearest(name, ESTIMATORS))
    return ESTIMATORS[name](granularity, channels)
