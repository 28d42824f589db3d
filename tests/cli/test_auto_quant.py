"""`fxquant autoquant`, run as a user would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxquant.cli.main import main
from fxquant.graph.pipeline import load_pipeline
from tests.cli.model_file import write_images, write_model_file

MORE = """
def closeness(model):
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with open("calls.txt", "a") as file:
        file.write(".")
    return 1 - float((model(x) - make_net().eval()(x)).detach().abs().mean())

def other(model):
    return closeness(model)

def worn(model):
    with open("asked.txt", "a+") as file:
        file.write(".")
        return 1 / (file.tell() != 2)

def wrong(model):
    return 1 / 0

def silent(model):
    model(torch.zeros(1, 3, 8, 8))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model file and data, as the working directory."""
    write_model_file(tmp_path, MORE, "auto_model.py")
    write_images(tmp_path / "images.npy", 8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def autoquant(*options: str, evaluate: str = "closeness", out: str = "out") -> int:
    """The command, evaluated in float simulation."""
    frame = ["autoquant", "auto_model.py:make_net", "--data", "images.npy", "--evaluate", f"auto_model.py:{evaluate}"]
    return main([*frame, "--out", out, "--evaluate-on", "float", *options])


def test_reached_target_writes_the_model_its_pipeline_and_the_trials(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert autoquant("--drop", "50%", "--config", "int8_per_tensor") == 0
    text = capsys.readouterr().out
    assert text.startswith("as configured: kept, score 0.9") and "target (a drop of 50 %: 0.5) reached" in text
    names = {"model.onnx", "model.fxq", "model_float.onnx", "model.encodings", "model_state_dict.pth", "model.toml"}
    assert names | {"autoquant.json", "search"} == {path.name for path in (folder / "out").iterdir()}
    assert "wrote out/model.onnx" in text and "check it: fxquant parity out/model.onnx" in text
    told = json.loads((folder / "out" / "autoquant.json").read_text())
    assert told["reached"] and told["target"] == {"amount": 0.5, "relative": True}
    assert load_pipeline(folder / "out" / "model.toml").to_toml() == told["pipeline"]
    assert main(["parity", "out/model.onnx", "--data", "images.npy"]) == 0


def test_missed_target_gives_1_and_the_best_all_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert autoquant("--target", "1.5", "--iterations", "2") == 1
    text = capsys.readouterr().out
    assert "target (1.5) NOT reached" in text and "AdaRound" in text and (folder / "out" / "model.onnx").is_file()
    told = json.loads((folder / "out" / "autoquant.json").read_text())
    assert not told["reached"] and told["untried"] == []
    assert told["score"] == max(trial["score"] or 0.0 for trial in told["trials"])


def test_second_run_is_refused_resumed_or_begun_anew(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert autoquant("--drop", "0.5") == 0
    assert autoquant("--drop", "0.5") == 2
    assert "is there already" in capsys.readouterr().err and (folder / "calls.txt").read_text() == ".."
    assert autoquant("--drop", "0.5", "--resume") == 0 and (folder / "calls.txt").read_text() == ".."
    assert autoquant("--drop", "0.5", "--overwrite") == 0 and (folder / "calls.txt").read_text() == "...."


def test_evaluate_that_raises_is_named_with_its_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert autoquant("--drop", "0.5", evaluate="wrong") == 2
    error = capsys.readouterr().err
    assert "evaluate 'auto_model.py:wrong' raised" in error and "ZeroDivisionError" in error
    assert not (folder / "out").exists()


def test_evaluate_that_raises_in_a_trial_ends_the_search_which_goes_on_when_it_is_resumed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert autoquant("--drop", "0.5", evaluate="worn") == 2  # at its second call
    assert "evaluate 'auto_model.py:worn' raised" in capsys.readouterr().err
    assert autoquant("--drop", "0.5", "--resume", evaluate="worn") == 0
    assert "as configured: kept" in capsys.readouterr().out and (folder / "asked.txt").read_text() == "..."


def test_evaluate_without_a_return_is_told_to_return_a_number(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert autoquant("--drop", "0.5", evaluate="silent") == 2
    error = capsys.readouterr().err
    assert "score of the float model; expected a number; got None. `evaluate` must return one number" in error
    assert not (folder / "out").exists()


def test_run_is_not_resumed_with_another_evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert autoquant("--drop", "0.5") == 0
    assert autoquant("--drop", "0.5", "--resume", evaluate="other") == 2
    error = capsys.readouterr().err
    assert "of another run: evaluate; expected auto_model.py:other; got auto_model.py:closeness" in error
    assert "overwrite=True (--overwrite)" in error and (folder / "calls.txt").read_text() == ".."


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "one of the arguments --target --drop is required"),
        (("--target", "1", "--drop", "1"), "not allowed with"),
        (("--target", "nan"), "must be a finite number"),
        (("--drop", "-1"), "must be a number of 0 or more"),
        (("--drop", "few"), "must be a number of 0 or more"),
        (("--drop", "1", "--resume", "--overwrite"), "not allowed with"),
        (("--drop", "1", "--iterations", "0"), "must be at least 1"),
    ],
)
def test_wrong_option_is_refused(
    options: tuple[str, ...], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        autoquant(*options)
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["autoquant", "--help"])
    assert "--drop 1% --config w4a8" in capsys.readouterr().out
