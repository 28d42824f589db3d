"""Accuracy-driven tuning: the configuration of mixed precision that meets a criterion at the least cost.

The idea of tuning by an accuracy criterion is that of Intel's LPOT (Neural Compressor), that of sensitivity and
bit-operations AIMET's automatic mixed precision. Three phases:

    1. Sensitivity: each group's candidates alone, by the damage to the output on a few batches (sensitivity.py).
    2. Search: bisection along the order of damage for each unit of cost saved, then improvement (search.py).
    3. The choice: of all configurations that were evaluated and meet the criterion, the cheapest.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxquant.capture import capture
from fxquant.errors import CalibrationError, ConfigError, ExportError, FxquantError, PassError, SpecError, nearest
from fxquant.evaluation import Evaluate, EvaluatedOn, lowered, require_evaluated_on
from fxquant.files import write_text
from fxquant.graph.batches import Batch
from fxquant.graph.pipeline import Pipeline, load_pipeline
from fxquant.graph.program import Program
from fxquant.lowering.export import export_onnx
from fxquant.progress import track
from fxquant.schedule import plain_integer
from fxquant.training.seeding import plain_seed
from fxquant.trials import TrialLog
from fxquant.tuning.candidates import BASELINES, CANDIDATES, DEFAULT_CANDIDATES, FLOAT, Candidate, chosen_candidates
from fxquant.tuning.configurations import Assignment, Space
from fxquant.tuning.costs import Latency, Sizes, bit_ops, latency, macs
from fxquant.tuning.criterion import Drop, check_target, threshold_of
from fxquant.tuning.probe import THING, Probe, Setting
from fxquant.tuning.result import Cost, TriedConfiguration, TuningResult
from fxquant.tuning.search import BudgetSpent, Ladder, Option, Outcome, Search, ladder

LOG, CHOSEN = "trials.json", "chosen.toml"
FLOAT_SCORE = "float score"
LATENCY_NOISE = 0.02
REFUSALS = (PassError, ConfigError, SpecError, CalibrationError, ExportError)


def tune_precision(
    model: torch.nn.Module | torch.export.ExportedProgram | fx.GraphModule,
    example_inputs: Any,
    batches: Iterable[Batch],
    evaluate: Evaluate,
    *,
    criterion: float | Drop,
    candidates: Iterable[str | Candidate] = DEFAULT_CANDIDATES,
    cost: Literal["bit-ops", "latency"] = "bit-ops",
    config: str | os.PathLike[str] | Pipeline = "int8_per_channel",
    evaluate_on: EvaluatedOn = "onnxruntime",
    sensitivity_batches: int = 2,
    max_trials: int = 100,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    report: Callable[[TriedConfiguration], None] | None = None,
    progress: bool = True,
) -> TuningResult:
    """Find the configuration of mixed precision that meets a criterion at the least cost.

        result = tune_precision(net, images[:1], batches, accuracy, criterion=Drop(0.01, relative=True))
        print(result)
        result.export("out")

    Arguments:
        model, example_inputs, config: as of QuantSim. The model is left untouched; the config's own rules hold.
        batches: for calibration.
        evaluate: takes a callable like the model and gives a score, the higher the better; called once for the float
            model (in torch) and once for each configuration.
        criterion: a score, or Drop(amount, relative=...) against the float model's.
        candidates: what an operation may be: names of fxquant.tuning.candidates.CANDIDATES, or Candidates. Float is
            always among them.
        cost: "bit-ops" (fxquant.tuning.costs), or the "latency" of the whole model in onnxruntime on the example
            inputs, in turns with the float configuration's.
        evaluate_on: "onnxruntime" (the exported file, tensors on the CPU), "exact", or "float" simulation.
        sensitivity_batches: how many of the batches sensitivity is measured on.
        max_trials: the most configurations that are evaluated.
        folder: gets trials.json, and at the end chosen.toml, tuning.json and front.svg.
        resume: go on with the folder's run, if it has one: no configuration is evaluated twice. The criterion and
            max_trials may have changed since.
        overwrite: remove the folder's earlier run.
        seed: of every generator, before each evaluation.
        report: is given each configuration, once it is on disk.
        progress: show progress bars when standard error is a terminal.

    A configuration that the pipeline refuses is recorded as failed, and the search goes on. If none meets the criterion
    the result says so (`met`), and is the one with the best score.

    Raises ConfigError for wrong arguments and for a model in which nothing can be tuned, StorageError for a folder that
    holds another run, FxquantError if `evaluate` gives no finite score.
    """
    check_target(criterion, THING)
    require_evaluated_on(evaluate_on, THING)
    kind = _cost_kind(cost)
    for name, count in (("sensitivity_batches", sensitivity_batches), ("max_trials", max_trials)):
        if plain_integer(count) is None or count < 1:
            raise ConfigError(f"{THING}: {name}", expected="a whole number of 1 or more", got=repr(count))
    place = _folder(folder, resume, overwrite)
    wanted, seed = chosen_candidates(candidates), plain_seed(seed, THING)
    given = _listed(batches)
    start = config if isinstance(config, Pipeline) else load_pipeline(config)
    captured = capture(model, example_inputs)
    recipe = {
        "model": captured.fingerprint(),
        "config": start.to_toml(),
        "candidates": [str(item) for item in wanted],
        "batches": _digest(given),
        "sensitivity_batches": sensitivity_batches,
        "cost": kind.value,
        "evaluate_on": evaluate_on,
        "seed": seed,
    }
    log = TrialLog(None if place is None else place / LOG, recipe, resume=resume, overwrite=overwrite)
    known = {item.name: item for item in (*map(CANDIDATES.__getitem__, BASELINES), *wanted)}
    space = Space(captured, start, tuple(known.values()), given)
    setting = Setting(captured, space, given, evaluate, evaluate_on, kind, example_inputs, seed, progress)
    tuner = _Tuner(setting, log, max_trials, report)
    result = tuner.run(wanted, criterion, given[:sensitivity_batches])
    if place is not None:
        write_text(place / CHOSEN, result.pipeline.to_toml())
        result.save(place)
    return result


def _cost_kind(cost: str) -> Cost:
    names = [kind.value for kind in Cost]
    if cost not in names:
        raise ConfigError(f"{THING}: cost='{cost}'", remedy=nearest(str(cost), names))
    return Cost(cost)


def _folder(folder: str | os.PathLike[str] | None, resume: bool, overwrite: bool) -> Path | None:
    if resume and overwrite:
        raise ConfigError(THING, expected="resume or overwrite", got="both", remedy="Choose one of them.")
    if folder is None and (resume or overwrite):
        raise ConfigError(f"{THING}: {'resume' if resume else 'overwrite'}=True", expected="folder=", got="none")
    return None if folder is None else Path(folder)


def _listed(batches: Iterable[Batch]) -> list[Batch]:
    if isinstance(batches, torch.Tensor):
        remedy = "Put it in a list: [batch]."
        raise ConfigError(f"{THING}: batches", expected="an iterable of batches", got="a tensor", remedy=remedy)
    found = list(batches)
    if not found:
        raise ConfigError(f"{THING}: batches", expected="at least one batch", got="none")
    return found


def _digest(batches: Sequence[Batch]) -> str:
    """SHA-256 of the batches' tensors."""
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(list(batches)):
        tensor = torch.as_tensor(leaf).detach().cpu().contiguous()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


