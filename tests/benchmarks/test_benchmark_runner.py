"""The runner's statistics, its table, and JSON that is whole or not there."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import runner
from benchmarks.runner import Timings
from fxquant.errors import StorageError


def test_interleave_alternates_the_calls_and_drops_the_warmup() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = runner.interleave(calls, rounds=4, warmup=2)
    assert order == ["a", "b"] * 6
    assert {name: len(rounds) for name, rounds in timings.seconds.items()} == {"a": 4, "b": 4}
    assert all(second >= 0 for rounds in timings.seconds.values() for second in rounds)


@pytest.mark.parametrize(("calls", "rounds"), [({}, 3), ({"a": lambda: None}, 0)])
def test_interleave_refuses_when_there_is_nothing_to_time(calls: dict[str, object], rounds: int) -> None:
    with pytest.raises(ValueError, match="at least 1 round and 1 call"):
        runner.interleave({name: lambda: None for name in calls}, rounds)


def test_ratio_is_paired_when_a_neighbour_slows_some_rounds() -> None:
    # The second round was ten times slower for both: the ratio of each pair is 1/2 all the same.
    timings = Timings({"int8": (1.0, 10.0, 1.0), "float": (2.0, 20.0, 2.0)})
    assert timings.ratio("int8", "float") == 0.5
    assert timings.minimum_ratio("int8", "float") == 0.5
    assert timings.median("float") == 2.0
    assert timings.to_dict() == {
        "int8": {"median_seconds": 1.0, "min_seconds": 1.0, "rounds": 3},
        "float": {"median_seconds": 2.0, "min_seconds": 2.0, "rounds": 3},
    }


def test_paired_ratio_is_not_the_ratio_of_medians() -> None:
    timings = Timings({"a": (1.0, 2.0, 9.0), "b": (1.0, 4.0, 3.0)})
    assert timings.ratio("a", "b") == 1.0
    assert timings.median("a") / timings.median("b") == pytest.approx(2 / 3)


def test_json_is_written_whole_and_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "figures.json"
    runner.write_json(path, {"a": 1})
    runner.write_json(path, {"a": [2, None, "x"]})
    assert json.loads(path.read_text()) == {"a": [2, None, "x"]}
    assert os.listdir(path.parent) == ["figures.json"]


def test_old_json_stays_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures.json"
    runner.write_json(path, {"a": 1})

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        runner.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["figures.json"]


def test_json_refuses_nan_because_no_reader_takes_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        runner.write_json(tmp_path / "figures.json", {"a": float("nan")})
    assert os.listdir(tmp_path) == []


def test_environment_names_what_a_figure_depends_on() -> None:
    facts = runner.environment(seed=7)
    assert {"versions", "cpu", "torch_threads", "load_average", "seed", "commit", "utc"} <= set(facts)
    assert facts["seed"] == 7
    versions = facts["versions"]
    assert isinstance(versions, dict) and versions["torch"] and versions["onnxruntime"]
    assert "onnxruntime" in runner.describe(facts)
    json.dumps(facts, allow_nan=False)


def test_table_lines_up_its_columns() -> None:
    text = runner.table(["net", "ms"], [["resnet18", "4.5"], ["m", "12.25"]])
    assert text.splitlines() == ["net          ms", "--------  -----", "resnet18    4.5", "m         12.25"]
