"""Passes that measure: batches, the float reference, refusal without them, and the [[optimize]] section."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import fxquant
from fxquant.calibration import calibrate
from fxquant.errors import ConfigError, PassError
from fxquant.graph.manager import PassManager
from fxquant.graph.pass_data import PassData
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.pipeline import load_pipeline, parse_pipeline
from fxquant.graph.program import Program, Stage
from fxquant.graph.rewriter import Rewriter
from fxquant.graph.segment import values_of
from fxquant.numerics.fake_quant import Mode
from fxquant.passes import Recalibrate
from tests.helpers import run_pass
from tests.passes.pipelines import IMAGE, residual

SEEN: list[tuple[str, float, int]] = []


@dataclass(frozen=True)
class Halve(Pass):
    """Halve conv1's weight, and write down what the reference says of the output, and how many batches there are."""

    name: ClassVar[str] = "halve"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CALIBRATED,)
    contract: ClassVar[Contract] = Contract.CHANGES

    @property
    def needs_data(self) -> bool:
        return True

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        batches = list(rewriter.data.batches)
        (values,) = values_of(rewriter.reference, [IMAGE], ["fc"])
        SEEN.append((self.name, float(values["fc"].sum()), len(batches)))
        rewriter.set_tensor("conv1.weight", program.module.get_parameter("conv1.weight") / 2)


def calibrated() -> Program:
    program = fxquant.capture(residual(), IMAGE)
    load_pipeline("int8_per_channel").prepare(program)
    calibrate(program, [IMAGE])
    return program


def test_all_passes_of_a_run_compare_with_the_float_program_of_its_beginning() -> None:
    SEEN.clear()
    program = calibrated()
    with torch.no_grad():
        expected = float(residual()(IMAGE).sum())
    PassManager([Halve(), Halve()]).run(program, data=PassData([IMAGE, IMAGE]))
    assert [count for _, _, count in SEEN] == [2, 2]
    assert [total for _, total, _ in SEEN] == pytest.approx([expected, expected], rel=1e-5)


def test_without_batches_nothing_runs() -> None:
    program = calibrated()
    fingerprint = program.fingerprint()
    with pytest.raises(PassError, match=r"'halve' measures with batches.*pipeline.optimize"):
        PassManager([Halve()]).run(program)
    assert program.fingerprint() == fingerprint


@pytest.mark.parametrize("batches", (iter([IMAGE]), IMAGE), ids=("iterator", "tensor"))
def test_batches_that_last_for_one_pass_are_refused(batches: object) -> None:
    with pytest.raises(PassError, match="iterated anew"):
        PassData(batches)  # type: ignore[arg-type]


def test_recalibration_finds_the_ranges_of_other_batches() -> None:
    program = calibrated()
    run_pass(Recalibrate(), program, data=PassData([IMAGE * 3], progress=False))
    again = fxquant.capture(residual(), IMAGE)
    load_pipeline("int8_per_channel").prepare(again)
    calibrate(again, [IMAGE * 3])
    assert program.fingerprint() == again.fingerprint() and program.stage is Stage.CALIBRATED


def test_recalibration_leaves_what_is_frozen() -> None:
    program = calibrated()
    module = program.module.fake_quants.relu  # type: ignore[union-attr]
    module.mode = Mode.FROZEN  # type: ignore[union-attr]
    scale = module.scale.clone()  # type: ignore[union-attr]
    run_pass(Recalibrate(), program, data=PassData([IMAGE * 3]))
    assert torch.equal(module.scale, scale) and module.mode is Mode.FROZEN  # type: ignore[union-attr]


def test_a_failed_recalibration_is_rolled_back() -> None:
    program = calibrated()
    fingerprint = program.fingerprint()
    with pytest.raises(PassError, match="not finite"):
        run_pass(Recalibrate(), program, data=PassData([IMAGE * 3, IMAGE / 0]))
    assert program.fingerprint() == fingerprint
    with torch.no_grad():
        assert bool(program.module(IMAGE).isfinite().all())


def with_optimize(name: str) -> str:
    return load_pipeline("int8_per_channel").to_toml() + f'\n[[optimize]]\npass = "{name}"\n'


def test_optimize_section_is_read_run_and_written() -> None:
    pipeline = parse_pipeline(with_optimize("recalibrate"), "mine", place="mine.toml")
    assert [item.name for item in pipeline.optimize_passes] == ["recalibrate"]
    assert parse_pipeline(pipeline.to_toml(), "mine", place="").to_toml() == pipeline.to_toml()
    program = calibrated()
    trace = pipeline.optimize(program, [IMAGE * 3])
    assert [entry.item.name for entry in trace.entries] == ["recalibrate"]


def test_changes_keep_the_optimize_section() -> None:
    pipeline = parse_pipeline(with_optimize("recalibrate"), "mine", place="mine.toml")
    changed = pipeline.override(activation=fxquant.SpecOverride(estimator="mse")).with_schedule(pipeline.schedule)
    assert len(changed.optimize_passes) == 1 and len(changed.changed(optimize=[]).optimize_passes) == 0


@pytest.mark.parametrize("name", ("fold-batch-norm", "settle-encodings"))
def test_passes_of_other_stages_are_refused_there(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{name}' under \[\[optimize\]\]"):
        parse_pipeline(with_optimize(name), "mine", place="mine.toml")


def test_sim_optimizes(tmp_path: Path) -> None:
    pipeline = parse_pipeline(with_optimize("recalibrate"), "mine", place="mine.toml")
    sim = fxquant.QuantSim(residual(), IMAGE, pipeline)
    sim.compute_encodings([IMAGE])
    sim.optimize([IMAGE * 3], folder=tmp_path)
    path = sim.export(tmp_path)
    assert sim.check_parity(path, [IMAGE]).exact
