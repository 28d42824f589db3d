"""An analysis that was interrupted or killed goes on where it was, and only where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxquant.analysis import analyze
from fxquant.analysis.analyze import TRIALS
from fxquant.analysis.route import Route
from fxquant.cli.loading import load_evaluate
from fxquant.errors import FxquantError, StorageError
from tests import preset_nets
from tests.analysis.cases import calibrated


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = preset_nets.batches("residual", 3)
    expected = analyze(calibrated("residual"), batches)
    runs: list[int] = []
    plain = Route.outputs_from

    def counted(self: Route, index: int, *rest: Any) -> Any:
        runs.append(index)
        if len(runs) == limit:
            raise KeyboardInterrupt
        return plain(self, index, *rest)

    monkeypatch.setattr(Route, "outputs_from", counted)
    each = 4 + 2 * len(expected.units)
    limit = each + 10  # in the middle of the second batch
    with pytest.raises(KeyboardInterrupt):
        analyze(calibrated("residual"), batches, folder=tmp_path)
    done = len(runs) - 1
    runs.clear()
    limit = -1
    assert analyze(calibrated("residual"), batches, folder=tmp_path, resume=True) == expected
    assert len(runs) == 3 * each - done + 2  # and the float outputs of the two batches that were begun, again
    runs.clear()
    assert analyze(calibrated("residual"), batches, folder=tmp_path, resume=True) == expected
    assert len(runs) == 3  # float outputs alone


def test_records_do_not_grow_with_the_batches_but_for_a_digest_each(tmp_path: Path) -> None:
    (batch,) = preset_nets.batches("plain", 1)
    sizes = []
    for count in (1, 4, 7):
        expected = analyze(calibrated("plain"), [batch] * count, folder=tmp_path / str(count))
        sizes.append((tmp_path / str(count) / TRIALS).stat().st_size)
        assert expected.batches == count and expected.samples == count * len(batch)
    assert sizes[1] - sizes[0] < 3 * 100 and sizes[2] - sizes[1] < 3 * 100  # digits of sums, and 64 of each digest
    more = analyze(calibrated("plain"), [batch] * 8, folder=tmp_path / "7", resume=True)
    assert more == analyze(calibrated("plain"), [batch] * 8)
    with pytest.raises(FxquantError, match="the 8 batches that the run that is resumed has finished, or more; got 2"):
        analyze(calibrated("plain"), [batch] * 2, folder=tmp_path / "7", resume=True)


def test_an_interrupted_evaluate_is_asked_only_for_what_is_missing(tmp_path: Path) -> None:
    batches = preset_nets.batches("plain")
    asked: list[float] = []

    def evaluate(model: Any) -> float:
        if len(asked) == limit:
            raise KeyboardInterrupt
        with torch.no_grad():
            asked.append(float(model(batches[0]).sum()))
        return asked[-1]

    limit = -1
    expected = analyze(calibrated("plain"), batches, evaluate)
    total = len(asked)
    asked.clear()
    limit = 7
    with pytest.raises(KeyboardInterrupt):
        analyze(calibrated("plain"), batches, evaluate, folder=tmp_path)
    asked.clear()
    limit = -1
    assert analyze(calibrated("plain"), batches, evaluate, folder=tmp_path, resume=True) == expected
    assert len(asked) == total - 7


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    batches = preset_nets.batches("plain")
    analyze(calibrated("plain"), batches, folder=tmp_path)
    with pytest.raises(StorageError, match="is there already"):
        analyze(calibrated("plain"), batches, folder=tmp_path)
    with pytest.raises(StorageError, match="another run: seed; expected 5; got 0"):
        analyze(calibrated("plain"), batches, folder=tmp_path, resume=True, seed=5)
    with pytest.raises(StorageError, match="of another run: evaluate; expected .*:mean_score; got None"):
        analyze(calibrated("plain"), batches, mean_score, folder=tmp_path, resume=True)
    with pytest.raises(StorageError, match="another run: program"):
        analyze(calibrated("plain", preset="int8_per_tensor"), batches, folder=tmp_path, resume=True)
    with pytest.raises(FxquantError, match="batch 0; expected the batches of the run that is resumed"):
        analyze(calibrated("plain"), batches[::-1], folder=tmp_path, resume=True)
    analyze(calibrated("plain"), batches[::-1], folder=tmp_path, overwrite=True)


def mean_score(model: Any) -> float:
    """A score that ends its process when it is asked for the seventh time, where FXQUANT_TEST_KILL says so."""
    _asked.append(None)
    if os.environ.get("FXQUANT_TEST_KILL") == "evaluate" and len(_asked) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    with torch.no_grad():
        return float(model(preset_nets.batches("plain")[0]).mean())


_asked: list[None] = []
_KILLED = """
import os, signal, sys
from pathlib import Path
from fxquant.analysis import analyze
from fxquant.analysis.analyze import TRIALS
analyzing = sys.modules["fxquant.analysis.analyze"]
from fxquant.analysis.route import Route
from tests import preset_nets
from tests.analysis.cases import calibrated
from tests.analysis.test_resume import mean_score

plain, runs = Route.outputs_from, []

def counted(self, *arguments):
    runs.append(None)
    if os.environ["FXQUANT_TEST_KILL"] == "batches" and len(runs) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *arguments)

Route.outputs_from = counted
analyzing._SAVE_SECONDS = 0.0
analyze(calibrated("plain"), preset_nets.batches("plain"), mean_score, folder=Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["batches", "evaluate"])
def test_a_killed_process_is_gone_on_with(kill: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [sys.executable, "-c", _KILLED, str(tmp_path)]
    root = Path(__file__).parents[2]
    ended = subprocess.run(arguments, cwd=root, env={**os.environ, "FXQUANT_TEST_KILL": kill}, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    batches, runs = preset_nets.batches("plain"), []
    plain = Route.outputs_from
    expected = analyze(calibrated("plain"), batches, mean_score)
    each = 4 + 2 * len(expected.units)
    monkeypatch.setattr(Route, "outputs_from", lambda *arguments: runs.append(None) or plain(*arguments))
    _asked.clear()
    assert analyze(calibrated("plain"), batches, mean_score, folder=tmp_path, resume=True) == expected
    assert each < 20 < 2 * each  # the kill was in the second batch
    assert len(runs) == (2 * each - 19 if kill == "batches" else 0) + 2  # and each batch's float outputs again
    assert len(_asked) == each - (6 if kill == "evaluate" else 0)


def test_another_evaluate_of_the_command_line_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scores.py").write_text("def first(model):\n    return 1.0\n\ndef second(model):\n    return 2.0\n")
    monkeypatch.chdir(tmp_path)
    batches = preset_nets.batches("plain")
    analyze(calibrated("plain"), batches, load_evaluate("scores.py:first"), folder=tmp_path / "out")
    with pytest.raises(StorageError, match="of another run: evaluate; expected scores.py:second; got scores.py:first"):
        analyze(calibrated("plain"), batches, load_evaluate("scores.py:second"), folder=tmp_path / "out", resume=True)
