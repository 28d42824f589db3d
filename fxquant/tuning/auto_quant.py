"""AutoQuant: post-training algorithms, tried in the order of cost until the user's `evaluate` reaches a target.

The idea is that of AIMET's AutoQuant; the rule is greedy:

    a trial is the best pipeline before it, changed by one step; until there is one, the config changed by the step
    it is kept if its score is higher than the best before it; the first one that has a score always is
    the search ends with the first trial that is kept and reaches the threshold, or with the last step
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxquant.capture import capture
from fxquant.errors import ConfigError
from fxquant.evaluation import Evaluate, EvaluatedOn, name_of, require_evaluated_on
from fxquant.graph.batches import Batch, batches_digest
from fxquant.graph.pass_data import require_repeatable
from fxquant.graph.pipeline import Pipeline, load_pipeline
from fxquant.training.seeding import plain_seed
from fxquant.trials import TrialLog
from fxquant.tuning.auto_quant_files import AutoQuantFiles
from fxquant.tuning.auto_quant_result import AutoQuantResult, Trial
from fxquant.tuning.auto_quant_search import FLOAT, THING, Measure, Search
from fxquant.tuning.auto_quant_steps import Step, default_steps
from fxquant.tuning.target import Drop, check_target


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
            model (in torch) and once for each trial. A run is resumed with that of the same name alone.
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

    A trial that raises an FxquantError is recorded as failed, with the text, and the search goes on; but no step mends
    what the config as it is cannot be calibrated for (NaN in the data): that is raised at once. A step that does
    not apply, or gives the pipeline or the program of an earlier trial, is recorded as skipped.

    Raises ConfigError for arguments that contradict each other, StorageError for a folder that holds another run,
    FxquantError if the float model has no finite score, or if no trial has one.
    """
    check_target(target, THING)
    require_evaluated_on(evaluate_on, THING)
    require_repeatable(batches)
    seed = plain_seed(seed, THING)
    chosen = _checked_steps(default_steps(iterations, seed) if steps is None else steps, steps, iterations)
    files = AutoQuantFiles(None if folder is None else Path(folder))
    _check_folder(files, resume, overwrite)
    start = config if isinstance(config, Pipeline) else load_pipeline(config)
    captured = capture(model, example_inputs)
    recipe = {
        "model": captured.fingerprint(),
        "config": start.to_toml(),
        "batches": batches_digest(batches),
        "evaluate": name_of(evaluate),
        "evaluate_on": evaluate_on,
        "seed": seed,
    }
    log = TrialLog(files.log, recipe, resume=resume, overwrite=overwrite)
    if overwrite:
        files.clear()
    measure = Measure(captured, batches, evaluate, evaluate_on, seed, progress)
    return Search(measure, start, files, log, report).run(chosen, target)


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
