"""How the exact simulation adds up each layer is in the report: one line, and by layer as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from fxquant.cli.main import main
from fxquant.parity.sums import layer_sums, sums_text
from fxquant.simulation import Strategy
from tests.lowering.programs import float_program, quantized
from tests.parity.files import compare, export, residual_program

WIDE = Strategy(2, 1.16 * 2**24)


def test_line_counts_layers_and_names_those_beyond() -> None:
    sums = layer_sums({"a": Strategy(1, 2.0**20), "b": WIDE, "c": Strategy(1, 2.0**24), "d": Strategy(0, 2.0**26)})
    expected = "float32 at 2 layers; beyond 2^24: b (float32 in 2 parts, 1.16 of 2^24), d (float64, 4.00 of 2^24)"
    assert sums_text(sums) == f"sums: {expected}"
    assert sums_text(layer_sums({"b": WIDE})) == "sums: beyond 2^24: b (float32 in 2 parts, 1.16 of 2^24)"


def test_line_tells_float64_from_float32_within_the_certificate() -> None:
    sums = layer_sums({"a": Strategy(0, 2.0**20), "b": Strategy(1, 2.0**20)})
    assert sums_text(sums) == "sums: float64 at 1 layer, float32 at 1 layer; none beyond 2^24"


def test_report_of_the_exact_simulation_tells_how_layers_are_added_up(tmp_path: Path) -> None:
    program = residual_program()
    report = compare(program, export(program, tmp_path), simulation="exact")
    assert [item.node for item in report.sums] == ["conv2d", "conv2d_1", "linear"]
    assert "sums: float32 at 3 layers; none beyond 2^24" in str(report).splitlines()
    shape = program.node("x").meta["type"].shape
    found = fxquant.strategies(program, torch.zeros(2, *shape[1:]))
    assert {item.node: item.strategy for item in report.sums} == found
    loaded = json.loads(json.dumps(report.to_dict(), allow_nan=False))["sums"]
    assert [(item["node"], item["how"], item["parts"]) for item in loaded] == [
        (name, "float32", 1) for name in ("conv2d", "conv2d_1", "linear")
    ]
    assert all(item["largest"] == found[item["node"]].largest > 0 for item in loaded)


@pytest.mark.parametrize("simulation", ["float", "integer"])
def test_report_of_another_simulation_has_no_sums(tmp_path: Path, simulation: str) -> None:
    program = residual_program()
    report = compare(program, export(program, tmp_path), simulation=simulation)
    assert report.sums == () and "sums:" not in str(report) and report.to_dict()["sums"] == []


def test_layer_beyond_the_certificate_is_named_with_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x = torch.rand(2, 800)
    layer = nn.Linear(800, 2, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    program = quantized(float_program(layer, x), ("input_1", "linear"), x)
    fxquant.export_onnx(program, "model.onnx")
    program.save("model.fxq")
    torch.save(x, "x.pt")
    (tmp_path / "data.py").write_text("import torch\n\ndef batches():\n    yield torch.load('x.pt')\n")
    assert main(["parity", "model.onnx", "--data", "data.py:batches", "--json", "report.json"]) == 0
    (found,) = json.loads(Path("report.json").read_text())["sums"]
    share = found["largest"] / 2**24
    assert share > 1 and found["parts"] == 2
    line = f"sums: beyond 2^24: linear (float32 in 2 parts, {share:.2f} of 2^24)"
    assert line in capsys.readouterr().out.splitlines()
