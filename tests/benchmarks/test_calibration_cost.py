"""The cost of calibration: the clock's arithmetic by hand, verdicts that bite, both scripts' figures on a tiny net."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from benchmarks import calibration_cost, peak_memory
from benchmarks.calibration_cost import Peak
from benchmarks.calibration_rounds import Case, Clock, Cost, time_calibration
from benchmarks.networks import synthetic_images
from fxquant.spec import ESTIMATORS

MEGABYTE = 2**20
CASE = Case("tiny", 2, "mse", "min-max")


def tiny_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))


def clock(start: float, steps: list[float], end: float, original: float = 10.0, off: float = 5.0) -> Clock:
    return Clock(start, steps, end, search=0.5, original=[original] * len(steps), off=[off] * len(steps))


def hold(megabytes: int) -> int:
    """Peak of this process while it holds so much, after it held 64 MB that no longer count."""
    early = b"x" * (64 * MEGABYTE)
    del early
    return peak_memory.peak_bytes(lambda: b"x" * (megabytes * MEGABYTE))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calibration_cost.BUILDERS, "resnet18", tiny_net)


def test_ratio_is_the_whole_calibration_over_the_passes_on_the_same_batches() -> None:
    one = clock(1.0, [12.0, 13.0], 4.0)
    assert one.total == 30.0
    assert (one.over_float, one.over_off) == (1.5, 3.0)


def test_figure_is_the_median_of_the_rounds() -> None:
    rounds = [clock(0.0, [total], 0.0) for total in (90.0, 14.0, 12.0)]
    assert Cost(CASE, rounds).ratios == (1.4, 2.8)


@pytest.mark.parametrize(
    ("estimator", "ratio", "is_kept"),
    [
        ("min-max", 1.1, True),
        ("min-max", 1.11, False),
        ("moving-average(0.5)", 1.11, False),
        ("mse", 1.5, True),
        ("percentile(99.9)", 1.51, False),
    ],
)
def test_goal_is_that_of_the_estimator(estimator: str, ratio: float, is_kept: bool) -> None:
    cost = Cost(Case("resnet18", 8, estimator, "min-max"), [clock(0.0, [10.0 * ratio], 0.0)])
    verdict = calibration_cost.judge(cost)
    assert verdict.is_kept == is_kept
    assert f"{ratio:.3f} ({2 * ratio:.3f} with quantizers off)" in str(verdict)


@pytest.mark.parametrize(("many", "is_kept"), [(1010, True), (1030, False)])
def test_memory_goal_is_missed_when_the_peak_grows_with_the_batches(many: int, is_kept: bool) -> None:
    peak = Peak(CASE, {16: many * MEGABYTE, 4: 1000 * MEGABYTE})
    assert peak.growth == many / 1000
    assert calibration_cost.judge_memory(peak).is_kept == is_kept
    row = calibration_cost.render_memory([peak]).splitlines()[-1]
    assert row.split()[-3:] == ["1000", str(many), f"{many / 1000:.3f}"]


def test_clock_takes_every_part_of_a_calibration_and_no_float_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0

    class Slow(nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal now
            now += self.seconds
            return x

    def calibrate(program: object, batches: Iterator[torch.Tensor], progress: bool) -> None:
        nonlocal now
        now += 1.0
        for _ in batches:
            now += 7.0
        now += 3.0

    monkeypatch.setattr("benchmarks.calibration_rounds.time.perf_counter", lambda: now)
    monkeypatch.setattr(fxquant, "calibrate", calibrate)
    monkeypatch.setattr("benchmarks.calibration_rounds.search_again", lambda program: 0.25)
    program = fxquant.capture(nn.Sequential(nn.ReLU()), torch.zeros(2, 3))
    taken = time_calibration(program, [torch.zeros(2, 3)] * 3, Slow(50.0), Slow(20.0))
    assert taken == Clock(1.0, [7.0, 7.0, 7.0], 3.0, 0.25, [50.0] * 3, [20.0] * 3)


def test_calibration_is_the_one_that_the_library_does(tiny: None) -> None:
    images = synthetic_images(4, 16, seed=0).split(2)
    model = tiny_net().eval()
    case = Case("resnet18", 2, "moving-average", "min-max")
    timed, plain = (calibration_cost.prepare(model, 16, 0, case) for _ in range(2))
    off = calibration_cost.switched_off(calibration_cost.prepare(model, 16, 0))
    taken = time_calibration(timed, images, model, off.module)
    fxquant.calibrate(plain, images, progress=False)
    assert len(taken.steps) == len(taken.original) == len(taken.off) == 2 and taken.total > 0
    for (_, mine), (_, its) in zip(timed.fake_quant_nodes(), plain.fake_quant_nodes(), strict=True):
        assert mine.encoding.same_grid(its.encoding)


def test_program_switched_off_is_the_float_network_and_observes_nothing() -> None:
    model = tiny_net().eval()
    images = synthetic_images(2, 16, seed=0)
    off = calibration_cost.switched_off(calibration_cost.prepare(model, 16, 0))
    torch.testing.assert_close(off.module(images), model(images))
    assert not any(module.estimator.has_range for _, module in off.fake_quant_nodes())


def test_weights_have_the_estimator_that_was_asked_for() -> None:
    model = tiny_net().eval()
    (case,) = calibration_cost.cases(
        "resnet18", 2, calibration_cost.parse(["--estimators", "mse", "--weights", "same"])
    )
    for wanted, given in (("mse", case), ("min-max", CASE)):
        program = calibration_cost.prepare(model, 16, 0, given)
        found = {(module.follows, module.spec.estimator) for _, module in program.fake_quant_nodes()}
        assert found == {(True, wanted), (False, "mse")}


def test_every_case_is_timed_printed_and_written(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cost.json"
    small = ["--networks", "resnet18", "--batches", "1", "2", "--images", "4", "--size", "16", "--rounds", "2"]
    code = calibration_cost.main([*small, "--no-memory", "--json", str(path)])
    written = json.loads(path.read_text(encoding="utf-8"))
    assert code == int(not all(verdict["kept"] for verdict in written["verdicts"]))
    found = [(cost["batch"], cost["estimator"]) for cost in written["costs"]]
    assert found == [(batch, name) for batch in (1, 2) for name in ESTIMATORS]
    for cost in written["costs"]:
        assert [len(clock["batches"]) for clock in cost["seconds"]] == [4 // cost["batch"]] * 2
        ratios = [
            (clock["start"] + sum(clock["batches"]) + clock["end"]) / sum(clock["original"])
            for clock in cost["seconds"]
        ]
        assert cost["over_float"] == pytest.approx(sum(ratios) / 2)
    text = capsys.readouterr().out
    assert "4 images, 2 rounds" in text and "resnet18 2 entropy" in text and len(written["verdicts"]) == 12


@pytest.mark.slow
def test_peak_is_that_of_the_call_alone_when_the_parent_is_large() -> None:
    parent = b"x" * (800 * MEGABYTE)
    few, many = (peak_memory.in_child(hold, megabytes) for megabytes in (8, 108))
    assert many - few == pytest.approx(100 * MEGABYTE, abs=4 * MEGABYTE)
    assert many < len(parent)


@pytest.mark.slow
def test_peak_memory_is_measured_for_both_numbers_of_batches() -> None:
    task = [
        "--networks",
        "resnet18",
        "--batches",
        "1",
        "--estimators",
        "mse",
        "--size",
        "32",
        "--memory-batches",
        "3",
        "1",
    ]
    (peak,) = calibration_cost.measure_memory(calibration_cost.parse([*task, "--images", "1"]))
    assert list(peak.peaks) == [1, 3] and peak.case == Case("resnet18", 1, "mse", "min-max")
    assert peak.growth == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--networks", "alexnet"], "--networks"),
        (["--estimators", "msee"], "estimator 'msee' is unknown"),
        (["--weights", "percentile(7)"], "--weights"),
        (["--images", "20"], "expected a multiple of each of --batches"),
        (["--memory-batches", "4", "4"], "two different numbers"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_command_line_refuses_when_a_value_is_wrong(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        calibration_cost.parse(arguments)
    assert left.value.code == 2
    assert named in capsys.readouterr().err


def test_help_gives_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        calibration_cost.parse(["--help"])
    assert left.value.code == 0
    assert "examples:\n  python -m benchmarks.calibration_cost " in capsys.readouterr().out
