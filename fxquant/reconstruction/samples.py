"""Samples: what goes into a unit in the quantized program, and what comes out of it in float.

Only these two are kept, for as many samples as fit in the given memory: the peak is that, the largest of them once more
while batches are joined, and what a forward up to the unit holds at once (a value is dropped when nothing reads it).
Of a convolution with a large output they are those of a few positions (patches.py), each a sample of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.errors import PassError
from fxquant.graph.batches import Batch
from fxquant.graph.program import Program, describe
from fxquant.graph.segment import Segment, values_of
from fxquant.reconstruction.patches import PatchSegment, draw_positions, has_patches, outputs_at, patches_at
from fxquant.reconstruction.units import Unit, weight_of

MEGABYTE = 2**20
_TARGET = ""  # beside the names of nodes


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of one unit along axis 0: `inputs` by node, `targets` its float outputs.

    `each`: how many of them came of one sample of the batches; more than 1 where they are patches.
    """

    inputs: Mapping[fx.Node, torch.Tensor]
    targets: torch.Tensor
    each: int = 1

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(self.targets)

    def of(self, index: torch.Tensor | slice) -> tuple[dict[fx.Node, torch.Tensor], torch.Tensor]:
        """Inputs and targets of some samples."""
        return {node: values[index] for node, values in self.inputs.items()}, self.targets[index]


def segment_of(program: Program, unit: Unit, samples: Samples) -> Segment:
    """What computes the unit's output from samples, given its weights."""
    known = (*unit.inputs, *unit.weights)
    if samples.each > 1:
        return PatchSegment(program, unit.output, known, unit.layer)
    return Segment(program, [unit.output], known)


def collect(
    program: Program, reference: Program, unit: Unit, batches: Iterable[Batch], cache_mb: int, seed: int = 0
) -> Samples | str:
    """Run batches up to the unit, in `program` as it is now and in `reference`, until `cache_mb` are full.

    At least one sample is kept. Returns the reason why not, where the unit's values are no tensors of one number of
    samples along axis 0, or differ in their other sizes from batch to batch. Raises PassError if there is no batch.
    Positions are drawn by the unit's name and `seed`.
    """
    names = [node.name for node in unit.inputs]
    room = cache_mb * MEGABYTE
    kept: list[dict[str, torch.Tensor]] = []
    generator, each = generator_of(unit.name, seed), 1
    known = values_of(program, batches, names)
    expected = values_of(reference, batches, [unit.output.name])
    for given, wanted in zip(known, expected, strict=True):
        row = {**given, _TARGET: wanted[unit.output.name]}
        reason = _why_not(row)
        if reason:
            return reason
        row, each = _at_positions(program, unit, row, generator)
        reason = _differs(row, kept)
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
    return Samples({node: joined[node.name] for node in unit.inputs}, joined[_TARGET], each)


def generator_of(name: str, seed: int) -> torch.Generator:
    """Draws of a unit, by its name and the seed alone: what other units did, or a resumed run, changes nothing."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _at_positions(
    program: Program, unit: Unit, row: dict[str, torch.Tensor], generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], int]:
    """A batch's input and target, or those of the positions that are drawn; and how many each sample then is."""
    target = row[_TARGET]
    count = unit.positions
    if count is None or target.ndim < 3 or not has_patches(unit.layer) or target.shape[2:].numel() <= count:
        return row, 1
    (source,) = unit.inputs
    positions = draw_positions(count, target.shape, generator)
    weight = weight_of(program, unit.weights[0])
    found = {source.name: patches_at(unit.layer, row[source.name], weight, positions)}
    return {**found, _TARGET: outputs_at(target, positions)}, count


def _first(value: torch.Tensor, count: int) -> torch.Tensor:
    return value if count == len(value) else value[:count].clone()


def _why_not(row: Mapping[str, Any]) -> str:
    target = row[_TARGET]
    for name, value in row.items():
        label = name or "its output"
        if not isinstance(value, torch.Tensor):
            return f"{label} is no tensor"
        if value.ndim == 0 or not isinstance(target, torch.Tensor) or len(value) != len(target):
            return f"{label} has not as many samples along axis 0 as its output"
    return ""


def _differs(row: Mapping[str, torch.Tensor], kept: list[dict[str, torch.Tensor]]) -> str:
    names = [name for name in row if kept and row[name].shape[1:] != kept[0][name].shape[1:]]
    return f"{names[0] or 'its output'} has another size in another batch" if names else ""
