"""AutoQuant: post-training algorithms, tried in the order of cost until the user's `evaluate` reaches a target.

The idea is that of AIMET's AutoQuant; the rule is greedy:

    a trial is the best pipeline before it, changed by one step; until there is one, the config changed by the step
    it is kept if its score is higher than the best before it; the first one that has a score always is
    the search ends with the first trial that is kept and reaches the threshold, or with the last step
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxquant.capture import capture
from fxquant.errors import ConfigError, FxquantError
from fxquant.evaluation import Evaluate, EvaluatedOn, lowered, quantized, require_evaluated_on, score_of
from fxquant.graph.batches import Batch
from fxquant.graph.pass_data import PassData
from fxquant.graph.pipeline import Pipeline, load_pipeline
from fxquant.graph.program import Program
from fxquant.parity.lowered_model import LoweredModel
from fxquant.training.seeding import plain_seed, seed_epoch
from fxquant.trials import TrialLog
from fxquant.tuning.auto_quant_files import AutoQuantFiles
from fxquant.tuning.auto_quant_result import AutoQuantResult, Trial, Verdict
from fxquant.tuning.auto_quant_steps import Step, default_steps, still_in_force
from fxquant.tuning.criterion import Drop, check_target, threshold_of

THING = "auto_quantize"
FLOAT = "float"  # the record of the float model's score


def auto_quantize(
    model: torch.nn.Module | torch.export.ExportedProgram | fx.GraphModule,
    example_inputs: Any,
    batches: Iterable[Batch],
    evaluate: Evaluate,
    *,
    target: float | Drop,
    config: str | os.PathLike[str] | Pipeline = "int8_per_channel",
    evaluate_on: EvaluatedOn = "onnxruntime",
    steps: Sequence[Step] | None = None,
    iterations: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    report: Callable[[Trial], None] | None = None,
    progress: bool = True,
) -> AutoQuantResult:
    """Find the cheapest of the post-training algorithms that quantize `model` well enough.

        result = auto_quantize(net, images[:1], batches, accuracy, target=Drop(0.01), folder="search")
        print(result)
        result.export("out")

    Arguments:
        model, example_inputs, config: as of QuantSim. The model is left untouched.
        batches: for calibration and algorithms; iterated anew many times: a list, a DataLoader without shuffling.
        evaluate: takes a callable like the model and gives a score, the higher the better; called once for the float
            model (in torch) and once for each trial.
        target: a score, or Drop(amount, relative=...) against the float model's.
        evaluate_on: "onnxruntime" (the exported file, tensors on the CPU), "exact", or "float" simulation.
        steps: what is tried, in order; None for `default_steps(iterations, seed)`.
        iterations: of AdaRound; None for the pass's default.
        folder: gets trials.json, and of the best model best.onnx, best.fxq, best.toml (its pipeline) and
            calibrated.fxq (the program before finalize), each before the next trial begins.
        resume: go on with the folder's run, if it has one: finished trials are not repeated, and algorithms that keep
            what they have done in `unfinished/` go on with it. Target and steps may have changed since.
        overwrite: remove the folder's earlier run.
        seed: of every generator, before each trial.
        report: is given each trial, once it is on disk.
        progress: show the progress bars of calibration and algorithms when standard error is a terminal.

    A trial that raises an FxquantError is recorded as failed, with the text, and the search goes on. A step that does
    not apply, or gives the pipeline or the program of an earlier trial, is recorded as skipped.

    Raises ConfigError for arguments that contradict each other, StorageError for a folder that holds another run,
    FxquantError if the float model has no finite score, or if no trial has one.
    """
    check_target(target, THING)
    require_evaluated_on(evaluate_on, THING)
    PassData(batches)
    seed = plain_seed(seed, THING)
    chosen = _checked_steps(default_steps(iterations, seed) if steps is None else steps, steps, iterations)
    files = AutoQuantFiles(None if folder is None else Path(folder))
    _check_folder(files, resume, overwrite)
    start = config if isinstance(config, Pipeline) else load_pipeline(config)
    captured = capture(model, example_inputs)
    recipe = {
        "model": captured.fingerprint(),
        "config": start.to_toml(),
        "batches": _digest(batches),
        "evaluate_on": evaluate_on,
        "seed": seed,
    }
    log = TrialLog(files.log, recipe, resume=resume, overwrite=overwrite)
    if overwrite:
        files.clear()
    measure = _Measure(captured, batches, evaluate, evaluate_on, seed, progress)
    return _Search(measure, start, files, log, report).run(chosen, target)


def _checked_steps(chosen: Sequence[Step], given: Sequence[Step] | None, iterations: int | None) -> tuple[Step, ...]:
    if given is not None and iterations is not None:
        remedy = "Say steps=default_steps(iterations), with what you change of it."
        raise ConfigError(f"{THING}: iterations", expected="steps or iterations", got="both", remedy=remedy)
    names = [step.name for step in chosen]
    twice = [name for name in names if names.count(name) > 1 or name == FLOAT]
    if twice or not names:
        got = f"'{twice[0]}'" + (f" {names.count(twice[0])} times" if twice[0] != FLOAT else "") if twice else "none"
        raise ConfigError(f"{THING}: steps", expected=f"steps of different names, none '{FLOAT}'", got=got)
    if iterations is not None and iterations < 1:
        raise ConfigError(f"{THING}: iterations", expected="1 or more", got=str(iterations))
    return tuple(chosen)


def _check_folder(files: AutoQuantFiles, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ConfigError(THING, expected="resume or overwrite", got="both", remedy="Choose one of them.")
    if (resume or overwrite) and files.folder is None:
        raise ConfigError(f"{THING}: {'resume' if resume else 'overwrite'}=True", expected="folder=", got="none")


def _digest(batches: Iterable[Batch]) -> str:
    """SHA-256 of the batches, so that a run is not continued on others."""
    digest = hashlib.sha256()
    for batch in batches:
        for leaf in pytree.tree_leaves(batch):
            if not isinstance(leaf, torch.Tensor):
                digest.update(repr(leaf).encode())
                continue
            raw = leaf.detach().cpu().contiguous().flatten()
            digest.update(f"{leaf.dtype}:{tuple(leaf.shape)}".encode())
            digest.update(raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
    return digest.hexdigest()


@dataclass(frozen=True)
class _Measure:
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


class _Search:
    """One run over the steps."""

    def __init__(
        self,
        measure: _Measure,
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
        except FxquantError as err:
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
                remedy="Mend what it says, and call again with overwrite=True if there is a folder.",
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
