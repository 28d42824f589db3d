"""tune_precision: reaches the target at the least cost, and its file makes the same codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import ConfigError, FxquantError, PassError, StorageError
from fxquant.evaluation import lowered
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.tuning.mixed_precision import tune_precision
from fxquant.tuning.probe import Probe, Setting
from fxquant.tuning.result import TriedConfiguration, TuningResult
from fxquant.tuning.target import Drop
from tests.preset_nets import batches as noise
from tests.preset_nets import net
from tests.tuning.mixed_nets import KILL, RELATIVE, Counting, accuracy, batches, example, pooled_net, wild_net

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tune(evaluate: Any = accuracy, **options: Any) -> TuningResult:
    options = {"target": RELATIVE, "progress": False, **options}
    return tune_precision(options.pop("model", None) or wild_net(), example(), batches(), evaluate, **options)


@pytest.fixture(scope="module")
def tuned(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[TuningResult, Path]:
    folder = tmp_path_factory.mktemp("tuning")
    return tune(Counting(), folder=folder), folder


def uniform(result: TuningResult, name: str) -> TriedConfiguration:
    found = result.trial(name)
    assert found is not None and found.score is not None and found.cost is not None
    return found


def told(result: TuningResult) -> list[TriedConfiguration]:
    """The trials without their times."""
    return [replace(trial, seconds=0.0) for trial in result.trials]


def bits(result: TuningResult) -> str:
    """Fingerprint of the chosen program, finalized."""
    return lowered(result.program, result.pipeline).fingerprint()


def test_target_that_int8_misses_is_reached_below_the_cost_of_float(tuned: tuple[TuningResult, Path]) -> None:
    result, _ = tuned
    assert (uniform(result, "int8_per_channel").score or 0) < result.threshold
    assert result.reached and result.score >= 0.99 * result.float_score
    assert result.cost < 0.1 * (uniform(result, "float").cost or 0)
    assert result.cost < (uniform(result, "int16_activations").cost or 0)


def test_most_groups_stay_int8_and_the_exception_reads_the_wild_value(tuned: tuple[TuningResult, Path]) -> None:
    result, _ = tuned
    found = dict(zip((group.name for group in result.groups), result.chosen.assignment, strict=True))
    assert found.pop("conv3") == "int16_activations"
    assert set(found.values()) == {"int8_per_channel"}


def test_baselines_are_tried_first(tuned: tuple[TuningResult, Path]) -> None:
    names = [trial.name for trial in tuned[0].trials]
    assert names[:4] == ["float", "int8_per_channel", "int8_per_tensor", "int16_activations"]


def test_what_was_not_asked_for_is_shown_and_never_chosen() -> None:
    result = tune(candidates=["int8_per_channel"], target=-100.0, max_trials=2)
    assert [trial.name for trial in result.trials if trial.is_baseline] == ["int8_per_tensor"]
    assert set(result.chosen.assignment) <= {"float", "int8_per_channel"} and result.reached
    assert not any(trial.is_baseline for trial in result.front)
    assert len([trial for trial in result.trials if not trial.is_baseline]) == 2  # baselines are not of the budget
    assert "baseline" in str(result) and "except_nodes" not in result.pipeline.to_toml()
    tensor = tune(candidates=["int8_per_tensor"], target=-100.0, max_trials=2)
    assert [trial.name for trial in tensor.trials if trial.is_baseline] == ["int8_per_channel"]


def test_groups_without_weights_go_by_what_was_asked_for() -> None:
    data = batches()
    run = {"target": -100.0, "evaluate_on": "float", "progress": False}
    for name in ("int8_per_tensor", "w4a8"):
        result = tune_precision(pooled_net(), data[0], data, lambda model: 0.0, candidates=[name], **run)
        assert result.chosen.name == name and set(result.chosen.assignment) == {name}
    result = tune_precision(
        pooled_net(), data[0], data, lambda model: 0.0, candidates=["int8_per_channel", "w4a8"], **run
    )
    assert "\n  int8_per_channel: add (activations alone: no weights)" in str(result)
    told = {item["operations"][0]: item["has_weights"] for item in result.to_dict()["groups"]}
    assert told["stem"] and not told["add"] and not told["avg_pool2d"]


def test_saved_config_makes_the_same_codes(tuned: tuple[TuningResult, Path], tmp_path: Path) -> None:
    result, folder = tuned
    pipeline = fxquant.load_pipeline(folder / "chosen.toml")
    sim = fxquant.QuantSim(wild_net(), example(), pipeline)
    sim.compute_encodings(batches(), progress=False)
    again, final = sim.snapshot(), lowered(result.program, result.pipeline)
    assert again.fingerprint() == final.fingerprint()
    path = result.export(tmp_path / "out")
    final.simulate = again.simulate = "exact"
    report = fxquant.check_parity(again, path, batches()[:1])
    assert not report.fault
    assert (tmp_path / "out" / "model.toml").read_text() == (folder / "chosen.toml").read_text()


def test_all_int8_neighbours_run_on_integers(tuned: tuple[TuningResult, Path]) -> None:
    result, _ = tuned
    rows = {row.value: row for row in result.program.coverage().rows}
    assert rows["relu_1"].spec is not None and rows["relu_1"].spec.bits == 16  # the wild value
    eights = [row for row in rows.values() if row.spec is not None and row.spec.bits == 8]
    assert len(eights) == 12  # five weights, the input, and six values behind the other operations
    assert rows["conv3_bias"].spec is None


def test_table_names_the_target_the_choice_and_its_exceptions(tuned: tuple[TuningResult, Path]) -> None:
    text = str(tuned[0])
    score = f"{tuned[0].score:.6g}"
    assert f"target (a drop of 1 %: 0.9405) reached: {score} by 'search" in text and "; float 0.95\n" in text
    assert "<- chosen" in text and "100.0%" in text
    assert text.endswith("int8_per_channel, but for 1 of 5 groups:\n  int16_activations: conv3")


def test_saved_files_hold_every_configuration_and_the_front(tuned: tuple[TuningResult, Path]) -> None:
    result, folder = tuned
    content = json.loads((folder / "tuning.json").read_text())
    assert [trial["name"] for trial in content["trials"]] == [trial.name for trial in result.trials]
    assert [trial["name"] for trial in content["trials"] if trial["front"]] == [
        trial.name for trial in result.trials if trial in result.front
    ]
    root = ElementTree.fromstring((folder / "front.svg").read_text())
    assert len(root.findall("{*}circle")) == len(result.trials)
    (chosen,) = [item for item in root.findall("{*}circle") if item.get("class") == "chosen"]
    assert result.chosen.name in "".join(chosen.itertext())


def test_every_number_has_a_record_of_its_own(tuned: tuple[TuningResult, Path]) -> None:
    result, folder = tuned
    records = json.loads((folder / "trials.json").read_text())["records"]
    for trial in result.trials:
        assert records[f"configuration {','.join(trial.assignment)}"]["score"] == trial.score
    found = {
        f"damage {name}, group {index}": value
        for index, row in enumerate(result.damages)
        for name, value in row.items()
    }
    assert {key: records[key]["value"] for key in found} == found
    assert len(records) == 1 + len(result.trials) + len(found)


def test_score_that_equals_the_target_reaches_it() -> None:
    def evaluate(model: Any) -> float:
        bits = {item.spec.bits for item in model.modules() if isinstance(item, FakeQuant)}
        return 1.0 if not bits else 0.5 if 16 in bits else 0.0

    data = batches()
    result = tune_precision(pooled_net(), data[0], data, evaluate, target=0.5, evaluate_on="float", progress=False)
    assert result.reached and result.score == 0.5 and "target (0.5) reached: 0.5 by 'search" in str(result)
    (row,) = [line for line in str(result).splitlines() if line.endswith("<- chosen")]
    assert "reached" in row
    assert sorted(result.chosen.assignment)[:2] == ["int16_activations", "int8_per_channel"]  # one, and all others
    assert result.chosen.assignment.count("float") == 0


def test_what_costs_nothing_is_not_widened_without_need() -> None:
    data, model = batches(), pooled_net()
    with torch.no_grad():
        expected = model(data[0])

    def closeness(found: Any) -> float:
        return 1 - float(((found(data[0]) - expected) ** 2).sum() / (expected**2).sum())

    result = tune_precision(model, data[0], data, closeness, target=Drop(1e-4), evaluate_on="float", progress=False)
    found = dict(zip((group.name for group in result.groups), result.chosen.assignment, strict=True))
    assert result.reached and found["wild"] == "int16_activations"
    assert found["add"] == found["avg_pool2d"] == "int8_per_channel"
    wider = [trial for trial in result.trials if trial.cost == result.cost and (trial.score or 0) > result.score]
    assert wider  # which a choice by the score would have taken
    assert result.chosen in result.front
    assert len({(trial.score, trial.cost) for trial in result.front}) == len(result.front)


@pytest.mark.slow
def test_same_search_twice_gives_the_same_trials(tuned: tuple[TuningResult, Path]) -> None:
    again = tune()
    assert [(trial.assignment, trial.score, trial.cost) for trial in again.trials] == [
        (trial.assignment, trial.score, trial.cost) for trial in tuned[0].trials
    ]
    assert again.pipeline.to_toml() == tuned[0].pipeline.to_toml()


@pytest.mark.slow
def test_without_16_bits_both_sides_of_the_wild_value_are_left_in_float() -> None:
    result = tune(candidates=("int8_per_channel",))
    floats = [
        group.name for group, name in zip(result.groups, result.chosen.assignment, strict=True) if name == "float"
    ]
    assert result.reached and floats == ["conv2", "conv3"]


@pytest.mark.slow
def test_4_bit_weights_are_taken_where_they_do_no_harm() -> None:
    result = tune(candidates=("float", "int16_activations", "int8_per_channel", "w4a8"))
    assert result.reached and result.chosen.assignment.count("w4a8") >= 3
    assert result.cost < 0.055 * (uniform(result, "float").cost or 0)


def test_resumed_search_evaluates_nothing_twice(tuned: tuple[TuningResult, Path]) -> None:
    result, folder = tuned
    counting = Counting()
    again = tune(counting, folder=folder, resume=True)
    assert counting.calls == 0
    assert again.trials == result.trials
    assert bits(again) == bits(result)


def test_resumed_search_may_have_another_target(tuned: tuple[TuningResult, Path]) -> None:
    counting = Counting()
    again = tune(counting, folder=tuned[1], resume=True, target=0.9)
    assert again.reached and again.chosen.name == "int8_per_channel"
    assert counting.calls == 0


@pytest.mark.slow
@pytest.mark.parametrize("kill", [4, 7])
def test_killed_search_goes_on(
    kill: int, tmp_path: Path, tuned: tuple[TuningResult, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "tests.tuning.mixed_nets", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, KILL: str(kill)}, capture_output=True)
    assert done.returncode == -9, done.stderr
    records = json.loads((tmp_path / "trials.json").read_text())["records"]
    finished = [key for key in records if key.startswith("configuration")]
    assert len(finished) == kill - 1  # and the float model's score
    counting, measured, measure = Counting(), [], Probe.damage
    monkeypatch.setattr(Probe, "damage", lambda probe, index: measured.append(index) or measure(probe, index))
    again = tune(counting, folder=tmp_path, resume=True)
    assert counting.calls == len(tuned[0].trials) - (kill - 1)
    assert bool(measured) is (kill == 4)  # the baselines come first, then sensitivity
    assert told(again) == told(tuned[0]) and bits(again) == bits(tuned[0])


@pytest.mark.slow
def test_search_that_ended_at_its_budget_goes_on_with_a_larger_one(
    tmp_path: Path, tuned: tuple[TuningResult, Path]
) -> None:
    counting = Counting()
    tune(counting, folder=tmp_path, max_trials=6)
    again = tune(counting, folder=tmp_path, resume=True)
    assert counting.calls == 1 + len(tuned[0].trials) and again.is_complete
    assert told(again) == told(tuned[0]) and bits(again) == bits(tuned[0])


def test_folder_of_another_search_is_refused(tuned: tuple[TuningResult, Path]) -> None:
    with pytest.raises(StorageError, match="is there already"):
        tune(folder=tuned[1])
    with pytest.raises(StorageError, match="of another run: candidates"):
        tune(Counting(), folder=tuned[1], resume=True, candidates=("w4a8",))
    expected = "another run: evaluate; expected tests.tuning.mixed_nets:accuracy; got tests.tuning.mixed_nets:Counting"
    with pytest.raises(StorageError, match=expected):
        tune(accuracy, folder=tuned[1], resume=True)


def test_unreachable_target_is_reported_and_the_best_is_kept() -> None:
    result = tune(target=0.999, evaluate_on="float", candidates=("int8_per_channel",))
    assert not result.reached
    assert result.score == max(trial.score or 0 for trial in result.trials)
    text = str(result)
    assert "target (0.999) NOT reached: " in text and result.to_dict()["reached"] is False
    assert "not even the model with all groups in float, run in the same way, reaches it: it scored 0.95" in text


def test_spent_budget_is_reported() -> None:
    result = tune(max_trials=5, evaluate_on="float")
    assert sum(not trial.is_baseline for trial in result.trials) == 5 and not result.is_complete
    assert "the search ended at its budget of 5 configurations" in str(result)
    assert result.reached  # by 16 bits


def test_noise_of_evaluate_is_the_same_in_each_run() -> None:
    def noisy(model: Any) -> float:
        return accuracy(model) + 0.001 * float(torch.rand(()))

    one, other = (tune(noisy, max_trials=2, evaluate_on="float") for _ in range(2))
    assert [trial.score for trial in one.trials] == [trial.score for trial in other.trials]


def test_configuration_that_the_pipeline_refuses_is_a_failed_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    make = Setting.program

    def refuse(self: Setting, assignment: tuple[str, ...], name: str = "tuned") -> Any:
        if "w4a8" in assignment:
            raise PassError("assign-specs: no 4 bits here")
        return make(self, assignment, name)

    monkeypatch.setattr(Setting, "program", refuse)
    result = tune(candidates=("int16_activations", "w4a8"), evaluate_on="float", max_trials=6)
    failed = result.trial("w4a8")
    assert failed is not None and failed.score is None and failed.reason == "assign-specs: no 4 bits here"
    assert "failed" in str(result) and result.reached
    assert not any("w4a8" in trial.assignment for trial in result.trials if trial is not failed)


@pytest.mark.slow
def test_latency_is_measured_beside_float() -> None:
    result = tune(target=0.5, cost="latency", candidates=("int8_per_channel",))
    assert result.reached and result.cost > 0
    assert all(trial.spread >= 0 and (trial.cost or 0) > 0 for trial in result.trials)
    assert "medians of runs in turns with float's; spread at most" in str(result) and " ms" in str(result)
    cheapest = min(trial.cost or 0 for trial in result.trials if (trial.score or 0) >= 0.5)
    assert result.cost == cheapest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "depthwise", "dense", "attention", "decoder"])
def test_every_structure_is_tuned_and_reproduced(name: str, tmp_path: Path) -> None:
    data, model = noise(name), net(name)
    with torch.no_grad():
        expected = model(data[0])

    def sqnr(found: Any) -> float:
        return float(10 * torch.log10((expected**2).sum() / ((found(data[0]) - expected) ** 2).sum().clamp(1e-20)))

    result = tune_precision(model, data[0], data, sqnr, target=40.0, folder=tmp_path, max_trials=12, progress=False)
    assert uniform(result, "float").score is not None
    pipeline = fxquant.load_pipeline(tmp_path / "chosen.toml")
    sim = fxquant.QuantSim(model, data[0], pipeline)
    sim.compute_encodings(data, progress=False)
    assert sim.snapshot().fingerprint() == lowered(result.program, result.pipeline).fingerprint()
    path = result.export(tmp_path / "out")
    assert not fxquant.check_parity(sim.snapshot(), path, data[:1]).fault


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target": float("nan")}, "tune_precision: target"),
        ({"candidates": ("int7",)}, "candidate 'int7' is unknown"),
        ({"candidates": ()}, "one besides float"),
        ({"candidates": ("float",)}, "one besides float"),
        ({"candidates": "int8_per_channel"}, "several names"),
        ({"candidates": ("w4a8", "w4a8")}, "'w4a8' twice"),
        ({"cost": "energy"}, "cost='energy'"),
        ({"max_trials": 0}, "max_trials"),
        ({"sensitivity_batches": 0}, "sensitivity_batches"),
        ({"resume": True}, "resume=True.*expected folder="),
        ({"resume": True, "overwrite": True}, "resume or overwrite"),
        ({"evaluate_on": "gpu"}, "evaluate_on='gpu'"),
        ({"seed": -1}, "tune_precision: seed"),
        ({"config": "int9"}, "pipeline 'int9' is unknown"),
        ({"model": Nothing()}, "operations that the config quantizes"),
    ],
)
def test_wrong_argument_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        tune(**options)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(1, 1, 8, 8), "batches of passes; expected what can be iterated anew .*; got Tensor"),
        (iter([]), "batches of passes; expected what can be iterated anew .*; got list_iterator"),
        ([], "tune_precision: batches; expected at least one batch"),
    ],
)
def test_wrong_batches_are_refused(given: Any, words: str) -> None:
    with pytest.raises(FxquantError, match=words):
        tune_precision(wild_net(), example(), given, accuracy, target=Drop(0.1), progress=False)


def test_configuration_without_a_finite_score_is_a_failed_trial() -> None:
    def evaluate(model: Any) -> float:
        found = accuracy(model)
        return found if found > 0.9 else float("nan")  # a perplexity that overflows

    result = tune(evaluate, evaluate_on="float", max_trials=8)
    failed = [trial for trial in result.trials if trial.score is None]
    assert result.reached and any("expected a finite number; got nan" in trial.reason for trial in failed)


class Lazy:
    """Batches that are made when they are asked for; counts how many are alive at once, beyond one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.most = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        for index in range(self.count):
            batch = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(index))
            alive.add(batch)
            self.most = max(self.most, len(alive))
            yield batch
            del batch


def test_batches_are_made_anew_and_not_held() -> None:
    lazy = Lazy(12)
    result = tune_precision(
        wild_net(), example(), lazy, accuracy, target=-1.0, evaluate_on="float", max_trials=1, progress=False
    )
    assert result.reached and lazy.most <= 4  # those of sensitivity, and one in work


def test_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(FxquantError, match="tune_precision: score of the float model.*finite"):
        tune(lambda model: float("nan"))
