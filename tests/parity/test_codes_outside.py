"""Codes that the file's own grid does not have: a verdict on the quantizer that gives them, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from fxquant.cli.main import main
from fxquant.graph.program import Program
from fxquant.lowering.export import export_onnx
from fxquant.parity import ParityReport, Verdict, check_parity
from fxquant.parity.simulation import SIMULATIONS, RuntimeCodes
from tests.lowering.programs import image
from tests.parity.files import ONE_THREAD, bypass_clip, change_code, export, narrow_gates_program, plant


def compared(program: Program, path: Path, simulation: str) -> ParityReport:
    """On images that leave the calibrated range."""
    return check_parity(program, path, [3 * image(2, 7)], simulation=simulation, options=ONE_THREAD, progress=False)


@pytest.mark.parametrize("simulation", ["float", "exact", "integer"])
def test_codes_outside_the_grid_are_their_quantizers_fault(tmp_path: Path, simulation: str) -> None:
    program = narrow_gates_program(tmp_path)
    path = export(program, tmp_path)
    assert compared(program, path, simulation).fault == ()
    report = compared(program, plant(path, bypass_clip("first")), simulation)
    assert report.fault == ("first",) and report.verdict.startswith("FAULT at first: ")
    (row,) = [row for row in report.rows if row.verdict.is_fault]
    assert row.value == "first" and row.verdict is Verdict.DIFFERS
    count = int(row.reason.split(" ")[0])
    assert row.reason == f"{count} codes outside the grid [0, 15] in batch 0" and 0 < count <= row.local.differing
    assert f"first: {row.reason}" in str(report)
    inherited = {row.value: row.origin for row in report.code_rows if row.verdict is Verdict.INHERITED}
    assert set(inherited.values()) <= {"first"}


def test_fault_elsewhere_is_found_beside_codes_outside_the_grid(tmp_path: Path) -> None:
    program = narrow_gates_program(tmp_path)
    both = plant(plant(export(program, tmp_path), bypass_clip("first")), change_code("last_weight.codes", 1))
    report = check_parity(program, both, [3 * image(2, 7)], simulation="exact", check_stored=False, progress=False)
    assert set(report.fault) == {"first", "last"}


@pytest.mark.parametrize("simulation", ["exact", "integer"])
def test_command_prints_the_verdict_and_ends_with_1_when_codes_are_outside_the_grid(
    tmp_path: Path, simulation: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    program = narrow_gates_program(tmp_path)
    export_onnx(program, "model.onnx")
    program.save("model.fxq")
    model = onnx.load("model.onnx")
    bypass_clip("first")(model.graph)
    onnx.save(model, "model.onnx")
    np.save("x.npy", (3 * image(2, 7)).numpy())
    arguments = ["parity", "model.onnx", "--data", "x.npy", "--simulation", simulation, "--json", "report.json"]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("FAULT at first: ") and printed.err == ""
    rows = {row["value"]: row for row in json.loads(Path("report.json").read_text())["rows"]}
    assert "codes outside the grid [0, 15]" in rows["first"]["reason"]


@pytest.mark.parametrize("simulation", ["exact", "integer"])
def test_codes_outside_the_grid_teach_as_its_nearest_codes(tmp_path: Path, simulation: str) -> None:
    program = narrow_gates_program(tmp_path)
    node = program.node("first_fq")
    module = program.fake_quant(node)
    assert module is not None
    codes = torch.arange(2 * 8 * 6 * 6, dtype=torch.int32).view(2, 8, 6, 6) % 40

    def taught(given: torch.Tensor) -> list[torch.Tensor]:
        teacher = {node.name: RuntimeCodes(given, module.scale, module.zero_point)}
        steps = SIMULATIONS[simulation].run(program, {"x": image()}, teacher)
        return [step.value for step in steps if step.node is not node]

    pairs = list(zip(taught(codes), taught(codes.clamp(0, 15)), strict=True))
    assert len(pairs) > 3 and all(torch.equal(*pair) for pair in pairs)