@dataclass
class _Tuner:
    """One run: every number comes out of the log, or goes into it."""

    setting: Setting
    log: TrialLog
    max_trials: int
    report: Callable[[TriedConfiguration], None] | None
    threshold: float = 0.0
    trials: dict[Assignment, TriedConfiguration] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    reference: Path | None = None  # the float configuration's file, for latency

    def run(self, wanted: Sequence[Candidate], criterion: float | Drop, batches: Sequence[Batch]) -> TuningResult:
        """All three phases."""
        setting, space = self.setting, self.setting.space
        if not space.groups:
            remedy = "print(program.coverage()) says why each value stays in float."
            raise ConfigError(THING, expected="operations that the config quantizes", got="none", remedy=remedy)
        float_score = self._kept(FLOAT_SCORE, lambda: setting.score(setting.captured, "float", "the float model"))
        self.threshold = threshold_of(criterion, float_score)
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
        return self._result(criterion, float_score, damages, is_complete)

    def _result(
        self, criterion: float | Drop, float_score: float, damages: tuple[dict[str, float], ...], is_complete: bool
    ) -> TuningResult:
        setting, trials = self.setting, tuple(self.trials.values())
        chosen = self._choice(trials)
        program, pipeline = setting.program(chosen.assignment)
        return TuningResult(
            program,
            pipeline,
            chosen,
            float_score,
            criterion,
            self.threshold,
            setting.cost,
            trials,
            setting.space.groups,
            damages,
            tuple(setting.space.left_out),
            is_complete,
        )

    def _choice(self, trials: Sequence[TriedConfiguration]) -> TriedConfiguration:
        """The cheapest that meets the criterion, of equal ones the more exact; else the best score."""
        found = [
            (trial, trial.score, trial.cost) for trial in trials if trial.score is not None and trial.cost is not None
        ]
        if not found:
            reasons = "; ".join(dict.fromkeys(trial.reason for trial in trials))
            raise FxquantError(f"{THING}: no configuration could be evaluated", got=reasons)
        met = [item for item in found if item[1] >= self.threshold]
        if met:
            return min(met, key=lambda item: (item[2], -item[1]))[0]
        return max(found, key=lambda item: (item[1], -item[2]))[0]

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
        return Outcome(trial.score >= self.threshold, trial.cost)

    def _trial(self, assignment: Assignment, name: str) -> TriedConfiguration:
        """What is known of a configuration; it is evaluated if nothing is."""
        if assignment in self.trials:
            return self.trials[assignment]
        if len(self.trials) >= self.max_trials:
            raise BudgetSpent
        key = f"configuration {','.join(assignment)}"
        record = self.log.get(key)
        if record is None:
            record = self._evaluated(assignment, name)
            self.log.put(key, record)
        trial = TriedConfiguration(name, assignment, **record)
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
        except REFUSALS as err:
            seconds = time.perf_counter() - start
            return {"score": None, "cost": None, "seconds": seconds, "reason": str(err)}
        score = self.setting.score(final, self.setting.evaluate_on, f"'{name}'")
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
