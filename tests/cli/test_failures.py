"""What goes wrong outside fxquant is one line on standard error and status 2, before the work where that can be."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxquant
from fxquant.cli import commands
from fxquant.cli.main import main, make_parser
from fxquant.demo import run as demo_run
from fxquant.errors import ExportError, StorageError
from fxquant.sim import QuantSim

ROOT = Path(__file__).parent.parent.parent
MODEL = """
import torch

def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())

def broken():
    return torch.nn.Linear("4", 4)

def no_data():
    raise RuntimeError("no data today")

def stops():
    yield torch.randn(2, 4)
    raise KeyError("second")

class Again:
    def __iter__(self):
        yield torch.randn(2, 4)
        raise KeyError("again")

again = Again()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "m.py").write_text(MODEL)
    (tmp_path / "syntax.py").write_text("\ndef f(:\n")
    np.save(tmp_path / "d.npy", np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32))
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.pt2").write_text("no zip")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says on standard error, once its status was 2."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fxquant: ") and error.count("\n") == 1 and "partial" not in error
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("syntax.py:f --data d.npy", "syntax.py' raised (syntax.py:2); got SyntaxError"),
        ("m.py:broken --data d.npy", "model 'm.py:broken' raised (m.py:9); got TypeError"),
        ("m.py:make --data m.py:no_data", "data 'm.py:no_data' raised (m.py:12); got RuntimeError: no data today"),
        ("m.py:make --data m.py:stops", "data 'm.py:stops' raised (m.py:16); got KeyError: 'second'"),
        ("m.py:make --data m.py:again", "data 'm.py:again' raised (m.py:21); got KeyError: 'again'"),
        ("bad.pt2 --data d.npy", "model 'bad.pt2' cannot be read"),
    ],
)
def test_user_code_is_named_with_its_line_when_it_raises(
    folder: Path, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = failure(capsys, "quantize", *arguments.split(), "--out", "o")
    assert message in error.replace(f"{folder}/", "")


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/x"])
def test_output_folder_is_refused_before_any_work(
    folder: Path, out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def working(*_: Any, **__: Any) -> Any:
        raise AssertionError("worked")

    monkeypatch.setattr(commands, "load_model", working)
    monkeypatch.setattr(demo_run, "train", working)
    expected = f"folder '{out}' cannot be written to; expected a folder"
    assert expected in failure(capsys, "quantize", "m.py:make", "--data", "d.npy", "--out", out)
    assert expected in failure(capsys, "demo", "--out", out)


@pytest.mark.parametrize("opset", ["12", "99"])
def test_opset_is_refused_before_any_work(
    folder: Path, opset: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "load_model", lambda *_: pytest.fail("worked"))
    arguments = ["quantize", "m.py:make", "--data", "d.npy", "--opset", opset, "--out", "o"]
    assert "export: opset; expected an opset from 13 to" in failure(capsys, *arguments)
    assert not (folder / "o").exists()


@pytest.mark.parametrize("wrong", [["m.py:broken", "--data", "d.npy"], ["m.py:make", "--data", "absent.npy"]])
def test_quantize_that_fails_leaves_no_folder_of_its_own(
    folder: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "old").mkdir()
    failure(capsys, "quantize", *wrong, "--out", "new/below")
    failure(capsys, "quantize", *wrong, "--out", "old/below")
    failure(capsys, "quantize", *wrong, "--out", "old")
    assert not (folder / "new").exists() and (folder / "old").is_dir() and not any((folder / "old").iterdir())


def test_parity_of_the_clean_float_model_names_the_integer_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "m.py:make", "--data", "d.npy", "--out", "o"]) == 0
    capsys.readouterr()
    error = failure(capsys, "parity", "o/model_float.onnx", "--data", "d.npy")
    assert "no program lies beside 'o/model_float.onnx'" in error and "clean float model" in error
    assert error.endswith("Give the integer model: o/model.onnx.\n")
    (folder / "o" / "model.onnx").rename(folder / "other.onnx")
    error = failure(capsys, "parity", "other.onnx", "--data", "d.npy")
    assert "no program lies beside 'other.onnx'; expected the program 'other.fxq'" in error


