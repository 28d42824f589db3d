"""Accuracy-driven tuning: the configuration of mixed precision that reaches a target at the least cost.

The idea of tuning by a target accuracy is that of Intel's LPOT (Neural Compressor), that of sensitivity and
bit-operations AIMET's automatic mixed precision. Three phases:

    1. Sensitivity: each group's candidates alone, by the damage to the output on a few batches (sensitivity.py).
    2. Search: bisection along the order of damage for each unit of cost saved, then improvement (search.py).
    3. The choice: of all configurations that were evaluated and reach the target, the cheapest; of equal costs that
       with the fewest activation bits, so that nothing is widened without need.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx

from fxquant.capture import capture
from fxquant.errors import ConfigError, nearest
from fxquant.evaluation import Evaluate, EvaluatedOn, name_of, require_evaluated_on
from fxquant.files import write_text
from fxquant.graph.batches import Batch, batches_digest
from fxquant.graph.pass_data import require_repeatable
from fxquant.graph.pipeline import Pipeline, load_pipeline
from fxquant.schedule import plain_integer
from fxquant.training.seeding import plain_seed
from fxquant.trials import TrialLog
from fxquant.tuning.candidates import BASELINES, CANDIDATES, DEFAULT_CANDIDATES, Candidate, chosen_candidates
from fxquant.tuning.configurations import Space
from fxquant.tuning.probe import THING, Setting
from fxquant.tuning.result import Cost, TriedConfiguration, TuningResult
from fxquant.tuning.target import Drop, check_target
from fxquant.tuning.tuner import Tuner

LOG, CHOSEN = "trials.json", "chosen.toml"


def tune_precision(
    model: torch.nn.Module | torch.export.ExportedProgram | fx.GraphModule,
    example_inputs: Any,
    batches: Iterable[Batch],
    evaluate: Evaluate,
    *,
    target: float | Drop,
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
    """Find the configuration of mixed precision that reaches a target at the least cost.

        result = tune_precision(net, images[:1], batches, accuracy, target=Drop(0.01, relative=True))
        print(result)
        result.export("out")

    Arguments:
        model, example_inputs, config: as of QuantSim. The model is left untouched; the config's own rules hold.
        batches: for calibration; iterated anew many times: a list, a DataLoader without shuffling. No more than
            `sensitivity_batches` of them are held at a time.
        evaluate: takes a callable like the model and gives a score, the higher the better; called once for the float
            model (in torch) and once for each configuration. A run is resumed with that of the same name alone.
        target: a score, or Drop(amount, relative=...) against the float model's.
        candidates: what an operation may be: names of fxquant.tuning.candidates.CANDIDATES, or Candidates. Float is
            always among them.
        cost: "bit-ops" (fxquant.tuning.costs), or the "latency" of the whole model in onnxruntime on the example
            inputs, in turns with the float configuration's.
        evaluate_on: "onnxruntime" (the exported file, tensors on the CPU), "exact", or "float" simulation.
        sensitivity_batches: how many of the batches sensitivity is measured on.
        max_trials: the most configurations that are evaluated, baselines aside: uniform ones to compare with, which
            are never chosen where they have candidates that were not asked for.
        folder: gets trials.json, and at the end chosen.toml, tuning.json and front.svg.
        resume: go on with the folder's run, if it has one: no configuration is evaluated twice. Target and
            max_trials may have changed since.
        overwrite: remove the folder's earlier run.
        seed: of every generator, before each evaluation.
        report: is given each configuration, once it is on disk.
        progress: show progress bars when standard error is a terminal.

    A configuration that the pipeline refuses, or that has no finite score, is recorded as failed, and the search goes
    on. If none reaches the target the result says so (`reached`), and is the one with the best score.

    Raises ConfigError for wrong arguments and for a model in which nothing can be tuned, StorageError for a folder that
    holds another run, FxquantError if the float model has no finite score, or no configuration has one.
    """
    check_target(target, THING)
    require_evaluated_on(evaluate_on, THING)
    kind = _cost_kind(cost)
    for name, count in (("sensitivity_batches", sensitivity_batches), ("max_trials", max_trials)):
        if plain_integer(count) is None or count < 1:
            raise ConfigError(f"{THING}: {name}", expected="a whole number of 1 or more", got=repr(count))
    place = _folder(folder, resume, overwrite)
    wanted, seed = chosen_candidates(candidates), plain_seed(seed, THING)
    require_repeatable(batches)
    measured = _first(batches, sensitivity_batches)
    start = config if isinstance(config, Pipeline) else load_pipeline(config)
    captured = capture(model, example_inputs)
    recipe = {
        "model": captured.fingerprint(),
        "config": start.to_toml(),
        "candidates": [str(item) for item in wanted],
        "batches": batches_digest(batches),
        "sensitivity_batches": sensitivity_batches,
        "cost": kind.value,
        "evaluate": name_of(evaluate),
        "evaluate_on": evaluate_on,
        "seed": seed,
    }
    log = TrialLog(None if place is None else place / LOG, recipe, resume=resume, overwrite=overwrite)
    known = {item.name: item for item in (*wanted, *map(CANDIDATES.__getitem__, BASELINES))}
    known |= {item.name: item for item in wanted}  # one of a baseline's name is the user's
    space = Space(captured, start, tuple(known.values()), batches)
    setting = Setting(captured, space, batches, evaluate, evaluate_on, kind, example_inputs, seed, progress)
    tuner = Tuner(setting, log, max_trials, report)
    result = tuner.run(wanted, target, measured)
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


def _first(batches: Iterable[Batch], count: int) -> list[Batch]:
    found = list(islice(batches, count))
    if not found:
        raise ConfigError(f"{THING}: batches", expected="at least one batch", got="none")
    return found
