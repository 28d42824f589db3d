"""How far the outputs of a program move when clips become relus, measured on batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import fx

from fxquant.errors import PassError
from fxquant.graph.batches import Batch
from fxquant.graph.program import Program, value_type
from fxquant.graph.segment import values_of

RELU = torch.ops.aten.relu.default


@dataclass(frozen=True)
class OutputChange:
    """How far a program's outputs moved.

    Arguments:
        relative: the largest difference, as a fraction of the largest magnitude before; of all outputs, the worst.
        sqnr_db: energy of the outputs before over that of the difference; infinite where nothing moved.
    """

    relative: float
    sqnr_db: float

    @classmethod
    def of(cls, old: Sequence[dict[str, torch.Tensor]], new: Iterable[dict[str, torch.Tensor]]) -> OutputChange:
        """From the outputs of two programs by name, batch after batch."""
        largest: dict[str, float] = {}
        worst: dict[str, float] = {}
        signal = noise = 0.0
        for before, after in zip(old, new, strict=True):
            for name, value in before.items():
                gap = after[name].double() - value.double()
                largest[name] = max(largest.get(name, 0.0), float(value.abs().max()))
                worst[name] = max(worst.get(name, 0.0), float(gap.abs().max()))
                signal, noise = signal + float(value.double().square().sum()), noise + float(gap.square().sum())
        relative = max((worst[name] / max(largest[name], 1e-30) for name in worst), default=0.0)
        return cls(relative, 10 * math.log10(signal / noise) if signal and noise else math.inf)

    def __str__(self) -> str:
        if not math.isfinite(self.sqnr_db):
            return "outputs do not change"
        return f"outputs change by {100 * self.relative:.2g} % of the largest magnitude, {self.sqnr_db:.1f} dB"


class Comparison:
    """The float outputs of a program, and what they become without some of its clips.

    It works on a copy, and keeps the outputs of all batches. Raises PassError if there are none.
    """

    def __init__(self, program: Program, batches: Iterable[Batch]) -> None:
        self._trial = program.copy()
        self._batches = batches
        (output,) = (node for node in self._trial.graph.nodes if node.op == "output")
        types = {node.name: value_type(node) for node in output.all_input_nodes}
        self._names = [name for name, found in types.items() if found is not None and found.is_float]
        self._before = list(self._outputs(None))
        if not self._before:
            raise PassError(
                "replace-relu6", expected="batches to measure with", got="none", remedy="Or set measure=False."
            )

    @property
    def batch_count(self) -> int:
        """How many batches there are."""
        return len(self._before)

    def _outputs(self, count: int | None) -> Iterable[dict[str, Any]]:
        return values_of(self._trial, islice(self._batches, count), self._names)

    def without(self, clips: Iterable[fx.Node], count: int | None = None) -> OutputChange:
        """How far the outputs move when these clips, and no others, are relus: on the first `count` batches, or all."""
        nodes = [self._trial.node(clip.name) for clip in clips]
        kept = [(node.target, node.args) for node in nodes]
        for node in nodes:
            node.target, node.args = RELU, node.args[:1]
        try:
            return OutputChange.of(self._before[:count], self._outputs(count))
        finally:
            for node, (target, args) in zip(nodes, kept, strict=True):
                node.target, node.args = target, args
