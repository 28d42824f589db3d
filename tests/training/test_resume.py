"""A run that was stopped and resumed ends, bit for bit, where one that was never stopped ends."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxquant import files
from fxquant.errors import StorageError
from fxquant.graph.storage import load_program
from fxquant.numerics.fake_quant import Mode
from fxquant.schedule import Schedule
from fxquant.sim import QuantSim
from fxquant.spec import SpecOverride
from fxquant.train import train_qat
from fxquant.training.checkpoint import load_checkpoint
from fxquant.training.history import TrainingResult
from tests.training.loop_nets import BATCHES, SHORT, Net, Sample, calibrated, differing, loss, samples, shuffled, state
from tests.training.test_train_qat import accuracy

TRAININGS = ("static", "moving-average", "lsq+")


class Killed(BaseException):
    """What stops a run, as Ctrl-C does."""


def killing(after: int) -> Any:
    """The loss, which kills in batch `after`, counted over all epochs."""
    count = 0

    def stop(model: nn.Module, batch: Sample) -> torch.Tensor:
        nonlocal count
        count += 1
        if count > after:
            raise Killed
        return loss(model, batch)

    return stop


def run(sim: QuantSim, folder: Path | None, **changes: Any) -> TrainingResult:
    arguments: dict[str, Any] = {"loss": loss} | changes
    return train_qat(sim, shuffled, arguments.pop("loss"), folder=folder, **arguments)


def same(one: TrainingResult, other: TrainingResult) -> bool:
    """Whether two histories are equal but for the time that they took."""
    first, second = ([replace(record, seconds=0.0) for record in found.history] for found in (one, other))
    return first == second


@cache
def unbroken_run(training: str = "static", seed: int = 0) -> tuple[QuantSim, TrainingResult]:
    """A run that was never stopped, to look at."""
    sim = calibrated(training)
    return sim, run(sim, None, seed=seed)


# --- stopped and resumed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs_done", [0, 1, 2, 3])
@pytest.mark.parametrize("training", TRAININGS)
def test_resumed_run_ends_where_an_unbroken_one_does(training: str, epochs_done: int, tmp_path: Path) -> None:
    unbroken, expected = unbroken_run(training)
    with pytest.raises(Killed):
        run(calibrated(training), tmp_path, loss=killing(BATCHES * epochs_done + 2))
    torch.manual_seed(999)  # another process would have drawn other numbers by now
    sim = calibrated(training)
    found = run(sim, tmp_path, resume=True)
    assert differing(state(unbroken), state(sim)) == [] and same(expected, found)
    assert sim.program.notes == unbroken.program.notes and sim.epoch == 4
    modes = [[fq.mode for _, fq in one.program.fake_quant_nodes()] for one in (sim, unbroken)]
    assert modes[0] == modes[1] and set(modes[0]) == {Mode.FROZEN}


def test_best_of_a_resumed_run_is_that_of_an_unbroken_one(tmp_path: Path) -> None:
    expected = run(calibrated(), tmp_path / "unbroken", evaluate=accuracy)
    with pytest.raises(Killed):
        run(calibrated(), tmp_path / "killed", evaluate=accuracy, loss=killing(2 * BATCHES + 1))
    found = run(calibrated(), tmp_path / "killed", evaluate=accuracy, resume=True)
    assert same(expected, found) and found.best is not None
    best = [load_program(tmp_path / name / "best.fxq").fingerprint() for name in ("killed", "unbroken")]
    assert best[0] == best[1]


@settings(max_examples=3)
@given(st.lists(st.integers(0, BATCHES + 1), min_size=1, max_size=3), st.sampled_from(TRAININGS), st.integers(0, 1))
def test_run_killed_again_and_again_ends_where_an_unbroken_one_does(
    tmp_path_factory: pytest.TempPathFactory, kills: list[int], training: str, seed: int
) -> None:
    folder, (unbroken, _) = tmp_path_factory.mktemp("runs"), unbroken_run(training, seed)
    for after in kills:
        with pytest.raises(Killed):
            run(calibrated(training), folder, loss=killing(after), resume=True, seed=seed)
            raise Killed  # the run was already over
    sim = calibrated(training)
    run(sim, folder, resume=True, seed=seed)
    assert differing(state(unbroken), state(sim)) == []


@pytest.mark.parametrize(
    ("victim", "epoch"),
    [("best.onnx", 1), ("best.fxq", 3), ("history.json", 3), ("checkpoint.pt", 1)],
)
def test_run_killed_while_it_writes_ends_where_an_unbroken_one_does(
    victim: str, epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unbroken, _), place, count = unbroken_run(), files._Whole.place, 0

    def dies(self: Any) -> None:
        nonlocal count
        count += self.target.name == victim
        if count == epoch and self.target.name == victim:
            raise Killed
        place(self)

    def rising(model: Any) -> float:
        return float(sim.epoch)

    sim = calibrated()
    with monkeypatch.context() as patch:
        patch.setattr(files._Whole, "place", dies)
        with pytest.raises(Killed):
            run(sim, tmp_path, evaluate=rising)
    sim = calibrated()
    found = run(sim, tmp_path, evaluate=rising, resume=True)
    assert differing(state(unbroken), state(sim)) == [] and len(found.history) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"best.onnx", "best.fxq", "history.json", "checkpoint.pt"}


CHILD = """
import os, signal, sys
from tests.training.loop_nets import calibrated, loss, shuffled
from fxquant.train import train_qat

