"""Peers: the processes that train one program together, and what they tell each other.

All is gathered rank by rank and combined by each process in the same order, so that every process gets the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class Peers:
    """The processes of one group. Deep copies of a module keep its peers; a pickled module has none.

    Every method is collective: all processes call it, in the same order, with tensors of the same shape.

    Arguments:
        group: of torch.distributed; None stands for all processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    def gathered(self, values: torch.Tensor) -> torch.Tensor:
        """Each process's values, [processes, *values.shape]."""
        found = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(found, values.contiguous(), self._group)
        return torch.stack(found)

    def extremes(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The lowest of all lows and the highest of all highs; NaN where there is one."""
        lows, highs = self.gathered(torch.stack([low, high])).unbind(dim=1)
        return lows.amin(dim=0), highs.amax(dim=0)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' values."""
        return self.gathered(values).sum(dim=0)

    def objects(self, mine: Any) -> list[Any]:
        """Each process's object, by rank."""
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, mine, self._group)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Peers:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()
