"""`fxquant quantize` with an algorithm that learns: a killed run goes on, and its files go once all is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fxquant.cli.main import main
from fxquant.graph.pipeline import load_pipeline
from fxquant.graph.storage import load_program
from fxquant.passes import AdaRound
from tests.cli.model_file import MODEL
from tests.passes.test_adaround import Killed, kill_at


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data and a pipeline with adaround, as the working directory."""
    (tmp_path / "model.py").write_text(MODEL)
    np.save(tmp_path / "images.npy", np.random.default_rng(0).normal(size=(12, 3, 8, 8)).astype(np.float32))
    pipeline = load_pipeline("w4a8").changed(optimize=[AdaRound(iterations=80)])
    (tmp_path / "learned.toml").write_text(pipeline.to_toml())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def quantize(out: str) -> int:
    """The command, as a user gives it."""
    place = ["--data", "images.npy", "--config", "learned.toml", "--out", out]
    return main(["quantize", "model.py:make_net", *place])


def test_killed_quantize_goes_on_with_the_same_codes_and_clears_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize("whole") == 0
    with monkeypatch.context() as patch:
        kill_at(patch, 1)
        with pytest.raises(Killed):
            quantize("killed")
    kept = list((folder / "killed" / "unfinished").iterdir())
    assert [path.name.split("-")[1] for path in kept] == ["conv"]
    with monkeypatch.context() as patch:
        kill_at(patch, 1)  # one of two layers is left
        assert quantize("killed") == 0
    programs = [load_program(folder / name / "model.fxq") for name in ("whole", "killed")]
    assert programs[0].fingerprint() == programs[1].fingerprint()
    assert not (folder / "killed" / "unfinished").exists() and not (folder / "whole" / "unfinished").exists()
    assert "rounding of conv: output error" in capsys.readouterr().out


def test_what_is_not_ours_in_the_folder_stays(folder: Path) -> None:
    (folder / "out" / "unfinished").mkdir(parents=True)
    (folder / "out" / "unfinished" / "notes.txt").write_text("mine")
    assert quantize("out") == 0
    assert [path.name for path in (folder / "out" / "unfinished").iterdir()] == ["notes.txt"]
