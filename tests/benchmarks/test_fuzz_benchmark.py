"""The fuzz benchmark counts what it ran, exits with 1 on a failure, and saves one that runs again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fxquant
from benchmarks import fuzz
from fxquant.errors import ExportError
from fxquant.graph.program import Program
from fxquant.numerics.codes import Grid
from fxquant.simulation import integer

QUICK = ["--simulations", "integer", "--seed", "0"]


def rounds_down(accumulator: torch.Tensor, multiplier: torch.Tensor, out: Grid) -> torch.Tensor:
    """Requantization that cuts the fraction off."""
    scaled = accumulator.to(torch.float32) * multiplier
    low, high = float(out.qmin - out.zero_point), float(out.qmax - out.zero_point)
    return torch.floor(scaled.clamp(low, high)).to(torch.int64) + out.zero_point


def test_figures_are_counted_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fuzz.json"
    assert fuzz.main([*QUICK, "--examples", "3", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert figures["programs"] == 3 and figures["endings"] == {"passed": 3}
    assert figures["codes_compared"] > 0 and figures["codes_differing"] == 0
    assert set(figures["seconds"]) == {"median", "p95", "total"} and figures["environment"]["seed"] == 0
    text = capsys.readouterr().out
    assert "seed 0, simulations integer" in text and "programs: 3; 3 passed" in text
    assert "ok   0 crashes: 0 of 3 programs" in text


def test_failure_is_shrunk_saved_and_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(integer, "requantize", rounds_down)
    few = [*QUICK, "--most-trials", "60"]
    assert fuzz.main([*few, "--examples", "3", "--out", str(tmp_path)]) == 1
    assert "FAIL 0 differing codes at certified nodes" in capsys.readouterr().out
    saved = next(tmp_path.glob("0-*"))
    assert (saved / "drawn" / "description.json").exists()
    assert fuzz.main([*few, "--repro", str(saved)]) == 1
    monkeypatch.undo()
    assert fuzz.main([*few, "--repro", str(saved / "description.json")]) == 0
    assert "passed : 0 of" in capsys.readouterr().out


def test_exit_code_is_1_when_every_program_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(program: Program, path: Path) -> Path:
        raise ExportError("its int32 accumulator may reach 3e9")

    monkeypatch.setattr(fxquant, "export_onnx", refuse)
    assert fuzz.main([*QUICK, "--examples", "3"]) == 1
    text = capsys.readouterr().out
    assert "ok   0 crashes: 0 of 3 programs" in text and "refused by: 3 accumulator beyond int32" in text
    assert "FAIL codes compared, few programs refused: no code of 3 programs was compared" in text


def test_exit_code_is_1_when_too_many_programs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    export, made = fxquant.export_onnx, list[Path]()

    def refuse_second(program: Program, path: Path) -> Path:
        made.append(path)
        if len(made) == 2:
            raise ExportError("its int32 accumulator may reach 3e9")
        return export(program, path)

    monkeypatch.setattr(fxquant, "export_onnx", refuse_second)
    assert fuzz.main([*QUICK, "--examples", "3"]) == 1


def test_repro_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "description.json"
    path.write_text("{}")
    assert fuzz.main(["--repro", str(path)]) == 2
    assert "is no saved description" in capsys.readouterr().err


def test_help_gives_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        fuzz.parse(["--help"])
    assert left.value.code == 0
    assert "examples:\n  python -m benchmarks.fuzz" in capsys.readouterr().out
