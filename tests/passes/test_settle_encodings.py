"""settle-encodings: every grid computed once more, then frozen."""

from __future__ import annotations

import pytest
import torch

from fxquant.calibration import calibrate
from fxquant.errors import PassError
from fxquant.graph.manager import PassManager
from fxquant.graph.program import Program, Stage
from fxquant.numerics.fake_quant import Mode
from fxquant.passes import InsertFakeQuant, QuantizeBias, SettleEncodings
from tests.helpers import assert_golden, run_pass
from tests.passes.pipelines import IMAGE, before, residual


def calibrated() -> Program:
    program = before(InsertFakeQuant, residual(), IMAGE)
    PassManager([InsertFakeQuant(), QuantizeBias()]).run(program)
    calibrate(program, [IMAGE])
    return program


def test_all_grids_are_frozen_and_the_program_is_finalized() -> None:
    program = calibrated()
    run_pass(SettleEncodings(), program)
    assert program.stage is Stage.FINALIZED
    assert {module.mode for _, module in program.fake_quant_nodes()} == {Mode.FROZEN}


def test_weights_grids_are_those_of_the_weights_as_they_are() -> None:
    program = calibrated()
    with torch.no_grad():
        program.module.get_parameter("conv1.weight").mul_(3.0)
    before_scale = program.module.fake_quants.conv1_weight.scale.clone()  # type: ignore[union-attr]
    run_pass(SettleEncodings(), program)
    assert torch.allclose(program.module.fake_quants.conv1_weight.scale, before_scale * 3)  # type: ignore[union-attr]


def test_value_without_a_range_is_refused_by_name() -> None:
    program = calibrated()
    program.module.fake_quants.relu.scale.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(PassError, match="none for relu"):
        run_pass(SettleEncodings(), program)


def test_simulated_outputs_are_preserved_bit_for_bit() -> None:
    program = calibrated()
    with torch.no_grad():
        expected = program.module(IMAGE)
        run_pass(SettleEncodings(), program, IMAGE)
        assert torch.equal(program.module(IMAGE), expected)


def test_second_run_is_refused_by_stage() -> None:
    program = calibrated()
    run_pass(SettleEncodings(), program)
    with pytest.raises(PassError, match="finalized"):
        run_pass(SettleEncodings(), program)


def test_modes_are_golden() -> None:
    program = calibrated()
    run_pass(SettleEncodings(), program)
    names = [f"{node.name} {module.mode.value} {module.spec}" for node, module in program.fake_quant_nodes()]
    assert_golden("\n".join(names) + "\n", "settle_encodings_residual.txt")
