"""Program: grids that a state_dict brought are used once they are adopted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import CalibrationError
from fxquant.graph.program import Program, Stage
from fxquant.numerics.fake_quant import Mode
from tests.helpers import residual_program

PIPELINE = "int8_per_channel"


def prepared() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    program = fxquant.capture(model, torch.randn(2, 3, 8, 8))
    fxquant.load_pipeline(PIPELINE).prepare(program)
    return program


def calibrated() -> Program:
    program = prepared()
    fxquant.calibrate(program, [torch.randn(2, 3, 8, 8)], progress=False)
    return program


def test_adopted_encodings_compute_what_the_calibrated_program_does() -> None:
    source, program, x = calibrated(), prepared(), torch.randn(2, 3, 8, 8)
    program.module.load_state_dict(source.module.state_dict())
    expected = source.module(x)
    assert not torch.equal(program.module(x), expected)  # grids are there, but every FakeQuant observes
    program.module.load_state_dict(source.module.state_dict())
    program.adopt_encodings()
    assert program.stage is Stage.CALIBRATED
    assert all(module.mode is Mode.FAKE for _, module in program.fake_quant_nodes())
    assert torch.equal(program.module(x), expected)
    fxquant.load_pipeline(PIPELINE).finalize(program)
    assert "finalized" in str(program)


def test_adopting_leaves_quantizers_that_are_off() -> None:
    program = prepared()
    program.module.load_state_dict(calibrated().module.state_dict())
    _, first = next(program.fake_quant_nodes())
    first.mode = Mode.OFF
    program.adopt_encodings()
    assert first.mode is Mode.OFF


def test_values_without_a_grid_are_listed_and_nothing_changes() -> None:
    program = prepared()
    program.module.load_state_dict(calibrated().module.state_dict())
    node, module = next(program.fake_quant_nodes())
    module.scale.fill_(float("nan"))
    with pytest.raises(CalibrationError, match=f"expected a grid for every value; got none for {node.args[0]}. Load"):
        program.adopt_encodings()
    assert program.stage is Stage.INSERTED
    assert all(module.mode is Mode.OBSERVE for _, module in program.fake_quant_nodes())


def test_adopting_at_another_stage_is_refused() -> None:
    with pytest.raises(CalibrationError, match="stage inserted; got captured. Run the pipeline's prepare passes first"):
        residual_program().adopt_encodings()
    with pytest.raises(CalibrationError, match="got calibrated. Nothing to adopt"):
        calibrated().adopt_encodings()