def report(record):
    if record.epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)

train_qat(calibrated("lsq+"), shuffled, loss, folder=sys.argv[1], report=report)
"""


@pytest.mark.slow
def test_killed_process_resumes(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], env=environment, capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert len(load_checkpoint(tmp_path / "checkpoint.pt").history) == 2
    (unbroken, _), sim = unbroken_run("lsq+"), calibrated("lsq+")
    run(sim, tmp_path, resume=True)
    assert differing(state(unbroken), state(sim)) == []


# --- what a checkpoint brings back -----------------------------------------------------------------------------------


def test_resume_replaces_the_program_and_needs_no_calibration(tmp_path: Path) -> None:
    trained = calibrated("lsq+")
    run(trained, tmp_path)
    torch.manual_seed(1)
    x = samples()[0][0]
    change = SpecOverride(training="lsq+")
    sim = QuantSim(Net().eval(), (x,), "int8_per_channel_qat", activation=change, schedule=SHORT)
    before = sim.program
    found = run(sim, tmp_path, resume=True)
    assert sim.program is not before and len(found.history) == 4
    assert differing(state(trained), state(sim)) == []


def test_simulation_is_the_checkpoints(tmp_path: Path) -> None:
    sim, again = calibrated(), calibrated()
    sim.program.simulate = "exact"
    run(sim, tmp_path, schedule=replace(SHORT, epochs=1))
    run(again, tmp_path, schedule=replace(SHORT, epochs=2), resume=True)
    assert again.program.simulate == "exact"


def test_run_can_go_on_for_longer_than_it_was_planned(tmp_path: Path) -> None:
    sim, again = calibrated(), calibrated()
    run(sim, tmp_path)
    assert len(run(again, tmp_path, schedule=replace(SHORT, epochs=5), resume=True).history) == 5


def test_resume_without_a_checkpoint_begins(tmp_path: Path) -> None:
    assert len(run(calibrated(), tmp_path / "new", resume=True).history) == 4


# --- what does not fit is refused by name ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("finished")
    run(calibrated(), folder, schedule=replace(SHORT, epochs=1))
    return folder


def refused(folder: Path, sim: QuantSim | None = None, **changes: Any) -> str:
    arguments: dict[str, Any] = {"schedule": SHORT, "resume": True} | changes
    sim = calibrated() if sim is None else sim
    before = sim.program
    with pytest.raises(StorageError) as caught:
        run(sim, folder, **arguments)
    assert sim.program is before or "optimizer" in str(caught.value)
    return str(caught.value)


REMEDY = "Give what the checkpoint was trained with, or train into another folder."


def test_checkpoint_of_another_config_is_refused_by_its_first_difference(finished: Path) -> None:
    text = refused(finished, calibrated("lsq+"))
    assert text.startswith("train_qat: config is not the checkpoint's; expected activation = {") and REMEDY in text
    assert text.count("activation = {") == 2 and 'training = "lsq+"' in text


def test_checkpoint_of_another_model_is_refused_by_the_parameters_name(finished: Path) -> None:
    class Wider(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.bn(self.conv(x)))

    sim = QuantSim(Wider().eval(), (samples()[0][0],), "int8_per_channel_qat", schedule=SHORT)
    sim.pipeline = calibrated().pipeline
    assert refused(finished, sim) == (
        "train_qat: parameter 'conv.weight' is not the checkpoint's; expected shape (6, 2, 3, 3); "
        f"got shape (7, 2, 3, 3). {REMEDY}"
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seed": 5}, "train_qat: seed is not the checkpoint's; expected 0; got 5. "),
        (
            {"schedule": Schedule(learning_rate=0.5)},
            "train_qat: schedule.learning_rate is not the checkpoint's; expected 0.01; got 0.5. ",
        ),
        (
            {"optimizer": torch.optim.AdamW},
            "train_qat: optimizer is not the checkpoint's; expected Adam; got AdamW. ",
        ),
        (
            {"optimizer": lambda groups: torch.optim.Adam(groups[:1])},
            "optimizer's parameters is not the checkpoint's; expected more parameters; got fewer, or others. ",
        ),
        (
            {"optimizer": lambda groups: torch.optim.Adam(groups[::-1])},
            "expected 'conv.weight' in group 0; got 'bn.weight' in group 0. ",
        ),
    ],
)
def test_checkpoint_of_another_run_is_refused_by_what_differs(
    finished: Path, changes: dict[str, Any], text: str
) -> None:
    found = refused(finished, **changes)
    assert text in found and found.endswith(REMEDY)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half"])
def test_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    text = refused(tmp_path)
    assert text.startswith(f"checkpoint cannot be read ({path}); expected fxquant training checkpoint, version 1; got ")
    assert "copied whole?" in text


def test_file_of_other_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"format": "something"}, tmp_path / "checkpoint.pt")
    assert "expected fxquant training checkpoint, version 1; got PK" in refused(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "bit", "zeros"])
def test_damaged_checkpoint_is_refused_wherever_the_damage_is(damage: str, finished: Path, tmp_path: Path) -> None:
    whole, chance, path = (finished / "checkpoint.pt").read_bytes(), random.Random(0), tmp_path / "checkpoint.pt"
    for _ in range(50):
        data, at = bytearray(whole), chance.randrange(len(whole))
        if damage == "cut":
            del data[at:]
        elif damage == "bit":
            data[at] ^= 1 << chance.randrange(8)
        else:
            data[at : at + 64] = bytes(range(64))
        path.write_bytes(data)
        with pytest.raises(StorageError, match="checkpoint cannot be read") as caught:
            load_checkpoint(path)
        assert str(path) in str(caught.value) and "copied whole?" in str(caught.value)


def rewritten(source: Path, target: Path, **changes: Any) -> Path:
    """A checkpoint with other contents (None takes one away) whose digest is right."""
    head, _, payload = source.read_bytes().partition(b"\n")
    content = torch.load(io.BytesIO(payload), weights_only=True) | changes
    file = io.BytesIO()
    torch.save({key: value for key, value in content.items() if value is not None}, file)
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    target.write_bytes(head[:-64] + digest.encode() + b"\n" + file.getvalue())
    return target


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        *(({name: None}, f"KeyError: '{name}'") for name in ("program", "simulate", "optimizer", "recipe", "history")),
        ({"history": [{}]}, "KeyError: 'learning_rates'"),
        ({"recipe": {}}, "KeyError: 'pipeline'"),
        ({"optimizer": {"kind": 1}}, "TypeError: "),
        ({"simulate": "foo"}, "FxquantError: program.simulate; expected "),
        ({"program": 3}, "AttributeError: "),
    ],
)
def test_checkpoint_of_other_content_is_refused(
    finished: Path, tmp_path: Path, changes: dict[str, Any], got: str
) -> None:
    path = tmp_path / "checkpoint.pt"
    assert len(load_checkpoint(rewritten(finished / "checkpoint.pt", path)).history) == 1
    rewritten(finished / "checkpoint.pt", path, **changes)
    head = f"checkpoint cannot be read ({path}); expected what train_qat writes; got {got}"
    assert refused(tmp_path).startswith(head)


def test_program_in_a_checkpoint_that_is_none_is_named_by_the_checkpoints_path(finished: Path, tmp_path: Path) -> None:
    path = rewritten(finished / "checkpoint.pt", tmp_path / "checkpoint.pt", program=torch.zeros(3, dtype=torch.uint8))
    assert refused(tmp_path).startswith(f"program cannot be read ({path})")


@pytest.mark.parametrize("trouble", ["missing", "full"])
def test_temporary_folder_that_cannot_be_written_to_is_said(
    trouble: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    place = tmp_path / "nowhere" if trouble == "missing" else tmp_path
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    if trouble == "full":
        monkeypatch.setattr(Path, "write_bytes", full)
    got = "No such file or directory" if trouble == "missing" else "No space left on device"
    with pytest.raises(StorageError) as caught:
        load_checkpoint(finished / "checkpoint.pt")
    assert str(caught.value) == (
        f"temporary folder cannot be written to ({place}); got {got}. "
        "Free some space there, or set TMPDIR to another folder."
    )


def test_files_agree_when_the_checkpoint_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = files._Whole.place

    def full(self: Any) -> None:
        if self.target.name == "checkpoint.pt":
            raise OSError(errno.ENOSPC, "No space left on device")
        place(self)

    run(calibrated(), tmp_path, schedule=replace(SHORT, epochs=1), evaluate=accuracy)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(files._Whole, "place", full)
        with pytest.raises(StorageError, match="No space left"):
            run(calibrated(), tmp_path, evaluate=lambda model: 1.0, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before and len(before) == 4


# --- numbers of numpy ------------------------------------------------------------------------------------------------


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=np.float64(0.9))


def test_run_with_numbers_of_numpy_resumes(tmp_path: Path) -> None:
    rates: Any = {"learning_rate": np.float64(1e-2), "range_learning_rate": np.float64(1e-3)}
    schedule = replace(SHORT, learning_rate_divisor=np.float64(10), **rates)
    arguments: dict[str, Any] = {"seed": np.int64(3), "optimizer": sgd}
    unbroken, sim = calibrated("lsq+"), calibrated("lsq+")
    run(unbroken, None, schedule=schedule, **arguments)
    run(calibrated("lsq+"), tmp_path, schedule=replace(schedule, epochs=2), **arguments)
    assert len(run(sim, tmp_path, schedule=schedule, resume=True, **arguments).history) == 4
    assert differing(state(unbroken), state(sim)) == []


@pytest.mark.parametrize("held", [np.datetime64(3, "D"), Mode.FAKE, 1 << 70, np.ones(2)])
def test_optimizer_state_that_is_not_plain_is_refused_by_its_place(held: Any, tmp_path: Path) -> None:
    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{**group, "mine": {"deep": [held]}} for group in groups])

    text = refused(tmp_path, optimizer=optimizer, resume=False)
    assert text.startswith("optimizer SGD cannot be saved (state_dict()['param_groups'][0]['mine']['deep'][0]); ")


def test_optimizer_whose_state_no_file_can_hold_is_refused_before_anything_is_replaced(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            self.state[self.param_groups[0]["params"][0]]["why"] = object()
            return super().step(closure)

    text = refused(tmp_path, optimizer=lambda groups: Odd(groups), resume=False)
    assert text == (
        "optimizer Odd cannot be saved (state_dict()['state'][0]['why']); expected tensors, numbers and strings; "
        "got object. Train without folder=, or with an optimizer whose state is plain."
    )
    assert not (tmp_path / "checkpoint.pt").exists()
