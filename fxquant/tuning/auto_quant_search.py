"""The engine of AutoQuant: one run over the steps, whose trials come out of the log, or go into it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fxquant.errors import CalibrationError, FxquantError, UserCodeError
from fxquant.evaluation import Evaluate, EvaluatedOn, lowered, quantized, score_of
from fxquant.graph.batches import Batch
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Program
from fxquant.parity.lowered_model import LoweredModel
from fxquant.training.seeding import seed_epoch
from fxquant.trials import TrialLog
from fxquant.tuning.auto_quant_files import AutoQuantFiles
from fxquant.tuning.auto_quant_result import AutoQuantResult, Trial, Verdict
from fxquant.tuning.auto_quant_steps import Step, still_in_force
from fxquant.tuning.target import Drop, threshold_of

THING = "auto_quantize"
FLOAT = "float"  # the record of the float model's score


@dataclass(frozen=True)
class Measure:
    """What stays the same from trial to trial."""

    captured: Program
    batches: Iterable[Batch]
    evaluate: Evaluate
    on: EvaluatedOn
    seed: int
    progress: bool

    def float_score(self) -> float:
        """The score of the captured model, in torch."""
        return score_of(self.captured, self.evaluate, "float", f"{THING}: score of the float model")

    def quantized(self, pipeline: Pipeline, folder: Path | None) -> Program:
        """The program that a pipeline makes, calibrated and optimized; the same each time."""
        seed_epoch(self.seed, 0)
        return quantized(self.captured, pipeline, self.batches, folder, self.progress)

    def score(self, finalized: Program, name: str) -> tuple[float, int | None]:
        """Score, and size of the ONNX file if it is what was evaluated."""
        sizes: list[int] = []

        def evaluate(model: Callable[..., Any]) -> float:
            if isinstance(model, LoweredModel):
                sizes.append(model.path.stat().st_size)
            return self.evaluate(model)

        score = score_of(finalized, evaluate, self.on, f"{THING}: score of '{name}'")
        return score, sizes[0] if sizes else None


def _verdict(score: float, before: float | None) -> Verdict:
    return Verdict.KEPT if before is None or score > before else Verdict.REJECTED


@dataclass(frozen=True)
class _Made:
    """A trial's program, calibrated and optimized, and as it is lowered."""

    program: Program
    finalized: Program


@dataclass(frozen=True)
class _Best:
    """The best trial so far; its program, unless the trial was another process's."""

    trial: Trial
    score: float
    pipeline: Pipeline
    program: Program | None


