"""`fxquant tune`: drops and targets as text, files, and exit codes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fxquant.cli.main import main
from fxquant.cli.searching import drop, score
from fxquant.graph.storage import load_program
from fxquant.tuning.target import Drop

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))

def make():
    torch.manual_seed(0)
    return Net().eval()

X = torch.linspace(-1, 1, 4 * 64).reshape(4, 1, 8, 8)

def closeness(model):
    with torch.no_grad():
        expected = make()(X)
    return 1 - float(((model(X) - expected) ** 2).sum() / (expected ** 2).sum())

def other(model):
    return closeness(model)

def silent(model):
    model(X)
"""


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "tuned_net.py").write_text(CODE)
    data = np.linspace(-1, 1, 4 * 64, dtype=np.float32).reshape(4, 1, 8, 8)
    np.save(tmp_path / "x.npy", data)
    model = f"{tmp_path / 'tuned_net.py'}:"
    options = ["--data", str(tmp_path / "x.npy"), "--evaluate", f"{model}closeness", "--out", str(tmp_path / "out")]
    return ["tune", f"{model}make", *options, "--candidates", "int8_per_channel"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1%", Drop(0.01, relative=True)), ("0.5%", Drop(0.005, relative=True)), ("0.01", Drop(0.01)), ("0", Drop(0.0))],
)
def test_drop_is_read(text: str, expected: Drop) -> None:
    assert drop(text) == expected


@pytest.mark.parametrize("text", ["", "%", "-1%", "-0.1", "nan", ">=0.8", "one", "inf"])
def test_drop_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be a number of 0 or more, or one with %"):
        drop(text)


@pytest.mark.parametrize("text", ["", "nan", "-inf", "1%", "few"])
def test_target_that_is_no_score_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be a finite number"):
        score(text)


def test_both_searches_speak_of_their_goal_in_the_same_words(capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for command in ("autoquant", "tune"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        told.append(text[text.index("--target SCORE", text.index("options:")) : text.index("model's score")])
    assert told[0] == told[1] and "--drop" in told[0]


def test_files_are_written_and_the_target_is_reached(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--drop", "5%"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.onnx", "model.fxq", "model.toml", "tuning.json", "front.svg", "search"} <= names
    assert {path.name for path in (tmp_path / "out" / "search").iterdir()} >= {"trials.json", "chosen.toml"}
    text = capsys.readouterr().out
    assert "target (a drop of 5 %: " in text and "check it: fxquant parity" in text
    assert main([*arguments, "--drop", "5%"]) == 2  # a search is there
    assert "resume=True (--resume) continues that run" in capsys.readouterr().err
    others = [text.replace(":closeness", ":other") for text in arguments]
    assert main([*others, "--drop", "5%", "--resume"]) == 2
    assert "of another run: evaluate; expected" in capsys.readouterr().err
    assert main([*arguments, "--target", "2", "--resume"]) == 1  # no model is that good
    assert "target (2) NOT reached: " in capsys.readouterr().out
    assert main(["parity", str(tmp_path / "out" / "model.onnx"), "--data", str(tmp_path / "x.npy")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("cost", ["bit-ops", "latency"])
def test_written_pipeline_makes_the_same_program_in_a_process_of_its_own(
    cost: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = ["--candidates", "int8_per_channel,w4a8", "--drop", "0.0005", "--cost", cost]
    assert main([*arguments, *mixed]) == 0
    assert ("medians of runs in turns" in capsys.readouterr().out) is (cost == "latency")
    content = json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert content["reached"] and content["target"] == {"amount": 0.0005, "relative": False}
    data, config, out = str(tmp_path / "x.npy"), str(tmp_path / "out" / "model.toml"), str(tmp_path / "again")
    command = ["quantize", arguments[1], "--data", data, "--config", config, "--out", out]
    subprocess.run([sys.executable, "-m", "fxquant", *command], check=True, capture_output=True)
    x, codes = torch.from_numpy(np.load(data)), []
    for folder in ("out", "again"):
        program = load_program(tmp_path / folder / "model.fxq")
        program.simulate = "exact"
        with torch.no_grad():
            codes.append((program.fingerprint(), program.module(x)))
    assert codes[0][0] == codes[1][0] and torch.equal(codes[0][1], codes[1][1])


def test_evaluate_without_a_return_leaves_nothing_behind(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([text.replace(":closeness", ":silent") for text in arguments] + ["--drop", "5%"]) == 2
    assert "expected a number; got None. `evaluate` must return one number" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_candidate_is_an_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments[:-1], "int8", "--drop", "5%"]) == 2
    assert "candidate 'int8' is unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra",
    [
        ["--drop", "a lot"],
        ["--target", "nan"],
        ["--drop", "1%", "--target", "1"],
        ["--drop", "1%", "--cost", "energy"],
        [],
    ],
)
def test_wrong_options_are_usage_errors(arguments: list[str], extra: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main([*arguments, *extra])
    assert raised.value.code == 2
