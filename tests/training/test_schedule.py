"""Schedules: checked values, TOML and back, and what step_epoch does when, in anybody's loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxquant.errors import ConfigError, FxquantError, PassError
from fxquant.graph.pipeline import load_pipeline, packaged_pipelines, parse_pipeline
from fxquant.graph.program import NoteKind
from fxquant.numerics.fake_quant import Mode
from fxquant.numerics.live_batch_norm import LiveBatchNorm
from fxquant.schedule import Schedule
from fxquant.sim import QuantSim
from fxquant.spec import SpecOverride
from fxquant.training.schedule_runner import ScheduleRunner
from tests.training.loop_nets import SHORT, calibrated, loss, samples, state

COUNTS = st.integers(1, 40)
RATES = st.floats(1e-12, 10.0, allow_nan=False)
SCHEDULES = st.builds(
    Schedule,
    epochs=COUNTS,
    learning_rate=RATES,
    range_learning_rate=st.none() | RATES,
    learning_rate_divisor=st.floats(1.0, 100.0),
    divide_every=st.none() | COUNTS,
    freeze_batch_norm_after=st.none() | COUNTS,
    freeze_encodings_after=st.none() | COUNTS,
)


def parse(table: str) -> Schedule:
    head = 'catalogue = "fxquant.passes:CATALOG"\n[[prepare]]\npass = "remove-identity"\n'
    middle = '[[prepare]]\npass = "assign-specs"\n[[prepare]]\npass = "insert-fake-quant"\n'
    return parse_pipeline(
        f'{head}{middle}{table}\n[[finalize]]\npass = "settle-encodings"\n', "mine", place="mine.toml"
    ).schedule


# --- values ----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_documented_ones() -> None:
    schedule = Schedule()
    assert (schedule.epochs, schedule.learning_rate, schedule.learning_rate_divisor) == (15, 1e-5, 10.0)
    assert (schedule.divide_every, schedule.freeze_batch_norm_after, schedule.freeze_encodings_after) == (5, 3, 4)
    assert schedule.range_learning_rate is None


def test_learning_rate_is_divided_every_few_epochs() -> None:
    schedule = Schedule(learning_rate=1e-3, divide_every=2)
    assert [schedule.learning_rate_at(epoch) for epoch in range(5)] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5])
    assert Schedule(divide_every=None).learning_rate_at(1000) == 1e-5


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"epochs": 0}, "Schedule.epochs; expected a number of epochs, 1 or more; got 0. Train for one epoch or more."),
        ({"epochs": 2.0}, "Schedule.epochs; expected a number of epochs, 1 or more; got 2.0. "),
        ({"epochs": True}, "Schedule.epochs; expected a number of epochs, 1 or more; got True. "),
        ({"divide_every": 0}, "got 0. None never divides the learning rate."),
        (
            {"freeze_batch_norm_after": 0},
            "None never freezes; to freeze before the first epoch, call sim.freeze_batch_norm().",
        ),
        (
            {"freeze_encodings_after": -1},
            "got -1. None never freezes; to freeze before the first epoch, call sim.freeze_",
        ),
        ({"learning_rate": 0.0}, "Schedule.learning_rate; expected a positive number; got 0.0. Start near the last"),
        ({"learning_rate": float("nan")}, "Schedule.learning_rate; expected a positive number; got nan. "),
        ({"range_learning_rate": float("inf")}, "Schedule.range_learning_rate; expected a positive number; got inf. "),
        (
            {"learning_rate_divisor": 0.1},
            "Schedule.learning_rate_divisor; expected a number of at least 1; got 0.1. It",
        ),
        ({"learning_rate": 10**400}, "Schedule.learning_rate; expected a positive number; got 1000000"),
        ({"learning_rate_divisor": 10**400}, "Schedule.learning_rate_divisor; expected a number of at least 1; got 10"),
        ({"epochs": 10**5000}, "expected a number of epochs, at most 2^63 - 1; got an integer of thousands of digits."),
        ({"learning_rate_divisor": "10"}, "Schedule.learning_rate_divisor; expected a number of at least 1; got '10'."),
    ],
)
def test_schedule_that_makes_no_sense_is_refused_with_a_remedy(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Schedule(**values)
    assert text in str(caught.value)


def test_numbers_of_numpy_become_plain_ones() -> None:
    given: Any = {
        "epochs": np.int64(4),
        "learning_rate": np.float64(0.1),
        "range_learning_rate": np.float32(0.5),
        "learning_rate_divisor": 10,
        "divide_every": np.uint8(2),
    }
    found = Schedule(**given)
    assert {name: type(getattr(found, name)) for name in given} == {
        "epochs": int,
        "learning_rate": float,
        "range_learning_rate": float,
        "learning_rate_divisor": float,
        "divide_every": int,
    }
    assert all(getattr(found, name) == value for name, value in given.items())


# --- TOML ------------------------------------------------------------------------------------------------------------


@given(SCHEDULES)
def test_toml_gives_back_any_schedule(schedule: Schedule) -> None:
    pipeline = load_pipeline("int8_per_channel").with_schedule(schedule)
    text = pipeline.to_toml()
    assert parse_pipeline(text, "again", place="again.toml").schedule == schedule
    assert ("[training]" in text) == (schedule != Schedule())


def test_override_keeps_the_schedule() -> None:
    pipeline = load_pipeline("int8_per_channel_qat").with_schedule(SHORT)
    assert pipeline.override(weight=SpecOverride(bits=4)).schedule == SHORT


def test_table_says_never_where_python_says_none() -> None:
    table = '[training]\nepochs = 20\nlearning_rate = 1\ndivide_every = "never"\nfreeze_encodings_after = "never"'
    assert parse(table) == Schedule(epochs=20, learning_rate=1.0, divide_every=None, freeze_encodings_after=None)
    assert parse("") == Schedule()


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("[training]\nepoch = 3", "unknown key 'epoch' (mine.toml: training). Did you mean 'epochs'?"),
        (
            '[training]\nfreeze_encodings_after = "nevr"',
            'wrong value (mine.toml: training.freeze_encodings_after); expected a number of epochs, or "never"; '
            'got "nevr"',
        ),
        ('[training]\nepochs = "never"', "wrong type (mine.toml: training.epochs); expected an integer"),
        ("[training]\nepochs = 0", "Schedule.epochs (mine.toml: training); expected a number of epochs, 1 or more"),
        (
            f"[training]\nlearning_rate = {'1' * 400}",
            "number too large (mine.toml: training.learning_rate); expected one of 64 bits; got 11111",
        ),
        (
            f"[training]\nlearning_rate_divisor = {'1' * 400}",
            "number too large (mine.toml: training.learning_rate_divisor); expected one of 64 bits; got 11111",
        ),
        ("[[training]]\nepochs = 3", "key 'training' (mine.toml: training); expected a [training] table; got list"),
    ],
)
def test_table_that_says_something_else_is_refused_by_file_and_key(table: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(table)
    assert text in str(caught.value)


@pytest.mark.parametrize("preset", [name for name in packaged_pipelines() if "_qat" in name or "_lsq" in name])
def test_training_presets_spell_their_schedule_out(preset: str) -> None:
    schedule = load_pipeline(preset).schedule
    assert (schedule.epochs, schedule.learning_rate, schedule.freeze_batch_norm_after) == (15, 1e-5, 3)
    assert schedule.freeze_encodings_after == (None if "_lsq" in preset else 4)


# --- step_epoch ------------------------------------------------------------------------------------------------------


def optimizer_of(sim: QuantSim) -> torch.optim.Optimizer:
    named = list(sim.model.named_parameters())
    ranges = [parameter for name, parameter in named if ".range." in name]
    others = [parameter for name, parameter in named if ".range." not in name]
    return torch.optim.SGD([{"params": others, "lr": 0.01}, {"params": ranges, "lr": 0.5}])


def test_step_epoch_freezes_and_divides_when_due_and_says_so() -> None:
    sim = calibrated("lsq+")
    optimizer = optimizer_of(sim)
    said = [sim.step_epoch(optimizer) for _ in range(4)]
    assert said == [
        (),
        ("batch norm statistics frozen", "learning rate divided by 10: 0.001, 0.05"),
        ("encodings frozen",),
        ("learning rate divided by 10: 0.0001, 0.005",),
    ]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 5e-3])
    notes = [str(note) for note in sim.program.notes if note.kind is NoteKind.TRAINING]
    assert "training: after epoch 2: batch norm statistics frozen" in notes and len(notes) == 4
    assert sim.epoch == 4


def test_freezing_is_in_force_in_train_mode() -> None:
    sim = calibrated("lsq+")
    live = [module for module in sim.model.modules() if isinstance(module, LiveBatchNorm)]
    assert live and {fq.mode for _, fq in sim.program.fake_quant_nodes()} == {Mode.LEARN, Mode.FAKE}
    for _ in range(3):
        sim.step_epoch()
    assert {fq.mode for _, fq in sim.program.fake_quant_nodes()} == {Mode.FROZEN}
    before = state(sim)
    sim.model.train()
    loss(sim.model, samples()[0])
    after = state(sim)
    assert all(torch.equal(before[name], after[name]) for name in before if "running" in name or "fake_quants" in name)


@pytest.mark.parametrize("training", ["static", "lsq"])
def test_freezing_keeps_module_and_parameters_as_they_are(training: str) -> None:
    sim = calibrated(training)
    module, before = sim.model, dict(sim.model.named_parameters())
    for _ in range(4):
        sim.step_epoch()
    after = dict(sim.model.named_parameters())
    assert sim.model is module and before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


@pytest.mark.filterwarnings("ignore")  # torch's tracer warns of what it does itself
def test_compiled_module_notices_that_it_was_frozen() -> None:
    torch._dynamo.reset()
    sim = calibrated()
    compiled: Any = torch.compile(sim.model, backend="eager")
    sim.model.drop.p = 0.0
    sim.model.train()
    x = samples()[0][0]
    compiled(x)
    for _ in range(3):
        sim.step_epoch()
    before = state(sim)
    torch.testing.assert_close(compiled(x), sim.model(x))
    after = state(sim)
    assert all(torch.equal(before[name], after[name]) for name in before if "running" in name)


def test_nothing_to_freeze_is_nothing_done() -> None:
    torch.manual_seed(0)
    sim = QuantSim(nn.Linear(4, 3).eval(), (torch.randn(2, 4),), schedule=SHORT)
    sim.compute_encodings([torch.randn(2, 4)], progress=False)
    assert sim.step_epoch() == () and sim.step_epoch() == ()
    assert sim.step_epoch() == ("encodings frozen",)


def test_what_cannot_be_frozen_is_said() -> None:
    torch.manual_seed(0)
    sim = QuantSim(nn.Linear(4, 3).eval(), (torch.randn(2, 4),), schedule=Schedule(freeze_encodings_after=1))
    (*_, text) = sim.step_epoch()
    assert "not frozen" in text and "it saw no data" in text


def test_failed_freeze_does_not_count_the_epoch() -> None:
    sim = calibrated()
    sim.schedule = Schedule(freeze_batch_norm_after=1)
    sim.pipeline.finalize(sim.program)
    with pytest.raises(PassError, match="freeze-batch-norm"):
        sim.step_epoch()
    assert sim.epoch == 0


def test_runner_serves_a_loop_without_quant_sim() -> None:
    sim = calibrated()
    runner = ScheduleRunner(sim.program, sim.pipeline.with_schedule(SHORT))
    said = [runner.step() for _ in range(3)]
    assert said == [(), ("batch norm statistics frozen",), ("encodings frozen",)] and runner.epoch == 3
    late = ScheduleRunner(calibrated().program, sim.pipeline, Schedule(freeze_batch_norm_after=8), epoch=7)
    assert late.step() == ("batch norm statistics frozen",)


@pytest.mark.parametrize("wrong", [3, "adam", torch.nn.Linear(2, 2)], ids=["int", "str", "module"])
def test_what_is_no_optimizer_is_refused_also_where_nothing_is_divided(wrong: Any) -> None:
    sim = calibrated()
    with pytest.raises(FxquantError) as raised:
        sim.step_epoch(wrong)
    error = raised.value
    assert error.thing == "step_epoch" and error.expected and error.remedy and type(wrong).__name__ in error.got
    assert sim.epoch == 0


def test_learning_rate_that_groups_share_as_a_tensor_is_divided_once() -> None:
    rate = torch.tensor(0.5)
    one, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([{"params": [one], "lr": rate}, {"params": [other], "lr": rate}])
    runner = ScheduleRunner(calibrated().program, load_pipeline("int8_per_channel"), Schedule(divide_every=1))
    runner.step(optimizer)
    assert optimizer.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(0.05)


@settings(max_examples=20)
@given(SCHEDULES, st.integers(1, 60))
def test_rates_of_an_optimizer_follow_learning_rate_at(schedule: Schedule, epochs: int) -> None:
    runner = ScheduleRunner(calibrated_once().program, load_pipeline("int8_per_channel"), schedule)
    object.__setattr__(runner, "_freeze", lambda name, text: [text])
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=schedule.learning_rate)
    for epoch in range(epochs):
        assert optimizer.param_groups[0]["lr"] == schedule.learning_rate_at(epoch)
        runner.step(optimizer)


_ONCE: list[QuantSim] = []


def calibrated_once() -> QuantSim:
    """One simulation for all examples of a property."""
    if not _ONCE:
        _ONCE.append(calibrated())
    return _ONCE[0]