def test_demo_refuses_an_unknown_config_before_it_trains(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_run, "train", lambda *_, **__: pytest.fail("trained"))
    assert "nope" in failure(capsys, "demo", "--config", "nope", "--out", "o")


def test_unwritable_report_and_drawing_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "m.py:make", "--data", "d.npy", "--out", "o"]) == 0
    capsys.readouterr()
    error = failure(capsys, "parity", "o/model.onnx", "--data", "d.npy", "--json", "/proc/x.json")
    assert "'/proc/x.json' cannot be written" in error and "another place" in error
    assert "'/proc/g.svg' cannot be written" in failure(capsys, "show", "o/model.fxq", "--draw", "/proc/g.svg")


def test_full_standard_output_is_said_once(folder: Path) -> None:
    QuantSim(nn.Linear(4, 4), torch.zeros(2, 4)).program.save(folder / "p.fxq")
    command = [sys.executable, "-m", "fxquant", "show", str(folder / "p.fxq")]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stderr) == (
        2,
        "fxquant: standard output cannot be written; got No space left on device\n",
    )


@pytest.mark.parametrize("size", ["8", "3"])
def test_fixed_batch_that_does_not_fit_recommends_batch_size(
    folder: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = 4 if size == "8" else 3  # 3: it is the last batch, of 2 samples, that does not fit
    exported = torch.export.export(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), (torch.randn(fixed, 4),))
    torch.export.save(exported, folder / "n.pt2")
    assert "--batch-size" in failure(capsys, "quantize", "n.pt2", "--data", "d.npy", "--batch-size", size, "--out", "o")
    if fixed == 4:
        assert main(["quantize", "n.pt2", "--data", "d.npy", "--batch-size", "4", "--out", "o"]) == 0


def test_opset_and_version_are_readable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["quantize", "m", "--data", "d", "--out", "o", "--opset", "abc"])
    assert "--opset: must be a whole number, is 'abc'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"fxquant {fxquant.__version__}\n"


@pytest.mark.parametrize("command", ["demo", "show m", "diff m", "quantize m --data d --out o"])
def test_empty_config_is_refused_where_it_is_given(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args([*command.split(), "--config", ""])
    assert stop.value.code == 2
    assert "--config: must be the name of a packaged pipeline or a path, is empty" in capsys.readouterr().err


@pytest.mark.parametrize("fails", [".onnx", ".fxq"])
def test_old_pair_stays_when_the_disk_is_full(folder: Path, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sim = QuantSim(nn.Linear(4, 4), torch.zeros(2, 4))
    sim.compute_encodings([torch.randn(2, 4)], progress=False)
    sim.export("pair")
    before = {path.name: path.read_bytes() for path in Path("pair").iterdir()}
    sim.compute_encodings([100 * torch.randn(2, 4)], progress=False)
    real = fxquant.files._new_file

    def full(temporary: Path) -> Any:
        if fails in temporary.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(temporary)

    with monkeypatch.context() as patch:
        patch.setattr(fxquant.files, "_new_file", full)
        with pytest.raises((ExportError, StorageError), match="No space left on device"):
            sim.export("pair")
    assert {path.name: path.read_bytes() for path in Path("pair").iterdir()} == before
    sim.export("pair")
    after = {path.name: path.read_bytes() for path in Path("pair").iterdir()}
    changed = {name for name in after if after[name] != before[name]}
    assert after.keys() == before.keys() and changed >= {"model.onnx", "model.fxq", "model.encodings"}


def test_missing_folder_of_a_program_is_to_be_made(folder: Path) -> None:
    with pytest.raises(StorageError, match=r"new/p\.fxq\); got No such file .*Make the folder '.*new' first"):
        QuantSim(nn.Linear(4, 4), torch.zeros(2, 4)).program.save(folder / "new" / "p.fxq")
