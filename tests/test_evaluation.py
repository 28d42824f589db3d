"""A user's evaluate asked about a program, on each of the three things that it can be evaluated on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxquant
from fxquant.errors import ConfigError, FxquantError
from fxquant.evaluation import EVALUATED_ON, EvaluatedOn, lowered, quantized, require_evaluated_on, score_of
from fxquant.graph.pipeline import load_pipeline
from fxquant.graph.program import Stage
from fxquant.passes import Recalibrate
from tests.passes.pipelines import IMAGE, residual


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
