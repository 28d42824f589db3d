"""The search: what is tried, kept, skipped and recorded; arguments; files. Scores are scripted where they are all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.capture import capture
from fxquant.errors import CalibrationError, ConfigError, FxquantError, PassError, StorageError
from fxquant.evaluation import lowered, quantized
from fxquant.graph.pipeline import Pipeline, load_pipeline
from fxquant.graph.program import Program, Stage
from fxquant.graph.storage import load_program
from fxquant.parity import check_parity
from fxquant.tuning.auto_quant import auto_quantize
from fxquant.tuning.auto_quant_result import AutoQuantResult, Trial, Verdict
from fxquant.tuning.auto_quant_search import Measure
from fxquant.tuning.auto_quant_steps import AddedPass, Combination, Step, default_steps
from fxquant.tuning.target import Drop
from tests.tuning.auto_quant_nets import (
    Scripted,
    accuracy,
    digits,
    estimator,
    images,
    nudge,
    pipeline,
    plain_net,
    rescaled_net,
)

AS_IS = Step("as configured")
NUDGES = (AS_IS, nudge("one", 1.0), nudge("two", 2.0), nudge("three", 3.0))
FAILS = Step("fails", optimize=(AddedPass("fail-always"),))
IDLE = Step("idle", optimize=(AddedPass("fail-always", {"fails": False}),))


def search(evaluate: Callable[..., float], target: float | Drop = 2.0, **changes: Any) -> AutoQuantResult:
    """A search on a net that was never trained, in float simulation."""
    arguments: dict[str, Any] = {"config": pipeline(), "steps": NUDGES, "evaluate_on": "float", "progress": False}
    batches = images()
    return auto_quantize(plain_net(), (batches[0],), batches, evaluate, target=target, **arguments | changes)


def verdicts(result: AutoQuantResult) -> list[str]:
    return [trial.verdict.value for trial in result.trials]


def amounts(result: AutoQuantResult) -> list[float]:
    """By how much the passes of the best pipeline nudge."""
    return [vars(item)["amount"] for item in result.pipeline.optimize_passes]


# --- the rule --------------------------------------------------------------------------------------------------------


def test_search_stops_at_the_first_trial_that_reaches_the_target() -> None:
    evaluate = Scripted(0.9, 0.5, 0.8, 0.7)
    result = search(evaluate, 0.8)
    assert verdicts(result) == ["kept", "kept"] and result.untried == ("two", "three")
    assert result.reached and result.score == 0.8 and evaluate.calls == 3  # the float model's, and one a trial


def test_trial_is_kept_only_if_it_beats_the_best() -> None:
    result = search(Scripted(0.9, 0.5, 0.4, 0.5, 0.6))
    assert verdicts(result) == ["kept", "not kept", "not kept", "kept"]
    assert amounts(result) == [3.0] and result.score == 0.6 and not result.reached
    assert [trial.before for trial in result.trials] == [None, 0.5, 0.5, 0.5]


def test_later_step_changes_the_best_pipeline_so_far() -> None:
    steps = (AS_IS, estimator("mse"), estimator("entropy"), nudge("nudged"))
    result = search(Scripted(0.9, 0.5, 0.6, 0.1, 0.7), steps=steps)
    text = result.pipeline.to_toml()
    assert verdicts(result) == ["kept", "kept", "not kept", "kept"]
    assert 'estimator = "mse"' in text and "entropy" not in text and "nudge-bias" in text
    assert result.made_by == ("mse", "nudged")


@settings(max_examples=6)
@given(st.lists(st.integers(0, 6), min_size=4, max_size=4), st.integers(0, 6))
def test_search_takes_the_best_and_no_trial_behind_the_target(scores: list[int], target: int) -> None:
    evaluate = Scripted(9.0, *map(float, scores))
    result = search(evaluate, float(target))
    tried = [int(trial.score) for trial in result.trials if trial.score is not None]
    assert tried == scores[: len(tried)] and evaluate.calls == 1 + len(tried)
    assert all(score < target for score in tried[:-1]) and (len(tried) == 4 or tried[-1] >= target)
    assert result.score == max(tried) and result.reached == (max(tried) >= target)
    first = tried.index(max(tried))
    assert amounts(result) == ([] if first == 0 else [float(first)])
    kept = [index for index, score in enumerate(tried) if all(score > other for other in tried[:index])]
    assert [index for index, trial in enumerate(result.trials) if trial.verdict is Verdict.KEPT] == kept


@pytest.mark.parametrize(
    ("target", "score", "reached"),
    [
        (0.6, 0.6, True),
        (0.6, 0.59, False),
        (Drop(0.1), 0.71, True),
        (Drop(0.1), 0.69, False),
        (Drop(0.1, relative=True), 0.73, True),
        (Drop(0.1, relative=True), 0.71, False),
    ],
)
def test_target_is_a_score_or_a_drop_against_the_float_score(target: float | Drop, score: float, reached: bool) -> None:
    result = search(Scripted(0.8, score), target, steps=(AS_IS,))
    assert result.reached is reached and result.float_score == 0.8


def test_relative_drop_of_a_negative_score_lies_below_it() -> None:
    result = search(Scripted(-2.0, -2.1), Drop(0.1, relative=True), steps=(AS_IS,))
    assert result.threshold == pytest.approx(-2.2) and result.reached


# --- what helps only together ----------------------------------------------------------------------------------------

UP = Step("up", prepare=(AddedPass("nudge-bias", {"amount": 4.0}),))
DOWN = Step("down", optimize=(AddedPass("nudge-bias", {"amount": -3.0}),))
TOGETHER = Combination("together", parts=(UP, Step("typo", prepare=(AddedPass("nudge-biass"),)), DOWN))


class Near:
    """An evaluate that grows as the outputs' mean comes near 1 above the net's own: +4 and -3 harm alone."""

    def __init__(self) -> None:
        self.calls = 0
        self.goal = float(plain_net()(images()[0]).detach().mean()) + 1

    def __call__(self, model: Callable[..., Any]) -> float:
        self.calls += 1
        return -abs(float(model(images()[0]).mean()) - self.goal)


def test_combination_finds_what_each_of_its_steps_alone_made_worse(tmp_path: Path) -> None:
    steps = (AS_IS, UP, DOWN, TOGETHER, nudge("unneeded"))
    result = search(Near(), -0.1, steps=steps, folder=tmp_path)
    assert verdicts(result) == ["kept", "not kept", "not kept", "kept"] and result.reached
    assert result.made_by == ("together",) and result.untried == ("unneeded",)
    assert [vars(item)["amount"] for item in result.pipeline.prepare_passes if item.name == "nudge-bias"] == [4.0]
    assert amounts(result) == [-3.0] and load_program(tmp_path / "best.fxq").fingerprint() == (
        lowered(result.program, result.pipeline).fingerprint()
    )
    assert row(str(result), "together")[-1] == "kept, target reached"
    again = Near()
    resumed = search(again, -0.1, steps=steps, folder=tmp_path, resume=True)
    assert again.calls == 0 and resumed.trials == result.trials
    assert resumed.pipeline.to_toml() == result.pipeline.to_toml()


def test_combination_is_not_tried_where_a_step_was_good_enough() -> None:
    result = search(Scripted(0.9, 0.5, 0.8), 0.8, steps=(AS_IS, UP, TOGETHER))
    assert verdicts(result) == ["kept", "kept"] and result.untried == ("together",)


def test_combination_of_steps_that_were_all_kept_is_skipped() -> None:
    evaluate = Scripted(0.9, 0.5, 0.6, 0.7)
    result = search(evaluate, steps=(AS_IS, UP, DOWN, TOGETHER))
    assert verdicts(result) == ["kept", "kept", "kept", "skipped"] and evaluate.calls == 4
    assert result.trials[-1].reason == "the same pipeline as 'down'" and result.made_by == ("up", "down")


def test_combination_that_replaces_kept_steps_is_what_the_best_is_made_by() -> None:
    result = search(Scripted(0.9, 0.5, 0.6, 0.1, 0.7), steps=(AS_IS, UP, DOWN, TOGETHER))
    assert verdicts(result) == ["kept", "kept", "not kept", "skipped"]  # on the best, DOWN is all that it adds
    other = Combination("other", parts=(Step("lower", prepare=(AddedPass("nudge-bias", {"amount": 2.0}),)), DOWN))
    result = search(Scripted(0.9, 0.5, 0.6, 0.1, 0.7), steps=(AS_IS, UP, DOWN, other))
    assert verdicts(result)[-1] == "kept" and result.made_by == ("other",)


def test_combination_none_of_whose_parts_applies_is_skipped() -> None:
    lost = Step("lost", prepare=(AddedPass("nudge-bias"),), behind=("x",))
    result = search(Scripted(0.9, 0.5), steps=(AS_IS, Combination("both", parts=(lost,))))
    assert result.trials[1].verdict is Verdict.SKIPPED
    assert "step 'both'; expected a pipeline that 'lost' applies to; got none" in result.trials[1].reason


def test_default_combinations_hold_equalization_biases_and_rounding_in_their_order() -> None:
    """Equalization behind what it needs, rounding in front of the biases, also on a pipeline that has them already."""
    steps = {step.name: step for step in default_steps()}
    start = load_pipeline("int8_per_tensor_dfq")
    for before in (load_pipeline("int8_per_tensor"), start):
        made = steps["all together"].build(before)
        prepared = [item.name for item in made.prepare_passes]
        folds = prepared[prepared.index("fold-batch-norm") + 1 : prepared.index("cross-layer-equalization")]
        assert folds == (["replace-relu6"] if before is start else [])
        assert [item.name for item in made.optimize_passes][:2] == ["adaround", "correct-bias"]
    dfq = steps["the same through ReLU6"].build(load_pipeline("int8_per_tensor"))
    assert [item.name for item in dfq.optimize_passes] == [item.name for item in start.optimize_passes]
    added = ["replace-relu6", "cross-layer-equalization", "absorb-high-bias"]
    place = [item.name for item in dfq.prepare_passes].index("fold-batch-norm") + 1
    assert [item.name for item in dfq.prepare_passes][place : place + 3] == added


# --- trials that fail or are skipped ---------------------------------------------------------------------------------


def test_failing_trial_is_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    result = search(Scripted(0.9, 0.5, 0.6), steps=(AS_IS, FAILS, nudge("one")), folder=tmp_path)
    assert verdicts(result) == ["kept", "failed", "kept"]
    assert "what it always gets" in result.trials[1].reason and "what it always gets" in result.explain()
    records = json.loads((tmp_path / "trials.json").read_text())["records"]
    assert records["fails"]["verdict"] == "failed" and "what it always gets" in records["fails"]["reason"]
    assert "fail-always" not in result.pipeline.to_toml()


def test_score_that_is_not_finite_fails_its_trial() -> None:
    result = search(Scripted(0.9, 0.5, float("nan"), 0.6), steps=NUDGES[:3])
    assert verdicts(result) == ["kept", "failed", "kept"] and "expected a finite number" in result.trials[1].reason


def test_first_trial_that_has_a_score_is_kept_where_those_before_failed() -> None:
    result = search(Scripted(0.9, 0.1), steps=(FAILS, nudge("one")))
    assert verdicts(result) == ["failed", "kept"] and result.score == 0.1


def test_search_without_any_score_says_why() -> None:
    with pytest.raises(
        FxquantError, match="expected a trial that has a score; got none; 'fails' failed: .*always gets"
    ):
        search(Scripted(0.9), steps=(FAILS,))


def test_data_that_no_step_can_mend_ends_the_search_at_once(tmp_path: Path) -> None:
    batches = images()
    batches[1][0, 0, 0, 0] = float("nan")
    evaluate = Scripted(0.9, 0.5)
    with pytest.raises(CalibrationError, match="not finite|NaN"):
        auto_quantize(
            plain_net(), (batches[0],), batches, evaluate, target=1.0, config=pipeline(), steps=NUDGES, folder=tmp_path
        )
    assert evaluate.calls == 1  # the float model's
    assert list(json.loads((tmp_path / "trials.json").read_text())["records"]) == ["float"]


def test_calibration_that_only_a_step_spoils_is_a_failed_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    make = Measure.quantized

    def spoilt(self: Measure, pipeline: Pipeline, folder: Path | None) -> Program:
        if len(pipeline.optimize_passes):
            raise CalibrationError("calibrate", got="Inf")
        return make(self, pipeline, folder)

    monkeypatch.setattr(Measure, "quantized", spoilt)
    assert verdicts(search(Scripted(0.9, 0.5), steps=NUDGES[:2])) == ["kept", "failed"]


def test_error_of_the_users_own_code_is_not_swallowed() -> None:
    def evaluate(model: Callable[..., Any]) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        search(evaluate)


def test_step_that_does_not_apply_is_skipped_with_the_reason() -> None:
    steps = (
        AS_IS,
        Step("typo", prepare=(AddedPass("fold-batch-norn"),)),
        Step("lost", prepare=(AddedPass("nudge-bias"),), behind=("x",)),
    )
    result = search(Scripted(0.9, 0.5), steps=steps)
    assert verdicts(result) == ["kept", "skipped", "skipped"]
    assert "does not apply: unknown pass 'fold-batch-norn'" in result.trials[1].reason
    assert "expected a pipeline with 'x' under prepare" in result.trials[2].reason


def test_step_that_changes_nothing_is_skipped_without_an_evaluation() -> None:
    evaluate = Scripted(0.9, 0.5)
    result = search(evaluate, steps=(AS_IS, estimator("min-max"), IDLE))
    assert [trial.reason for trial in result.trials] == [
        "",
        "the same pipeline as 'as configured'",
        "the same program as 'as configured', bit for bit",
    ]
    assert verdicts(result) == ["kept", "skipped", "skipped"] and evaluate.calls == 2


# --- the steps -------------------------------------------------------------------------------------------------------


def test_default_steps_cost_more_and_more_and_round_trip_as_toml(tmp_path: Path) -> None:
    names = [step.name for step in default_steps()]
    assert names[0] == "as configured" and names[-2:] == ["AdaRound", "all together"]
    assert names.index("empirical bias correction") < names.index("equalization and biases") < names.index("AdaRound")
    assert names.index("mse ranges") < names.index("equalization") < names.index("analytic bias correction")
    assert len(set(names)) == len(names)


def test_step_puts_passes_behind_the_folds_and_in_place_of_their_own_kind() -> None:
    start = pipeline()
    once = Step("a", prepare=(AddedPass("nudge-bias", {"amount": 1.0}), AddedPass("remove-identity"))).build(start)
    names = [item.name for item in once.prepare_passes]
    place = names.index("fold-batch-norm")
    assert names[place + 1 : place + 3] == ["nudge-bias", "remove-identity"] and names.count("remove-identity") == 1
    twice = Step("b", prepare=(AddedPass("nudge-bias", {"amount": 2.0}),)).build(once)
    assert [vars(item) for item in twice.prepare_passes if item.name == "nudge-bias"] == [{"amount": 2.0}]


def test_step_puts_algorithms_in_front_of_those_it_names() -> None:
    late = Step("late", optimize=(AddedPass("recalibrate"),)).build(pipeline())
    early = Step("early", optimize=(AddedPass("nudge-bias"),), before=("recalibrate",)).build(late)
    last = Step("last", optimize=(AddedPass("fail-always"),)).build(early)
    assert [item.name for item in last.optimize_passes] == ["nudge-bias", "recalibrate", "fail-always"]


def test_step_with_an_unknown_option_says_which() -> None:
    with pytest.raises(ConfigError, match="unknown key 'amont'.*Did you mean 'amount'"):
        nudge_wrong = Step("x", optimize=(AddedPass("nudge-bias", {"amont": 1.0}),))
        nudge_wrong.build(pipeline())


def test_step_says_what_it_changes() -> None:
    steps = {step.name: str(step) for step in default_steps(iterations=7, seed=3)}
    assert steps["as configured"] == "the config as it is"
    assert steps["99.9 % ranges"] == "activations by percentile(99.9); weights by tf-enhanced"
    assert steps["equalization"] == "+ cross-layer-equalization"
    assert steps["AdaRound"] == "+ adaround (iterations 7, seed 3)"


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_result_reproduces_from_its_toml_bit_for_bit(tmp_path: Path) -> None:
    result = search(Scripted(0.9, 0.5, 0.6, 0.4, 0.3), folder=tmp_path)
    batches = images()
    again = load_pipeline(tmp_path / "best.toml")
    program = quantized(capture(plain_net(), (batches[0],)), again, batches)
    expected = lowered(result.program, result.pipeline).fingerprint()
    assert lowered(program, again).fingerprint() == expected
    assert load_program(tmp_path / "best.fxq").fingerprint() == expected
    assert result.program.stage is Stage.CALIBRATED
    assert check_parity(load_program(tmp_path / "best.fxq"), tmp_path / "best.onnx", batches).worst_local_steps == 0


def test_trials_lie_on_disk_before_they_are_reported(tmp_path: Path) -> None:
    seen: list[str] = []

    def report(trial: Trial) -> None:
        records = json.loads((tmp_path / "trials.json").read_text())["records"]
        assert records[trial.name]["verdict"] == trial.verdict.value
        if trial.verdict is Verdict.KEPT:
            assert load_program(tmp_path / "best.fxq").fingerprint() == trial.fingerprint
        seen.append(trial.name)

    search(Scripted(0.9, 0.5, 0.6, 0.4, 0.7), folder=tmp_path, report=report)
    assert seen == ["as configured", "one", "two", "three"]


def test_same_seed_gives_the_same_trials() -> None:
    one, other = (search(Scripted(0.9, 0.5, 0.6, 0.4, 0.7)) for _ in range(2))
    assert [trial.fingerprint for trial in one.trials] == [trial.fingerprint for trial in other.trials]
    assert len({trial.fingerprint for trial in one.trials}) == 4


def test_evaluation_is_of_the_onnx_file_unless_told_otherwise() -> None:
    kinds: list[str] = []

    def evaluate(model: Callable[..., Any]) -> float:
        kinds.append(type(model).__name__)
        return 0.5

    result = search(evaluate, steps=(AS_IS,), evaluate_on="onnxruntime")
    assert kinds[1:] == ["LoweredModel"] and kinds[0] != "LoweredModel" and (result.trials[0].size_bytes or 0) > 1000
    assert search(Scripted(0.9, 0.5), steps=(AS_IS,)).trials[0].size_bytes is None


def test_export_writes_model_pipeline_and_trials(tmp_path: Path) -> None:
    result = search(Scripted(0.9, 0.5, 0.6), steps=NUDGES[:2])
    path = result.export(tmp_path / "out")
    assert path == tmp_path / "out" / "model.onnx"
    report = check_parity(load_program(path.with_suffix(".fxq")), path, images())
    assert report.worst_local_steps == 0
    assert load_pipeline(tmp_path / "out" / "model.toml").to_toml() == result.pipeline.to_toml()
    told = json.loads((tmp_path / "out" / "autoquant.json").read_text())
    assert told == json.loads(json.dumps(result.to_dict())) and told["score"] == 0.6 and not told["reached"]
    assert [trial["name"] for trial in told["trials"]] == ["as configured", "one"]


# --- the table -------------------------------------------------------------------------------------------------------


def row(text: str, name: str) -> list[str]:
    """The cells of a trial's first line."""
    return next([cell.strip() for cell in line.split("│")] for line in text.splitlines() if line.startswith(name))


