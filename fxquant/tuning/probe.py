"""What a search asks of configurations before it evaluates any: their programs, and each group's damage and cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fxquant.evaluation import Evaluate, EvaluatedOn, quantized, score_of
from fxquant.graph.batches import Batch
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Program
from fxquant.training.seeding import seed_epoch
from fxquant.tuning.candidates import Candidate
from fxquant.tuning.configurations import Assignment, Space
from fxquant.tuning.costs import FLOAT_BITS, bit_product, value_bits
from fxquant.tuning.result import Cost
from fxquant.tuning.sensitivity import damage_of, outputs_of

THING = "tune_precision"


@dataclass(frozen=True)
class Setting:
    """What does not change from configuration to configuration.

    Arguments:
        captured: the program in float.
        space: its groups and their candidates.
        batches: for calibration.
        evaluate, evaluate_on: what gives a score, and of what.
        cost: what is to be small.
        example: a batch, whose sizes MACs are counted for and latencies measured on.
        seed: of every generator, before each evaluation.
        progress: whether calibration shows a bar.
    """

    captured: Program
    space: Space
    batches: Iterable[Batch]
    evaluate: Evaluate
    evaluate_on: EvaluatedOn
    cost: Cost
    example: Batch
    seed: int
    progress: bool

    def program(self, assignment: Assignment, name: str = "tuned") -> tuple[Program, Pipeline]:
        """A calibrated program of a configuration, and its pipeline."""
        pipeline = self.space.pipeline_of(assignment, name)
        return quantized(self.captured, pipeline, self.batches, progress=self.progress), pipeline

    def score(self, program: Program, on: EvaluatedOn, name: str) -> float:
        """What `evaluate` says of a program; `name` is for messages."""
        seed_epoch(self.seed, 0)
        return score_of(program, self.evaluate, on, f"{THING}: score of {name}")


class Probe:
    """The program with one candidate wherever it can be, made when it is first asked for."""

    def __init__(self, setting: Setting, candidate: Candidate, batches: Sequence[Batch]) -> None:
        self.setting = setting
        self.candidate = candidate
        self.batches = batches
        self._program: Program | None = None
        self._expected: list[list[torch.Tensor]] = []

    @property
    def program(self) -> Program:
        """Calibrated."""
        if self._program is None:
            self._program, _ = self.setting.program(self.setting.space.uniform(self.candidate))
        return self._program

    def damage(self, index: int) -> float:
        """Of one group."""
        if not self.candidate.quantize:
            return 0.0
        if not self._expected:
            self._expected = outputs_of(self.setting.captured, self.batches)
        return damage_of(self.program, self.setting.space.groups[index], self.batches, self._expected)

    def bit_ops(self, index: int, counts: Mapping[str, int]) -> float:
        """Of one group; what multiplies nothing counts as one MAC, so that fewer bits are always cheaper."""
        names = self.setting.space.groups[index].names
        return float(sum(max(counts.get(name, 0), 1) * self._bits(name, counts) for name in names))

    def _bits(self, name: str, counts: Mapping[str, int]) -> int:
        node = self.program.node(name)
        if name in counts:
            return bit_product(self.program, node)
        return min((value_bits(self.program, value) for value in node.all_input_nodes), default=FLOAT_BITS) ** 2
