"""Mean and deviation of each channel of a value over batches, positions and examples, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import fx

from fxquant.graph.batches import Batch
from fxquant.graph.frontier import show_all
from fxquant.graph.program import Program


class ChannelMeans:
    """Sums over what it is shown; `axis` is that of the channels."""

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._count = 0
        self._sum = torch.zeros((), dtype=torch.float64)
        self._square = torch.zeros((), dtype=torch.float64)

    def see(self, value: torch.Tensor) -> None:
        """Add a batch."""
        rows = value.movedim(self._axis, 0).flatten(1) if value.ndim > 1 else value[:, None]
        self._count += rows.shape[1]
        self._sum = self._sum.to(rows.device) + rows.sum(1, dtype=torch.float64)
        self._square = self._square.to(rows.device) + rows.square().sum(1, dtype=torch.float64)

    @property
    def count(self) -> int:
        """How many numbers of each channel it has seen."""
        return self._count

    @property
    def mean(self) -> torch.Tensor:
        """Of shape (channels,)."""
        return self._sum / self._count

    @property
    def std(self) -> torch.Tensor:
        """Of shape (channels,); of the numbers seen, not of what they are drawn from."""
        return (self._square / self._count - self.mean.square()).clamp(min=0).sqrt()


def means_of(
    program: Program, axes: dict[str, int], batches: Iterable[Batch], max_batches: int | None
) -> dict[str, ChannelMeans]:
    """Of the nodes called `axes`' keys, whose channels are on these axes: one forward pass a batch."""
    wanted: Sequence[fx.Node] = [node for node in program.graph.nodes if node.name in axes]
    found = {name: ChannelMeans(axis) for name, axis in axes.items()}
    show_all(program, wanted, islice(batches, max_batches), lambda node, value: found[node.name].see(value))
    return found
