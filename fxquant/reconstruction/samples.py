"""Samples: what goes into a unit in the quantized program, and what comes out of it in float.

Only these two are kept, for as many samples as fit in the given memory: the peak is that, the largest of them once more
while batches are joined, and what a forward up to the unit holds at once (a value is dropped when nothing reads it).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.errors import PassError
from fxquant.graph.batches import Batch
from fxquant.graph.program import Program, describe
from fxquant.graph.segment import values_of
from fxquant.reconstruction.units import Unit

MEGABYTE = 2**20
_TARGET = ""  # beside the names of nodes


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of one unit along axis 0: `inputs` by node, `targets` its float outputs."""

    inputs: Mapping[fx.Node, torch.Tensor]
    targets: torch.Tensor

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(self.targets)

    def of(self, index: torch.Tensor | slice) -> tuple[dict[fx.Node, torch.Tensor], torch.Tensor]:
        """Inputs and targets of some samples."""
        return {node: values[index] for node, values in self.inputs.items()}, self.targets[index]


def collect(program: Program, reference: Program, unit: Unit, batches: Iterable[Batch], cache_mb: int) -> Samples | str:
    """Run batches up to the unit, in `program` as it is now and in `reference`, until `cache_mb` are full.

    At least one sample is kept. Returns the reason why not, where the unit's values are no tensors of one number of
    samples along axis 0, or differ in their other sizes from batch to batch. Raises PassError if there is no batch.
    """
    names = [node.name for node in unit.inputs]
    room = cache_mb * MEGABYTE
    kept: list[dict[str, torch.Tensor]] = []
    known = values_of(program, batches, names)
    expected = values_of(reference, batches, [unit.output.name])
    for given, wanted in zip(known, expected, strict=True):
        row = {**given, _TARGET: wanted[unit.output.name]}
        reason = _why_not(row, kept)
        if reason:
            return reason
        size = sum(value[:1].numel() * value.element_size() for value in row.values())
        count = min(len(row[_TARGET]), max(room // max(size, 1), 0 if kept else 1))
        kept.append({name: _first(value, count) for name, value in row.items()})
        room -= size * count
        if room < size:
            break
    if not kept:
        raise PassError(f"reconstruction of '{unit.name}'", place=describe(unit.output), got="no batches")
    joined = {name: torch.cat([row.pop(name) for row in kept]) for name in (*names, _TARGET)}
    return Samples({node: joined[node.name] for node in unit.inputs}, joined[_TARGET])


def _first(value: torch.Tensor, count: int) -> torch.Tensor:
    return value if count == len(value) else value[:count].clone()


def _why_not(row: Mapping[str, Any], kept: list[dict[str, torch.Tensor]]) -> str:
    target = row[_TARGET]
    for name, value in row.items():
        label = name or "its output"
        if not isinstance(value, torch.Tensor):
            return f"{label} is no tensor"
        if value.ndim == 0 or not isinstance(target, torch.Tensor) or len(value) != len(target):
            return f"{label} has not as many samples along axis 0 as its output"
        if kept and value.shape[1:] != kept[0][name].shape[1:]:
            return f"{label} has another size in another batch"
    return ""