class Search:
    """One run over the steps."""

    def __init__(
        self,
        measure: Measure,
        start: Pipeline,
        files: AutoQuantFiles,
        log: TrialLog,
        report: Callable[[Trial], None] | None,
    ) -> None:
        self.measure = measure
        self.start = start
        self.files = files
        self.log = log
        self.report = report
        self.trials: list[Trial] = []
        self.best: _Best | None = None

    def run(self, steps: tuple[Step, ...], target: float | Drop) -> AutoQuantResult:
        """Try steps until the threshold is reached."""
        float_score = self._float_score()
        threshold = threshold_of(target, float_score)
        for step in steps:
            if self.best is not None and self.best.score >= threshold:
                break
            self._try(step)
        best = self._require_best()
        return AutoQuantResult(
            self._program_of(best),
            best.pipeline,
            best.score,
            float_score,
            target,
            threshold,
            tuple(self.trials),
            self._makers(steps),
            tuple(step.name for step in steps[len(self.trials) :]),
            self.files.folder,
        )

    def _makers(self, steps: tuple[Step, ...]) -> tuple[str, ...]:
        """Names of the kept steps that the best pipeline is made of."""
        kept = {trial.name for trial in self.trials if trial.verdict is Verdict.KEPT}
        return tuple(step.name for step in still_in_force([step for step in steps if step.name in kept], self.start))

    def _float_score(self) -> float:
        record = self.log.get(FLOAT)
        if record is None:
            started = time.perf_counter()
            score = self.measure.float_score()
            record = {"score": score, "seconds": time.perf_counter() - started}
            self.log.put(FLOAT, record)
        return float(record["score"])

    def _try(self, step: Step) -> None:
        """One trial: done anew, or taken from the log."""
        before = None if self.best is None else self.best.score
        trial = Trial(step.name, str(step), Verdict.SKIPPED, before=before)
        try:
            pipeline = step.build(self.start if self.best is None else self.best.pipeline)
        except FxquantError as err:
            self._finish(replace(trial, reason=f"does not apply: {err}"))
            return
        trial = replace(trial, pipeline=pipeline.to_toml())
        same = [earlier.name for earlier in self.trials if earlier.pipeline == trial.pipeline]
        if same:
            self._finish(replace(trial, reason=f"the same pipeline as '{same[0]}'"))
            return
        recorded = self._recorded(trial)
        if recorded is None:
            self._measure(trial, pipeline)
        else:
            self.trials.append(recorded)
            if recorded.verdict is Verdict.KEPT:
                self._keep(recorded, pipeline, None)

    def _recorded(self, trial: Trial) -> Trial | None:
        """The trial as the log has it, judged by the best of this run; None if it is of another pipeline."""
        record = self.log.get(trial.name)
        if record is None or record.get("pipeline") != trial.pipeline:
            return None
        found = Trial.from_dict(record)
        if found.score is not None:
            return replace(found, before=trial.before, verdict=_verdict(found.score, trial.before))
        is_same = any(found.fingerprint == earlier.fingerprint for earlier in self.trials)
        return found if found.verdict is Verdict.FAILED or is_same else None

    def _measure(self, trial: Trial, pipeline: Pipeline) -> None:
        """Quantize, evaluate, judge; keep what is on disk in step."""
        started, unfinished = time.perf_counter(), self.files.unfinished(trial.pipeline)
        made: _Made | None = None
        try:
            program = self.measure.quantized(pipeline, unfinished)
            made = _Made(program, lowered(program, pipeline))
            trial = self._judged(replace(trial, fingerprint=made.finalized.fingerprint()), made.finalized)
        except UserCodeError:
            raise
        except FxquantError as err:
            if isinstance(err, CalibrationError) and trial.pipeline == self.start.to_toml():
                raise  # the data, or the float model's own values: no step mends them
            trial = replace(trial, verdict=Verdict.FAILED, reason=str(err))
        trial = replace(trial, seconds=time.perf_counter() - started)
        if trial.verdict is Verdict.KEPT and made is not None:
            self.files.keep(made.program, made.finalized, pipeline)  # before its record, which so never lacks them
            self._keep(trial, pipeline, made.program)
        self._finish(trial)
        self.files.forget(unfinished)

    def _judged(self, trial: Trial, finalized: Program) -> Trial:
        """The trial with its score and verdict; skipped if an earlier one had the same program."""
        same = [earlier.name for earlier in self.trials if earlier.fingerprint == trial.fingerprint]
        if same:
            return replace(trial, reason=f"the same program as '{same[0]}', bit for bit")
        score, size = self.measure.score(finalized, trial.name)
        return replace(trial, score=score, size_bytes=size, verdict=_verdict(score, trial.before))

    def _keep(self, trial: Trial, pipeline: Pipeline, program: Program | None) -> None:
        assert trial.score is not None
        self.best = _Best(trial, trial.score, pipeline, program)

    def _finish(self, trial: Trial) -> None:
        self.log.put(trial.name, trial.to_dict())
        self.trials.append(trial)
        if self.report is not None:
            self.report(trial)

    def _require_best(self) -> _Best:
        if self.best is None:
            first = self.trials[0]
            raise FxquantError(
                THING,
                expected="a trial that has a score",
                got=f"none; '{first.name}' {first.verdict.value}: {first.reason}",
                remedy="Mend what it says, and call again with overwrite=True (--overwrite) if there is a folder.",
            )
        return self.best

    def _program_of(self, best: _Best) -> Program:
        """The best program; another process's from its file, or made anew if that is gone."""
        if best.program is not None:
            return best.program
        kept = self.files.kept()
        if kept is not None and lowered(kept, best.pipeline).fingerprint() == best.trial.fingerprint:
            return kept
        program = self.measure.quantized(best.pipeline, None)
        self.files.keep(program, lowered(program, best.pipeline), best.pipeline)
        return program
