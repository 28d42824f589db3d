"""The driver of the training step benchmark, on contenders that only talk."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import models, qat_step, qat_step_worker
from benchmarks.qat_step_rounds import WARMUP, Race, race

SCRIPT = """
import sys
seconds, peak, steps = sys.argv[1], sys.argv[2], 0
print("READY" if seconds != "broken" else "FAILED no such network", " ".join(sys.argv[3:]), flush=True)
for line in sys.stdin:
    if seconds == "broken" or line == "quit\\n":
        break
    if line == "peak\\n":
        print(peak, flush=True)
        continue
    steps += 1
    if seconds == "tired" and steps > 3:
        print("FAILED out of memory", flush=True)
        break
    print("0.100000" if seconds == "tired" else seconds, flush=True)
"""


def talker(*words: str) -> list[str]:
    """The command of a contender that answers with these seconds and bytes."""
    return [sys.executable, "-c", SCRIPT, *words]


def a_race(live: float = 2.0) -> Race:
    """Three rounds of two contenders."""
    seconds = {"float": (1.0, 2.0, 1.0), "live": (live, 2.0 * live, 3.0 * live)}
    peaks = {"float": 2**30, "live": 3 * 2**29}
    return Race("resnet18", seconds, peaks, {"float": "plain", "live": "quantized"}, {"aimet": "not installed"})


def test_all_contenders_step_in_turn_and_those_that_fail_are_named() -> None:
    commands = {
        "float": talker("0.2", "1000"),
        "live": talker("0.3", "1500"),
        "broken": talker("broken", "0"),
        "tired": talker("tired", "0"),
        "gone": [sys.executable, "-c", ""],
        "absent": "its environment is not there",
    }
    found = race("resnet18", commands, ["--batch=2"], rounds=3)
    assert found.seconds == {"float": (0.2,) * 3, "live": (0.3,) * 3}
    assert found.peaks == {"float": 1000, "live": 1500}
    assert found.notes["live"] == "--net resnet18 --batch=2"
    assert found.failures["broken"].startswith("no such network") and found.failures["tired"] == "out of memory"
    assert found.failures["gone"] == "it ended without a word"
    assert found.failures["absent"] == "its environment is not there"
    assert WARMUP < 3  # else 'tired' would fail before a round counted


def test_ratio_is_the_median_of_pairs_with_its_quarter_points() -> None:
    found = a_race()
    assert found.ratio("live", "float") == 2.0 and found.ratios("live", "float") == [2.0, 2.0, 6.0]
    assert found.spread("live", "float") == (2.0, 6.0)


def test_table_has_ratio_memory_and_who_was_left_out() -> None:
    text = qat_step.render(a_race())
    row = next(line.split() for line in text.splitlines() if line.startswith("live  "))
    assert row == ["live", "2000", "2.000", "2.000", "-", "6.000", "1536", "1.500"]
    assert "aimet: left out: not installed" in text and "live: quantized" in text


@pytest.mark.parametrize(("live", "is_kept"), [(1.15, True), (1.16, False)])
def test_verdict_holds_live_to_its_limit(live: float, is_kept: bool) -> None:
    assert qat_step.judge(a_race(live)).is_kept is is_kept


def test_verdict_is_a_failure_when_live_was_not_measured() -> None:
    verdict = qat_step.judge(Race("resnet18", {"float": (1.0,)}, {"float": 1}, {}, {"live": "out of memory"}))
    assert not verdict.is_kept and "out of memory" in str(verdict)


def test_benchmark_writes_its_figures_and_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        qat_step, "commands", lambda options: {"float": talker("0.2", "10"), "live": talker("0.9", "20")}
    )
    path = tmp_path / "step.json"
    assert qat_step.main(["--networks", "resnet18", "--rounds", "1", "--json", str(path)]) == 1
    document = json.loads(path.read_text())
    assert document["networks"]["resnet18"]["contenders"]["live"]["ratio"] == pytest.approx(4.5)
    assert document["rounds"] == 1 and document["verdicts"][0]


def test_commands_have_the_float_network_first_and_compiled_forms_on_request() -> None:
    found = qat_step.commands(qat_step.parse(["--forms", "live", "--compile"]))
    assert list(found) == ["float", "live", "float compiled", "live compiled"]
    assert found["live compiled"][-2:] == ["live", "--compile"]


@pytest.mark.parametrize("form", ["float", "learned"])
def test_worker_trains_its_form_of_the_network(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = torch.nn.Sequential(*models.conv_bn_relu6(3, 4), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 2))
    prepared = qat_step_worker.prepare(net, torch.randn(2, 3, 6, 6), qat_step_worker.FORMS[form], is_compiled=False)
    assert prepared.model.training and ("lsq" in prepared.note) == (form == "learned")
    assert (prepared.model is net) == (form == "float")


def test_help_gives_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        qat_step.parse(["--help"])
    assert left.value.code == 0 and "examples:\n  python -m benchmarks." in capsys.readouterr().out
