"""Samples: what goes into a unit in the quantized program, and what comes out of it in float.

These two are kept for as many samples as fit in the given memory: the peak is that, the largest of them once more while
batches are joined, what a forward up to the unit holds at once (a value is dropped when nothing reads it), and what is
kept for the units to come (Collector).
Of a convolution with a large output they are those of a few positions (patches.py), each a sample of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.errors import PassError
from fxquant.graph.batches import Batch
from fxquant.graph.frontier import StagedWalk
from fxquant.graph.program import Program, describe
from fxquant.graph.segment import Segment
from fxquant.reconstruction.patches import PatchSegment, draw_positions, has_patches, is_dearer, outputs_at, patches_at
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

    def parts(self, check_every: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the samples to learn from, and of those to check with.

        Of `check_every` samples of the batches the second one checks, with all that came of it. It is the same one for
        all units, or a unit would be checked with what units before it have learned from. 0, and a single sample: all
        do both.
        """
        index = torch.arange(self.count, device=self.targets.device)
        if not check_every or self.count <= self.each:
            return index, index
        is_check = is_held_back(index // self.each, check_every)
        return index[~is_check], index[is_check]


def is_held_back(index: torch.Tensor, check_every: int) -> torch.Tensor:
    """Whether samples of the batches, by their numbers, check what others have taught."""
    return index % check_every == 1


def segment_of(program: Program, unit: Unit, samples: Samples) -> Segment:
    """What computes the unit's output from samples, given its weights."""
    known = (*unit.inputs, *unit.weights, *unit.sizes)
    if samples.each > 1:
        return PatchSegment(program, unit.output, known, unit.layer)
    return Segment(program, [unit.output], known)


class Collector:
    """Collects the samples of one unit after another: inputs from a program whose weights are learned meanwhile,
    outputs from its float twin.

    Both programs are run once, not once a unit: what leads to the units that are still to come is kept for all batches
    (graph/frontier.py, StagedWalk), in `cache_mb` for both programs together; where it does not fit, the way from what
    was kept last is computed again.

    Arguments:
        program, reference: the nodes of the units are those of `program`; `reference` calls their outputs the same.
        units: in an order in which none reads what a later one computes; any of them may be left out when its turn
            comes, but none collected twice.
        batches: at least one (PassError).
        cache_mb: megabytes for the samples of a unit, and as many for what is kept for the units to come.
        seed: positions are drawn by it and the unit's name.
    """

    def __init__(
        self,
        program: Program,
        reference: Program,
        units: Sequence[Unit],
        batches: Iterable[Batch],
        cache_mb: int,
        seed: int = 0,
    ) -> None:
        self._program = program
        self._room = cache_mb * MEGABYTE
        self._seed = seed
        self._stage = {unit: stage for stage, unit in enumerate(units)}
        self._targets = [reference.node(unit.output.name) for unit in units]
        limit = self._room // 2
        self._inputs_walk = StagedWalk(program, [unit.inputs for unit in units], batches, limit)
        self._targets_walk = StagedWalk(reference, [[target] for target in self._targets], batches, limit)

    def samples(self, unit: Unit) -> Samples | str:
        """The unit's inputs in the program as it is now, and its float outputs, until the memory is full.

        At least one sample is kept. Returns the reason why not, where the unit's values are no tensors of one number
        of samples along axis 0, or differ in their other sizes from batch to batch.
        """
        stage = self._stage[unit]
        rows = _Rows(self._program, unit, self._room, self._seed)
        known, wanted = self._inputs_walk.values(stage), self._targets_walk.values(stage)
        for given, outputs in zip(known, wanted, strict=True):
            row = {node.name: value for node, value in given.items()}
            rows.add({**row, _TARGET: outputs[self._targets[stage]]})
            if rows.is_complete:
                break
        for walk, rest in ((self._inputs_walk, known), (self._targets_walk, wanted)):
            while walk.fits and next(rest, None) is not None:  # units to come want these batches too
                pass
        return rows.joined()


def collect(
    program: Program, reference: Program, unit: Unit, batches: Iterable[Batch], cache_mb: int, seed: int = 0
) -> Samples | str:
    """The samples of one unit alone: see Collector."""
    return Collector(program, reference, [unit], batches, cache_mb, seed).samples(unit)


class _Rows:
    """The samples of one unit while they are collected, batch by batch."""

    def __init__(self, program: Program, unit: Unit, room: int, seed: int) -> None:
        self._program, self._unit, self._room = program, unit, room
        self._generator = generator_of(unit.name, seed)
        self._kept: list[dict[str, torch.Tensor]] = []
        self._each = 1
        self._reason = ""
        self.is_complete = False  # nothing more is wanted, or of use

    def add(self, row: dict[str, torch.Tensor]) -> None:
        """Keep what there is room for of a batch."""
        self._reason = _why_not(row)
        if not self._reason:
            row, self._each = _at_positions(self._program, self._unit, row, self._generator)
            self._reason = _differs(row, self._kept)
        if self._reason:
            self.is_complete = True
            return
        size = max(sum(value[:1].numel() * value.element_size() for value in row.values()), 1)
        count = min(len(row[_TARGET]), max(self._room // size, 0 if self._kept else 1))
        self._kept.append({name: _first(value, count) for name, value in row.items()})
        self._room -= size * count
        self.is_complete = self._room < size

    def joined(self) -> Samples | str:
        """All that was kept, or the reason why that is of no use; nothing is held any more."""
        if self._reason:
            return self._reason
        unit = self._unit
        if not self._kept:
            raise PassError(f"reconstruction of '{unit.name}'", place=describe(unit.output), got="no batches")
        names = [*(node.name for node in unit.inputs), _TARGET]
        joined = {name: torch.cat([row.pop(name) for row in self._kept]) for name in names}
        return Samples({node: joined[node.name] for node in unit.inputs}, joined[_TARGET], self._each)


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
    weight = weight_of(program, unit.weights[0])
    if is_dearer(weight, row[source.name], count):
        return row, 1
    positions = draw_positions(count, target.shape, generator)
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
