"""adaround_cost: what it counts as a fault, who is left out, and one small run of ours."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import adaround_cost
from benchmarks.adaround_cost import AIMET, OURS, Outcome, commands, measure
from benchmarks.peers.fxquant_rounding import learn
from benchmarks.peers.rounding import Learned, Rounded, make_task, measured, parse

SMALL = ["--iterations=4", "--samples=4", "--size=6"]
RUN = Learned(2.0, 2**20, 0.1, [(3.0, 1.0)], 0)


def test_block_is_rounded_to_grid_points_and_losses_fall() -> None:
    found = learn(make_task(parse(["--iterations=30", "--samples=8", "--size=6"])))
    assert found.off_grid == 0 and found.losses is not None and len(found.losses) == 2
    assert all(last < first for first, last in found.losses)


def test_weight_beside_the_grid_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxquant.passes.rounding_run.fix_codes", lambda *given: None)
    assert (learn(make_task(parse(SMALL))).off_grid or 0) > 1000


def test_error_is_that_of_the_blocks_output() -> None:
    task = make_task(parse(SMALL))
    assert measured(lambda given: Rounded(given.block), task).error == 0
    found = measured(lambda given: Rounded(lambda x: 1.1 * given.block(x)), task)
    assert found.error == pytest.approx(0.01, rel=1e-4) and found.seconds >= 0 and found.peak > 0


def test_faults_are_slowness_rising_losses_and_weights_off_the_grid() -> None:
    slower, rising, off = replace(RUN, seconds=3.0), replace(RUN, losses=[(1.0, 1.0)]), replace(RUN, off_grid=2)
    assert Outcome({OURS: (RUN,), AIMET: (slower,)}, {}).faults() == []
    assert Outcome({OURS: (slower,), AIMET: (RUN,)}, {}).faults() == ["fxquant takes 1.50 of AIMET's time"]
    assert Outcome({OURS: (rising,)}, {}).faults() == ["a loss does not fall: 1 -> 1"]
    assert Outcome({OURS: (off,)}, {}).faults() == ["2 weights are no grid points"]


def test_ratio_is_the_median_of_the_rounds() -> None:
    ours = tuple(replace(RUN, seconds=seconds) for seconds in (1.0, 9.0, 2.0))
    theirs = tuple(replace(RUN, seconds=seconds) for seconds in (2.0, 9.0, 8.0))
    assert Outcome({OURS: ours, AIMET: theirs}, {}).ratio() == 0.5


def test_table_names_who_is_left_out() -> None:
    text = str(Outcome({OURS: (RUN,)}, {AIMET: "no --venvs"}))
    assert "2.00         1     1.000e-01   3 -> 1" in text and "left out: no --venvs" in text


def test_absent_environment_is_a_reason(tmp_path: Path) -> None:
    assert commands(None)[AIMET] == "no --venvs"
    assert "no environment in" in str(commands(tmp_path)[AIMET])


def test_contender_that_fails_is_left_out_and_ours_goes_on(tmp_path: Path) -> None:
    failing = tmp_path / "failing.py"
    failing.write_text("print('FAILED no such module')")
    script = tmp_path / "ours.py"
    script.write_text(
        "import json, sys\nprint('READY', flush=True)\nfor line in sys.stdin:\n"
        "    print(json.dumps(dict(seconds=1.0, peak=1, error=0.0, losses=None, off_grid=0)), flush=True)\n"
    )
    starts = {OURS: [sys.executable, str(script)], AIMET: [sys.executable, str(failing)]}
    found = measure(starts, [], rounds=2)
    assert len(found.runs[OURS]) == 2 and found.absent == {AIMET: "no such module"} and found.ratio() is None


@pytest.mark.slow
def test_command_measures_ours_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--rounds", "1", "--iterations", "30", "--samples", "4", "--size", "6"]
    assert adaround_cost.main([*options, "--json", str(tmp_path / "cost.json")]) == 0
    assert "left out: no --venvs" in capsys.readouterr().out and (tmp_path / "cost.json").is_file()


def test_samples_are_the_same_for_every_contender() -> None:
    first, second = (make_task(parse(SMALL)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first.batches, second.batches, strict=True))
