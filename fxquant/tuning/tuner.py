"""The engine of accuracy-driven tuning: one run through its three phases; every number is in the log or goes there."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fxquant.errors import CalibrationError, ConfigError, ExportError, FxquantError, PassError, ScoreError, SpecError
from fxquant.evaluation import lowered
from fxquant.graph.batches import Batch
from fxquant.graph.program import Program
from fxquant.lowering.export import export_onnx
from fxquant.progress import track
from fxquant.trials import TrialLog
from fxquant.tuning.candidates import BASELINES, CANDIDATES, FLOAT, Candidate
from fxquant.tuning.configurations import Assignment
from fxquant.tuning.costs import Latency, Sizes, bit_ops, latency, macs
from fxquant.tuning.pareto import expense
from fxquant.tuning.probe import THING, Probe, Setting
from fxquant.tuning.result import Cost, TriedConfiguration, TuningResult, points_of
from fxquant.tuning.search import BudgetSpent, Ladder, Option, Outcome, Search, ladder
from fxquant.tuning.target import Drop, threshold_of

FLOAT_SCORE = "float score"
LATENCY_NOISE = 0.02
REFUSALS = (PassError, ConfigError, SpecError, CalibrationError, ExportError, ScoreError)


@dataclass
class Tuner:
    """One run: every number comes out of the log, or goes into it."""

    setting: Setting
    log: TrialLog
    max_trials: int
    report: Callable[[TriedConfiguration], None] | None
    threshold: float = 0.0
    allowed: frozenset[str] = frozenset()  # candidates that were asked for, by name; a baseline may have others
    trials: dict[Assignment, TriedConfiguration] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    reference: Path | None = None  # the float configuration's file, for latency

    def run(self, wanted: Sequence[Candidate], target: float | Drop, batches: Sequence[Batch]) -> TuningResult:
        """All three phases."""
        setting, space = self.setting, self.setting.space
        self.allowed = frozenset((FLOAT, *(item.name for item in wanted)))
        if not space.groups:
            remedy = "print(program.coverage()) says why each value stays in float."
            raise ConfigError(THING, expected="operations that the config quantizes", got="none", remedy=remedy)
        float_score = self._kept(FLOAT_SCORE, lambda: setting.score(setting.captured, "float", "the float model"))
        self.threshold = threshold_of(target, float_score)
        self.counts = macs(space.base, Sizes.of(space.base, setting.example))
        is_complete, damages = True, tuple({FLOAT: 0.0} for _ in space.groups)
        with tempfile.TemporaryDirectory(prefix="fxquant-") as folder:
            self.reference = Path(folder) / "float.onnx"
            try:
                self._try_uniform(wanted)
                usable = [item for item in wanted if self._is_usable(item)]
                damages, ladders = self._ladders(usable, batches)
                noise = LATENCY_NOISE if setting.cost is Cost.LATENCY else 0.0
                search = Search(ladders, self._outcome, noise)
                search.run()
                is_complete = not search.is_spent
            except BudgetSpent:
                is_complete = False
        return self._result(target, float_score, damages, is_complete)

    def _result(
        self, target: float | Drop, float_score: float, damages: tuple[dict[str, float], ...], is_complete: bool
    ) -> TuningResult:
        setting, trials = self.setting, tuple(self.trials.values())
        chosen = self._choice(trials)
        program, pipeline = setting.program(chosen.assignment)
        return TuningResult(
            program,
            pipeline,
            chosen,
            float_score,
            target,
            self.threshold,
            setting.cost,
            trials,
            setting.space.groups,
            damages,
            tuple(setting.space.left_out),
            is_complete,
        )

    def _choice(self, trials: Sequence[TriedConfiguration]) -> TriedConfiguration:
        """The cheapest that reaches the target, of equal ones the narrower, then the more exact; else the best score.

        So it is always on the Pareto front.
        """
        found = points_of(trials)
        if not found:
            reasons = "; ".join(dict.fromkeys(trial.reason for trial in trials))
            raise FxquantError(f"{THING}: no configuration could be evaluated", got=reasons)
        reached = [point for point in found if point.score >= self.threshold]
        if reached:
            return min(reached, key=lambda point: (expense(point), -point.score)).trial
        return min(found, key=lambda point: (-point.score, expense(point))).trial

    def _kept(self, key: str, make: Callable[[], float]) -> float:
        """A number of the log, made if it is not there."""
        record = self.log.get(key)
        if record is None:
            record = {"value": make()}
            self.log.put(key, record)
        return float(record["value"])

    def _try_uniform(self, wanted: Sequence[Candidate]) -> None:
        """The baselines, and each candidate wherever it can be."""
        baselines = [CANDIDATES[name] for name in BASELINES]
        for candidate in dict.fromkeys([*baselines, *wanted]):
            self._trial(self.setting.space.uniform(candidate), candidate.name)

    def _is_usable(self, candidate: Candidate) -> bool:
        trial = self.trials[self.setting.space.uniform(candidate)]
        return trial.score is not None

    def _outcome(self, assignment: Assignment) -> Outcome:
        trial = self._trial(assignment, f"search {len(self.trials) + 1}")
        if trial.score is None or trial.cost is None:
            return Outcome(False, float("inf"))
        return Outcome(trial.score >= self.threshold, trial.cost, trial.activation_bits)

    def _trial(self, assignment: Assignment, name: str) -> TriedConfiguration:
        """What is known of a configuration; it is evaluated if nothing is."""
        if assignment in self.trials:
            return self.trials[assignment]
        is_baseline = not self.allowed.issuperset(assignment)
        if not is_baseline and sum(not trial.is_baseline for trial in self.trials.values()) >= self.max_trials:
            raise BudgetSpent
        key = f"configuration {','.join(assignment)}"
        record = self.log.get(key)
        if record is None:
            record = self._evaluated(assignment, name)
            self.log.put(key, record)
        bits = self.setting.space.activation_bits(assignment)
        trial = TriedConfiguration(name, assignment, **record, activation_bits=bits, is_baseline=is_baseline)
        self.trials[assignment] = trial
        if self.report is not None:
            self.report(trial)
        return trial

    def _evaluated(self, assignment: Assignment, name: str) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            program, pipeline = self.setting.program(assignment)
            final = lowered(program, pipeline)
            cost, spread = self._cost(final)
            score = self.setting.score(final, self.setting.evaluate_on, f"'{name}'")
        except REFUSALS as err:
            seconds = time.perf_counter() - start
            return {"score": None, "cost": None, "seconds": seconds, "reason": str(err)}
        return {"score": score, "cost": cost, "seconds": time.perf_counter() - start, "spread": spread}

    def _cost(self, final: Program) -> tuple[float, float]:
        if self.setting.cost is Cost.BIT_OPS:
            return float(sum(bit_ops(final, self.counts).values())), 0.0
        assert self.reference is not None
        path = self.reference.with_name("configuration.onnx")
        export_onnx(final, path)
        if not self.reference.exists():
            program, pipeline = self.setting.program(self.setting.space.uniform(CANDIDATES[FLOAT]))
            export_onnx(lowered(program, pipeline), self.reference)
        return self._milliseconds(latency(path, self.reference, final, self.setting.example))

    def _milliseconds(self, found: Latency) -> tuple[float, float]:
        """By the ratio to float's file, times what that took when the run began: the same machine then as now."""
        reference = self._kept("float milliseconds", lambda: found.milliseconds / found.ratio)
        return found.ratio * reference, found.spread

    def _ladders(
        self, usable: Sequence[Candidate], batches: Sequence[Batch]
    ) -> tuple[tuple[dict[str, float], ...], list[Ladder]]:
        """Damages and costs of each group's candidates, and what a search climbs down."""
        space = self.setting.space
        damages: tuple[dict[str, float], ...] = tuple({} for _ in space.groups)
        costs: tuple[dict[str, float], ...] = tuple({} for _ in space.groups)
        for candidate in usable:
            probe = Probe(self.setting, candidate, batches)
            for index in track(range(len(space.groups)), f"sensitivity, {candidate.name}", show=self.setting.progress):
                if candidate.name in space.names(index):
                    key = f"damage {candidate.name}, group {index}"
                    damages[index][candidate.name] = self._kept(key, partial(probe.damage, index))
                    costs[index][candidate.name] = self._group_cost(probe, index)
        fixed = self._fixed(usable)
        ladders = [
            ladder([Option(name, costs[index][name], damage) for name, damage in found.items()]) or fixed[index]
            for index, found in enumerate(damages)
        ]
        return damages, ladders

    def _fixed(self, usable: Sequence[Candidate]) -> list[Ladder]:
        """What groups have that no candidate can change."""
        return [(Option(name, 0.0, 0.0),) for name in self.setting.space.uniform(usable[-1])]

    def _group_cost(self, probe: Probe, index: int) -> float:
        """What a group is reckoned to cost: its bit-ops; for latency, its share by MACs of the uniform model's."""
        if self.setting.cost is Cost.BIT_OPS:
            return probe.bit_ops(index, self.counts)
        whole = self.trials[self.setting.space.uniform(probe.candidate)].cost
        assert whole is not None
        return whole * sum(max(self.counts.get(name, 0), 1) for name in self.setting.space.groups[index].names)
