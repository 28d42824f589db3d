"""Ranges that move in training: their base, and the moving average of what is seen."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import nn

from fxquant.numerics.estimators.base import seen_by_all
from fxquant.numerics.peers import Peers
from fxquant.spec import QuantSpec


class TrainedRange(nn.Module):
    """Base of the ranges that training moves.

    Arguments:
        spec: the grid that the range is for.
        shape: the encoding's shape.
    """

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.spec = spec

    @abstractmethod
    def start(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Begin at this grid."""


class MovingRange(TrainedRange):
    """Moving average of each batch's extremes, in training mode: m <- m + momentum * (new - m).

    Buffers: `low` and `high` (float32). With `peers`, all processes' tensors are one batch.
    """

    low: torch.Tensor
    high: torch.Tensor
    peers: Peers | None = None

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...], momentum: float) -> None:
        super().__init__(spec, shape)
        self.momentum = momentum
        self.register_buffer("low", torch.full(shape, math.nan))
        self.register_buffer("high", torch.full(shape, math.nan))

    def start(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Begin at the range that this grid covers."""
        self.low.copy_((self.spec.qmin - zero_point) * scale)
        self.high.copy_((self.spec.qmax - zero_point) * scale)

    def update(self, x: torch.Tensor) -> None:
        """Move towards the extremes of `x`; an empty tensor says nothing, nor do extremes that are not finite.

        A batch that overflows, as loss scaling provokes them, shows in the loss; it must not end the average.
        """
        seen = seen_by_all(x, self.spec.granularity, self.low.shape, self.peers)
        if seen is None:
            return
        _, low, high = seen
        is_finite = torch.isfinite(low) & torch.isfinite(high)
        for kept, new in ((self.low, low), (self.high, high)):
            kept.copy_(torch.where(is_finite, kept + self.momentum * (new - kept), kept))
