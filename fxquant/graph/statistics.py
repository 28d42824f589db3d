"""What is known of a value without data: mean and deviation of each channel, as a batch norm that was folded left them.

Batch norm hands on values of mean beta and deviation |gamma| sqrt(var / (var + eps)): over the batches that its running
statistics average, with these as the batch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

STATISTICS = "statistics"  # key of a node's meta; Rewriter.set_statistics writes it


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation (not negative) of each channel of a layer's output, before any activation."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, mean: torch.Tensor, std: torch.Tensor) -> ChannelStatistics:
        """From tensors of shape (channels,)."""
        return cls(_numbers(mean), _numbers(std))

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation, float64 of shape (channels,)."""
        return torch.tensor(self.mean, dtype=torch.float64), torch.tensor(self.std, dtype=torch.float64)

    def to_dict(self) -> dict[str, list[float]]:
        """As plain values."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Sequence[float]]) -> ChannelStatistics:
        """The inverse of `to_dict`."""
        return cls(tuple(map(float, values["mean"])), tuple(map(float, values["std"])))


def statistics_of(node: fx.Node) -> ChannelStatistics | None:
    """What is known of the output channels of a layer; None: nothing."""
    found: Any = node.meta.get(STATISTICS)
    return found if isinstance(found, ChannelStatistics) else None


def _numbers(tensor: torch.Tensor) -> tuple[float, ...]:
    return tuple(tensor.detach().cpu().double().tolist())
