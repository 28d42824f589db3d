"""What analyze refuses, and what it says then."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fxquant.analysis import analyze
from fxquant.errors import CalibrationError, FxquantError
from tests import preset_nets
from tests.analysis.cases import calibrated, prepared


def test_a_program_without_grids_is_refused() -> None:
    with pytest.raises(CalibrationError, match="expected a program at stage calibrated or finalized; got inserted"):
        analyze(prepared("plain"), preset_nets.batches("plain"))


def test_a_program_whose_quantizers_are_all_off_is_refused() -> None:
    program = calibrated("plain")
    with (
        program.quantizers(weights=False, activations=False),
        pytest.raises(FxquantError, match="quantizers; got none that is on"),
    ):
        analyze(program, preset_nets.batches("plain"))


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ([], "at least one batch; got none"),
        (torch.zeros(2, 3, 8, 8), "an iterable of batches; got a tensor"),
        ([torch.zeros(2, 5, 8, 8)], "batch 0: batch: input 'x'"),
        ([torch.full((2, 3, 8, 8), math.nan)], "output is NaN in batch 0"),
        ([torch.full((2, 3, 8, 8), math.inf)], "NaN in batch 0|not finite in batch 0"),
    ],
)
def test_batches_that_cannot_be_measured_are_refused(batches: Any, text: str) -> None:
    with pytest.raises(FxquantError, match=text):
        analyze(calibrated("plain"), batches)


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused(score: float) -> None:
    with pytest.raises(FxquantError, match="analyze: the score of 'float'; expected a finite number"):
        analyze(calibrated("plain"), preset_nets.batches("plain"), lambda model: score)


@pytest.mark.parametrize(("key", "value"), [("max_batches", 0), ("seed", -1)])
def test_options_out_of_range_are_refused(key: str, value: int) -> None:
    with pytest.raises(FxquantError, match=f"analyze: {key}"):
        analyze(calibrated("plain"), preset_nets.batches("plain"), **{key: value})
