"""A captured program quantized by a pipeline, and a user's `evaluate` asked about it: in float simulation, in `exact`,
or as onnxruntime runs it.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from fxquant.calibration import calibrate
from fxquant.errors import ConfigError, ScoreError, nearest
from fxquant.graph.batches import Batch
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Program, Stage
from fxquant.graph.segment import in_eval_mode
from fxquant.lowering.export import export_onnx
from fxquant.parity.lowered_model import LoweredModel

Evaluate = Callable[[Callable[..., Any]], float]  # takes what is called like the model; a score, the higher the better
EvaluatedOn = Literal["onnxruntime", "exact", "float"]
EVALUATED_ON: tuple[EvaluatedOn, ...] = ("onnxruntime", "exact", "float")


def require_evaluated_on(on: str, thing: str, known: tuple[str, ...] = EVALUATED_ON) -> None:
    """Refuse an unknown name of what is evaluated on."""
    if on not in known:
        raise ConfigError(f"{thing}: evaluate_on='{on}'", remedy=nearest(on, known))


def name_of(evaluate: Evaluate) -> str:
    """What a run's record calls an `evaluate`, so that it is not continued with another: "package.module:name".

    An object that is callable goes by its class, a partial by its function; a script that is run by its file's name.
    """
    while isinstance(evaluate, partial):
        evaluate = evaluate.func
    named = evaluate if hasattr(evaluate, "__qualname__") else type(evaluate)
    module = str(getattr(named, "__module__", ""))
    return f"{_main_name() if module == '__main__' else module}:{named.__qualname__}"


def _main_name() -> str:
    """What the module that is run would be called if it were imported."""
    main = sys.modules["__main__"]
    if main.__spec__ is not None:
        return main.__spec__.name
    return Path(getattr(main, "__file__", None) or "__main__").stem


def quantized(
    captured: Program, pipeline: Pipeline, batches: Iterable[Batch], folder: Path | None = None, progress: bool = False
) -> Program:
    """A copy of a captured program that the pipeline prepared, calibrated and optimized, on the same batches.

    folder: where optimize passes keep what they have finished (Pipeline.optimize).
    """
    twin = captured.copy()
    pipeline.prepare(twin, batches=batches)
    if twin.stage is Stage.INSERTED:
        calibrate(twin, batches, progress=progress)
    if len(pipeline.optimize_passes):
        pipeline.optimize(twin, batches, folder=folder, progress=progress)
    twin.module.eval()
    return twin


def lowered(program: Program, pipeline: Pipeline) -> Program:
    """A finalized copy in eval mode, ready for export; the program stays as it is."""
    twin = program.copy()
    twin.module.eval()
    pipeline.finalize(twin)
    return twin


def score_of(program: Program, evaluate: Evaluate, on: EvaluatedOn, thing: str) -> float:
    """What `evaluate` says of a program, in eval mode, without gradients.

    Arguments:
        program: finalized for "onnxruntime" and "exact"; "float" takes any stage.
        on: "onnxruntime": the exported file, tensors on the CPU. "exact": the same integers, where the program is.
            "float": fake quantization, the fastest, for searches.
        thing: for messages ("train_qat: score after epoch 3").

    Raises ScoreError for a score that is no number, or not finite.
    """
    if on == "onnxruntime":
        program.module.eval()
        with tempfile.TemporaryDirectory(prefix="fxquant-") as folder:
            path = Path(folder) / "model.onnx"
            export_onnx(program, path)
            score = _number(evaluate(LoweredModel(program, path)), thing)
    else:
        before = program.simulate
        program.simulate = on
        try:
            with in_eval_mode(program.module), torch.no_grad():
                score = _number(evaluate(program.module), thing)
        finally:
            program.simulate = before
    if not math.isfinite(score):
        raise ScoreError(
            thing,
            expected="a finite number",
            got=str(score),
            remedy="Does `evaluate` divide by the number of its samples, and are there any?",
        )
    return score


def _number(found: Any, thing: str) -> float:
    """What `evaluate` gave, as a float."""
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError) as err:  # RuntimeError: torch, of a tensor with several elements
        got = "None" if found is None else f"{type(found).__name__}: {err}"
        remedy = "`evaluate` must return one number: has each of its branches a `return`?"
        raise ScoreError(thing, expected="a number", got=got, remedy=remedy) from err
