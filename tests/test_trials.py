"""TrialLog: what a search found out is kept, and another search's records are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fxquant.errors import StorageError
from fxquant.trials import TrialLog

RECIPE = {"seed": 0, "target": 0.9}


def test_records_are_there_again_when_resumed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "trials.json"
    log = TrialLog(path, RECIPE)
    log.put("naive", {"score": 0.5})
    log.put("mse", {"score": 0.75, "seconds": 1.5})
    again = TrialLog(path, RECIPE, resume=True)
    assert list(again.records) == ["naive", "mse"] and again.get("mse") == {"score": 0.75, "seconds": 1.5}
    assert again.get("cle") is None


def test_a_log_without_a_file_keeps_records_in_memory() -> None:
    log = TrialLog(None, RECIPE)
    log.put("naive", {"score": 0.5})
    assert log.get("naive") == {"score": 0.5}


def test_a_file_in_the_way_is_refused_and_overwritten_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "trials.json"
    TrialLog(path, RECIPE).put("naive", {})
    with pytest.raises(StorageError, match="is there already"):
        TrialLog(path, RECIPE)
    assert TrialLog(path, RECIPE, overwrite=True).records == {}


def test_another_runs_file_is_refused_by_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "trials.json"
    TrialLog(path, RECIPE).put("naive", {})
    with pytest.raises(StorageError, match=r"of another run: target; expected 0.95; got 0.9"):
        TrialLog(path, {"seed": 0, "target": 0.95}, resume=True)
    with pytest.raises(StorageError, match="of another run: bits"):
        TrialLog(path, {**RECIPE, "bits": 4}, resume=True)


def test_refusals_say_what_to_do_in_python_and_on_a_command_line(tmp_path: Path) -> None:
    path = tmp_path / "trials.json"
    TrialLog(path, RECIPE).put("naive", {})
    with pytest.raises(StorageError, match=r"resume=True \(--resume\) .* overwrite=True \(--overwrite\)"):
        TrialLog(path, RECIPE)
    with pytest.raises(StorageError, match=r"overwrite=True \(--overwrite\)"):
        TrialLog(path, {}, resume=True)
    path.write_text("")
    with pytest.raises(StorageError, match=r"overwrite=True \(--overwrite\)"):
        TrialLog(path, RECIPE, resume=True)


@pytest.mark.parametrize(
    "change",
    ({"version": 2}, {"records": {"naive": 0.5}}, {"recipe": list(RECIPE)}),
    ids=lambda change: next(iter(change)),
)
def test_whole_file_of_another_form_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "trials.json"
    TrialLog(path, RECIPE).put("naive", {})
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **change}), encoding="utf-8")
    with pytest.raises(StorageError, match="cannot be read; expected a record of trials; got version"):
        TrialLog(path, RECIPE, resume=True)


@pytest.mark.parametrize("text", ("", "{}", "[]", '{"version": 1, "recipe": {}, "records": [1]}', '{"version": 9'))
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trials.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(StorageError, match="cannot be read"):
        TrialLog(path, RECIPE, resume=True)