def test_table_tells_scores_deltas_and_verdicts() -> None:
    steps = (AS_IS, nudge("up", 1.0), FAILS, nudge("down", 2.0), nudge("more", 3.0), nudge("unneeded", 4.0))
    result = search(Scripted(0.9, 0.5, 0.75, 0.7, 0.85), Drop(0.05), steps=steps)
    text = str(result)
    assert row(text, "float") == ["float", "", "0.9", "", "", "", "", ""]
    assert row(text, "as configured")[2:5] == ["0.5", "-0.4", ""]
    assert row(text, "up")[1:5] == ["+ nudge-bias (amount 1.0)", "0.75", "-0.15", "+0.25"]
    assert row(text, "up")[-1] == "kept, replaced later"
    assert row(text, "fails")[2:5] == ["", "", ""] and row(text, "fails")[-1].startswith("failed: ")
    assert row(text, "down")[3:5] == ["-0.2", "-0.05"] and row(text, "down")[-1] == "not kept"
    assert row(text, "more")[-1] == "kept, target reached"
    assert text.splitlines()[-2:] == [
        "target (a drop of 0.05: 0.85) reached: 0.85 by more; float 0.9",
        "not needed: unneeded",
    ]


def test_unreachable_target_returns_the_best_and_says_so() -> None:
    result = search(Scripted(0.9, 0.5, 0.8, 0.7, 0.6), 0.95)
    assert not result.reached and result.score == 0.8 and amounts(result) == [1.0]
    assert result.explain().splitlines()[-2:] == [
        "target (0.95) NOT reached: 0.8 by one; float 0.9",
        "the target lies above the float model's own score",
    ]


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": float("nan")}, "auto_quantize: target; expected a finite score, or a Drop"),
        ({"target": "1%"}, "auto_quantize: target"),
        ({"target": True}, "auto_quantize: target"),
        ({"evaluate_on": "onnxruntim"}, "Did you mean 'onnxruntime'"),
        ({"resume": True}, "resume=True; expected folder="),
        ({"overwrite": True}, "overwrite=True; expected folder="),
        ({"resume": True, "overwrite": True, "folder": "x"}, "expected resume or overwrite; got both"),
        ({"steps": ()}, "expected steps of different names"),
        ({"steps": (AS_IS, AS_IS)}, "got 'as configured' 2 times"),
        ({"steps": (Step("float"),)}, "none 'float'"),
        ({"iterations": 5}, "expected steps or iterations; got both"),
        ({"iterations": 0, "steps": None}, "iterations; expected 1 or more"),
        ({"seed": -1}, "auto_quantize: seed"),
        ({"config": "int8_per_chanel"}, "Did you mean 'int8_per_channel'"),
    ],
)
def test_wrong_argument_is_refused_before_anything_is_done(changes: dict[str, Any], words: str) -> None:
    evaluate = Scripted()
    with pytest.raises(ConfigError) as caught:
        search(evaluate, **changes)
    assert words in str(caught.value) and evaluate.calls == 0


