"""`fxquant analyze`, run as a user would: on a model file and arrays in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxquant.analysis import AnalysisReport
from fxquant.cli.main import main
from tests.cli.model_file import write_images, write_model_file

MORE = """
def score(model):
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return float(model(x).abs().mean())

def other_score(model):
    return 1.0 + score(model)

def constant(model):
    return 1.0

def broken(model):
    raise ValueError("no images")

def empty(model):
    return float("nan")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model file and data, as the working directory."""
    write_model_file(tmp_path, MORE)
    write_images(tmp_path / "images.npy")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_analyze_writes_a_table_json_and_a_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["analyze", "model.py:make_net", "--data", "images.npy", "--evaluate", "model.py:score", "--out", "out"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "12 samples in 2 batches; damage by evaluate" in printed and "rules = [" in printed
    assert printed.endswith("wrote out/analysis.json, out/analysis.html\n")
    report = AnalysisReport.from_dict(json.loads((folder / "out" / "analysis.json").read_text()))
    assert {row.name for row in report.units} == {"x", "conv", "mean_pool", "fc"}
    assert (folder / "out" / "analysis.html").read_text().startswith("<!doctype html>")
    assert main([*arguments, "--resume", "--json", "-"]) == 0
    assert AnalysisReport.from_dict(json.loads(capsys.readouterr().out)) == report


def test_analyze_touches_an_earlier_run_only_if_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["analyze", "model.py:make_net", "--data", "images.npy", "--evaluate", "model.py:score", "--out", "out"]
    assert main(arguments) == 0
    kept = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "'out/analysis_trials.json' is there already" in error and "--overwrite removes it" in error
    assert main([*arguments, "--seed", "1", "--resume"]) == 2
    assert "of another run: seed" in capsys.readouterr().err
    assert main([*arguments[:-3], "model.py:other_score", "--out", "out", "--resume"]) == 2
    assert "of another run: evaluate; expected model.py:other_score; got model.py:score" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == kept
    assert main([*arguments, "--seed", "1", "--overwrite"]) == 0
    assert json.loads((folder / "out" / "analysis_trials.json").read_text())["recipe"]["seed"] == 1


def test_analyze_suggests_no_rules_where_no_layer_does_harm(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["analyze", "model.py:make_net", "--data", "images.npy"]
    assert main([*arguments, "--evaluate", "model.py:constant"]) == 0
    printed = capsys.readouterr().out
    assert "# No layer does harm beyond the noise floor" in printed and "{ node =" not in printed
    assert main([*arguments, "--suggest", "0"]) == 0
    assert "rules" not in capsys.readouterr().out
    assert main(arguments) == 0
    assert "\n  { node =" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["model.py:make_net", "--evaluate", "model.py:scor"],
        ["model.py:make_nt", "--evaluate", "model.py:score"],
        ["model.py:make_net", "--evaluate", "model.py:broken"],
        ["model.py:make_net", "--config", "int8_per_tenso"],
        ["none.fxq"],
    ],
)
def test_analyze_leaves_no_folder_of_a_run_that_cannot_begin(folder: Path, arguments: list[str]) -> None:
    assert main(["analyze", *arguments, "--data", "images.npy", "--out", "deep/out"]) == 2
    trials = folder / "deep" / "out" / "analysis_trials.json"  # of a run that had begun, for --resume
    assert trials.is_file() if "model.py:broken" in arguments else not (folder / "deep").exists()


def test_analyze_reads_a_saved_program_and_needs_no_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "model.py:make_net", "--data", "images.npy", "--out", "out"]) == 0
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert main(["analyze", "out/model.fxq", "--data", "images.npy", "--max-batches", "1", "--top", "1"]) == 0
    printed = capsys.readouterr().out
    assert "(stage finalized), 8 samples in 1 batch;" in printed and "3 more layers do less harm" in printed
    assert sorted(path for path in folder.rglob("*") if "__pycache__" not in str(path)) == [
        path for path in before if "__pycache__" not in str(path)
    ]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["model.py:make_net", "--evaluate", "model.py:broken"], "evaluate 'model.py:broken' raised"),
        (
            ["model.py:make_net", "--evaluate", "model.py:empty"],
            "the score of 'float'; expected a finite number; got nan",
        ),
        (["model.py:make_net", "--evaluate", "model.py:scor"], "expected an attribute 'scor'"),
        (["model.py:make_net", "--resume"], "analyze --resume; expected --out"),
        (["model.py:make_net", "--overwrite"], "analyze --overwrite; expected --out"),
        (["model.onnx"], "model 'model.onnx'"),
        (["none.fxq", "--config", "int8_per_tensor"], "expected no --config; got --config int8_per_tensor"),
        (["model.py:make_net", "--config", "int8_per_tenso"], "Did you mean 'int8_per_tensor'"),
        (["model.py:make_net", "--out", "model.py"], "folder 'model.py' cannot be written to"),
    ],
)
def test_analyze_says_what_is_wrong_in_one_line(
    folder: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", *arguments, "--data", "images.npy"]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
