"""A search that was killed and resumed: nothing is done twice, and it ends, bit for bit, as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fxquant.errors import StorageError
from fxquant.evaluation import lowered
from fxquant.files import remove
from fxquant.graph.storage import load_program
from fxquant.reconstruction.unfinished import Unfinished
from fxquant.tuning.auto_quant_result import AutoQuantResult
from tests.tuning.auto_quant_nets import KILL, Scripted, nudge
from tests.tuning.killed_search import ROUNDING, STEPS, search

ROOT = Path(__file__).parent.parent.parent


def lines(folder: Path, name: str) -> int:
    """How often something happened, over all processes."""
    path = folder / f"{name}.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


def told(result: AutoQuantResult) -> list[Any]:
    """The trials without their times."""
    return [replace(trial, seconds=0.0) for trial in result.trials]


def bits(result: AutoQuantResult) -> str:
    """Fingerprint of the best program, finalized."""
    return lowered(result.program, result.pipeline).fingerprint()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[AutoQuantResult, Path]:
    """A search that was never stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    return search(folder, resume=False), folder


def test_unbroken_search_has_every_kind_of_trial(unbroken: tuple[AutoQuantResult, Path]) -> None:
    result, folder = unbroken
    found = {trial.name: trial.verdict.value for trial in result.trials}
    assert found["fails"] == "failed" and found["in layers"] == "kept" and found["idle"] == "skipped"
    assert lines(folder, "evaluate") == 5 and lines(folder, "layers") == 3 + 3  # the last step builds on the layers
    assert not list((folder / "unfinished").iterdir())


@pytest.mark.parametrize("kill", ["evaluate 1", "evaluate 3", "layers 2", "layers 5"])
@pytest.mark.slow
def test_killed_search_loses_nothing(kill: str, unbroken: tuple[AutoQuantResult, Path], tmp_path: Path) -> None:
    expected, whole = unbroken
    command = [sys.executable, "-m", "tests.tuning.killed_search", str(tmp_path)]
    died = subprocess.run(command, cwd=ROOT, env={**os.environ, KILL: kill}, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    found = search(tmp_path)
    assert told(found) == told(expected) and bits(found) == bits(expected)
    # what was running when it was killed is the only thing that is done again
    again = {kill.split()[0]: 1}
    for name in ("evaluate", "layers"):
        assert lines(tmp_path, name) == lines(whole, name) + again.get(name, 0)
    assert load_program(tmp_path / "best.fxq").fingerprint() == load_program(whole / "best.fxq").fingerprint()


@pytest.mark.slow
def test_half_done_adaround_goes_on_with_the_layers_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = search(tmp_path / "whole", resume=False, steps=ROUNDING)
    folder = tmp_path / "killed"
    folder.mkdir()
    command = [sys.executable, "-m", "tests.tuning.killed_search", str(folder), "adaround"]
    with subprocess.Popen(command, cwd=ROOT) as process:
        while process.poll() is None and not list(folder.glob("unfinished/*/*.pt")):
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    layers = len(list(folder.glob("unfinished/*/*.pt")))
    assert 0 < layers < 3  # conv1, conv2, fc
    learned: list[str] = []
    keep = Unfinished.put

    def put(self: Unfinished, found: Any) -> None:
        learned.append(found.unit)
        keep(self, found)

    monkeypatch.setattr(Unfinished, "put", put)
    found = search(folder, steps=ROUNDING)
    assert len(learned) == 3 - layers
    assert told(found) == told(expected) and found.trials[1].score is not None and bits(found) == bits(expected)
    assert lines(folder, "evaluate") == 3 and not list(folder.glob("unfinished/*"))


def test_finished_search_resumed_does_nothing_again(unbroken: tuple[AutoQuantResult, Path], tmp_path: Path) -> None:
    first = search(tmp_path, resume=False)
    calls = [lines(tmp_path, name) for name in ("evaluate", "layers")]
    second = search(tmp_path)
    assert [lines(tmp_path, name) for name in ("evaluate", "layers")] == calls
    assert second.trials == first.trials and bits(second) == bits(first) == bits(unbroken[0])


@pytest.mark.parametrize("damage", ["lost", "broken", "another's"])
def test_best_model_is_made_anew_where_its_file_is(
    damage: str, unbroken: tuple[AutoQuantResult, Path], tmp_path: Path
) -> None:
    result = search(tmp_path, resume=False, steps=STEPS[:2])
    path = tmp_path / "calibrated.fxq"
    if damage == "lost":
        remove(path)
    elif damage == "broken":
        path.write_bytes(path.read_bytes()[:100])
    else:
        unbroken[0].program.save(path)
    again = search(tmp_path, steps=STEPS[:2])
    assert bits(again) == bits(result) and lines(tmp_path, "evaluate") == 3
    assert lowered(load_program(path), again.pipeline).fingerprint() == bits(result)


def test_search_goes_on_with_more_steps_and_another_target(tmp_path: Path) -> None:
    first = search(tmp_path, resume=False, steps=STEPS[:2])
    steps = (*STEPS[:2], nudge("one more", 5.0))
    second = search(tmp_path, steps=steps)
    assert second.trials[:2] == first.trials and second.trials[2].verdict.value == "kept"
    assert lines(tmp_path, "evaluate") == 4


def test_trial_whose_pipeline_changed_is_done_again(tmp_path: Path) -> None:
    search(tmp_path, resume=False, steps=(STEPS[0], nudge("nudged", 1.0)))
    second = search(tmp_path, steps=(STEPS[0], nudge("nudged", 2.0)))
    assert lines(tmp_path, "evaluate") == 4
    assert [vars(item) for item in second.pipeline.optimize_passes] == [{"amount": 2.0}]


def test_search_is_not_continued_under_another_recipe(tmp_path: Path) -> None:
    search(tmp_path, resume=False, steps=STEPS[:1])
    with pytest.raises(StorageError, match="of another run: seed"):
        search(tmp_path, steps=STEPS[:1], seed=1)
    with pytest.raises(StorageError, match="of another run: evaluate_on"):
        search(tmp_path, steps=STEPS[:1], evaluate_on="exact")
    expected = "another run: evaluate; expected .*auto_quant_nets:Scripted; got .*killed_search:bias_seen.<locals>.eval"
    with pytest.raises(StorageError, match=expected):
        search(tmp_path, steps=STEPS[:1], evaluate=Scripted(0.5))


def test_overwrite_begins_anew(tmp_path: Path) -> None:
    search(tmp_path, resume=False, steps=STEPS[:2])
    (tmp_path / "unfinished" / "x").mkdir(parents=True)
    result = search(tmp_path, resume=False, overwrite=True, seed=1, steps=STEPS[:1])
    records = json.loads((tmp_path / "trials.json").read_text())["records"]
    assert list(records) == ["float", "as configured"] and not (tmp_path / "unfinished").exists()
    assert load_program(tmp_path / "best.fxq").fingerprint() == bits(result)
