"""A run that was stopped and resumed ends, bit for bit, where one that was never stopped ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

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


# --- stopped and resumed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs_done", [0, 1, 2, 3])
@pytest.mark.parametrize("training", TRAININGS)
def test_resumed_run_ends_where_an_unbroken_one_does(training: str, epochs_done: int, tmp_path: Path) -> None:
    unbroken = calibrated(training)
    expected = run(unbroken, None)
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


@settings(max_examples=5)
@given(st.lists(st.integers(0, BATCHES + 1), min_size=1, max_size=4), st.sampled_from(TRAININGS), st.integers(0, 99))
def test_run_killed_again_and_again_ends_where_an_unbroken_one_does(
    tmp_path_factory: pytest.TempPathFactory, kills: list[int], training: str, seed: int
) -> None:
    folder, unbroken = tmp_path_factory.mktemp("runs"), calibrated(training)
    run(unbroken, None, seed=seed)
    for after in kills:
        with pytest.raises(Killed):
            run(calibrated(training), folder, loss=killing(after), resume=True, seed=seed)
            raise Killed  # the run was already over
    sim = calibrated(training)
    run(sim, folder, resume=True, seed=seed)
    assert differing(state(unbroken), state(sim)) == []


@pytest.mark.parametrize("victim", ["best.onnx", "best.fxq", "history.json", "checkpoint.pt"])
@pytest.mark.parametrize("epoch", [1, 3])
def test_run_killed_while_it_writes_ends_where_an_unbroken_one_does(
    victim: str, epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = calibrated()
    run(unbroken, None)
    place, count = files._Whole.place, 0

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
    unbroken, sim = calibrated("lsq+"), calibrated("lsq+")
    run(unbroken, None)
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
    assert text.startswith(f"checkpoint cannot be read ({path})") and "copied whole?" in text


def test_file_of_other_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"format": "something"}, tmp_path / "checkpoint.pt")
    assert "no checkpoint" in refused(tmp_path) and "fxquant training checkpoint, version 1" in refused(tmp_path)


def test_damaged_checkpoint_is_refused(finished: Path, tmp_path: Path) -> None:
    data = bytearray((finished / "checkpoint.pt").read_bytes())
    (tmp_path / "checkpoint.pt").write_bytes(data[: len(data) // 2])
    assert "checkpoint cannot be read" in refused(tmp_path)


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