def test_batches_that_can_be_read_only_once_are_refused() -> None:
    with pytest.raises(PassError, match="what can be iterated anew"):
        auto_quantize(plain_net(), (images()[0],), iter(images()), Scripted(), target=1.0)


@pytest.mark.parametrize("amount", [-0.1, float("inf"), float("nan")])
def test_drop_of_no_size_is_refused(amount: float) -> None:
    with pytest.raises(ConfigError, match=r"Drop\.amount"):
        Drop(amount)


def test_folder_with_an_earlier_run_is_refused(tmp_path: Path) -> None:
    search(Scripted(0.9, 0.5), steps=(AS_IS,), folder=tmp_path)
    with pytest.raises(StorageError, match=r"resume=True \(--resume\) continues that run"):
        search(Scripted(), folder=tmp_path)


# --- the real thing --------------------------------------------------------------------------------------------------


def test_net_whose_naive_quantization_fails_reaches_its_target_by_equalization(tmp_path: Path) -> None:
    batches = list(torch.split(digits().train_images[:128], 32))
    net, inputs = rescaled_net(), (batches[0],)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    result = auto_quantize(
        net, inputs, batches, accuracy, target=Drop(0.01), config="int8_per_tensor", folder=tmp_path, progress=False
    )
    scores = {trial.name: trial.score for trial in result.trials}
    naive = scores["as configured"]
    assert naive is not None and naive < result.float_score - 0.2
    assert result.reached and "equalization" in result.made_by and result.trials[-1].name == "equalization"
    assert "AdaRound" in result.untried and "cross-layer-equalization" in (tmp_path / "best.toml").read_text()
    report = check_parity(load_program(tmp_path / "best.fxq"), tmp_path / "best.onnx", batches)
    assert report.worst_local_steps == 0
    assert all(torch.equal(one, other) for one, other in zip(before, net.parameters(), strict=True))
