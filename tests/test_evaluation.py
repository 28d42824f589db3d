"""A user's evaluate asked about a program, on each of the three things that it can be evaluated on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fxquant
from fxquant.cli.loading import load_evaluate
from fxquant.errors import ConfigError, FxquantError
from fxquant.evaluation import (
    EVALUATED_ON,
    Evaluate,
    EvaluatedOn,
    lowered,
    name_of,
    quantized,
    require_evaluated_on,
    score_of,
)
from fxquant.graph.pipeline import load_pipeline
from fxquant.graph.program import Stage
from fxquant.passes import Recalibrate
from tests.passes.pipelines import IMAGE, residual

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(fxquant.__file__).parent.parent)}


def total(model: Callable[..., Any]) -> float:
    found = model(IMAGE)
    assert isinstance(found, torch.Tensor) and not found.requires_grad
    return float(found.double().sum())


@pytest.mark.parametrize("on", EVALUATED_ON)
def test_score_is_that_of_the_quantized_program(on: EvaluatedOn) -> None:
    pipeline = load_pipeline("int8_per_channel").changed(optimize=[Recalibrate()])
    captured = fxquant.capture(residual(), IMAGE)
    program = quantized(captured, pipeline, [IMAGE])
    assert captured.stage is Stage.CAPTURED and program.stage is Stage.CALIBRATED
    ready = lowered(program, pipeline)
    assert program.stage is Stage.CALIBRATED and ready.stage is Stage.FINALIZED
    score = score_of(ready, total, on, "test")
    with torch.no_grad():
        reference = float(residual()(IMAGE).double().sum())
    assert score != reference and score == pytest.approx(reference, abs=0.3)
    assert ready.simulate == "float"
    if on != "float":
        assert score == score_of(ready, total, "onnxruntime", "test")


def test_score_that_is_no_number_is_refused() -> None:
    program = fxquant.capture(residual(), IMAGE)
    with pytest.raises(FxquantError, match="trial 3; expected a finite number; got nan"):
        score_of(program, lambda model: float("nan"), "float", "trial 3")


@pytest.mark.parametrize(
    ("on", "found"),
    [("onnxruntime", None), ("float", None), ("float", "good"), ("float", torch.ones(2)), ("float", {"top1": 0.5})],
)
def test_evaluate_that_returns_no_number_is_told_to(on: EvaluatedOn, found: Any) -> None:
    pipeline = load_pipeline("int8_per_channel")
    program = fxquant.capture(residual(), IMAGE)
    if on == "onnxruntime":
        program = lowered(quantized(program, pipeline, [IMAGE]), pipeline)
    with pytest.raises(FxquantError, match="trial 3; expected a number; got .*must return one number") as caught:
        score_of(program, lambda model: found, on, "trial 3")
    assert (caught.value.got == "None") is (found is None)


class Holding:
    """A score that holds something, as a callable and as a method."""

    def __call__(self, model: Callable[..., Any]) -> float:
        return 0.5

    def score(self, model: Callable[..., Any]) -> float:
        return 0.5


@pytest.mark.parametrize(
    ("evaluate", "name"),
    [
        (total, "tests.test_evaluation:total"),
        (Holding(), "tests.test_evaluation:Holding"),
        (Holding().score, "tests.test_evaluation:Holding.score"),
        (partial(partial(Holding.score, Holding())), "tests.test_evaluation:Holding.score"),
        (load_evaluate("tests.test_evaluation:total"), "tests.test_evaluation:total"),
    ],
)
def test_evaluate_goes_by_its_module_and_name(evaluate: Evaluate, name: str) -> None:
    assert name_of(evaluate) == name


def test_evaluate_of_a_script_has_the_same_name_when_run_and_when_imported(tmp_path: Path) -> None:
    path = tmp_path / "score.py"
    path.write_text("from fxquant.evaluation import name_of\ndef top1(model): ...\nprint(name_of(top1))\n")
    for command in ([str(path)], ["-m", "score"], ["-c", "import score"]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.stdout == "score:top1\n", done.stderr


def test_evaluate_of_a_file_goes_by_what_the_command_line_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "score.py").write_text("def top1(model):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    assert name_of(load_evaluate("./score.py:top1")) == name_of(load_evaluate("score.py:top1")) == "score.py:top1"


def test_unknown_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="evaluate_on='onxruntime'"):
        require_evaluated_on("onxruntime", "tune")


def test_simulation_is_given_back_when_evaluate_raises() -> None:
    program = fxquant.capture(residual(), IMAGE)

    def failing(model: Callable[..., Any]) -> float:
        raise ValueError("no labels")

    with pytest.raises(ValueError, match="no labels"):
        score_of(program, failing, "exact", "test")
    assert program.simulate == "float"
