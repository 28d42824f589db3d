"""What training does to a range is chosen per value: rules, shared grids, refusals by name, and what is printed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import CalibrationError, PassError, SpecError
from fxquant.graph.program import Program
from fxquant.graph.render import render
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.numerics.trained_ranges import LearnedScale, MovingRange
from fxquant.passes import AssignSpecs
from fxquant.placement import Rule
from fxquant.spec import QuantSpec, SpecOverride
from tests.helpers import run_pass
from tests.passes.harness import captured
from tests.simulation.programs import CONFIG, noise


class Net(nn.Module):
    """A convolution, a pooling maximum and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Linear(36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.fc(self.pool(self.conv(x)).flatten(1))
        return found


X = noise(2, 3, 8, 8)


def from_config(folder: Any, rules: str) -> Program:
    """int8_per_channel with rules."""
    text = CONFIG.read_text(encoding="utf-8")
    place = '[[prepare]]\npass = "select-per-channel"'
    assert text.count(place) == 1
    (folder / "config.toml").write_text(text.replace(place, f"{rules}\n{place}"), encoding="utf-8")
    program = fxquant.capture(Net().eval(), (X,))
    fxquant.load_pipeline(folder / "config.toml").prepare(program)
    return program


def quantizer(program: Program, value: str) -> FakeQuant:
    found = program.module.get_submodule(f"fake_quants.{value}")
    assert isinstance(found, FakeQuant)
    return found


def test_a_rule_chooses_for_one_value(tmp_path: Any) -> None:
    rules = '[[prepare.rules]]\nop = "linear"\noutput = { training = "lsq" }\nweight = { training = "min-max" }\n'
    program = from_config(tmp_path, rules)
    assert isinstance(quantizer(program, "fc").range, LearnedScale)
    assert quantizer(program, "fc_weight").spec.training == "min-max"
    assert quantizer(program, "conv").range is None and quantizer(program, "conv_weight").range is None
    fxquant.calibrate(program, [(X,)], progress=False)
    assert (quantizer(program, "fc").mode, quantizer(program, "conv").mode) == (Mode.LEARN, Mode.FAKE)


def test_readers_take_over_the_training_of_a_value_that_a_rule_changes(tmp_path: Any) -> None:
    """The rule decides for the value, whoever reads it, and what shares its grid has the same range."""
    rules = '[[prepare.rules]]\nop = "convolution"\noutput = { training = "moving-average(0.2)" }\n'
    program = from_config(tmp_path, rules)
    calls = [node for node, module in program.fake_quant_nodes() if isinstance(module.range, MovingRange)]
    assert {node.target for node in calls} == {"fake_quants.conv"} and len(calls) > 1
    assert [node.kwargs.get("observe", True) for node in calls].count(True) == 1
    fxquant.calibrate(program, [(X,)], progress=False)
    program.module.train()
    before = quantizer(program, "conv").range
    assert isinstance(before, MovingRange)
    low = before.low.clone()
    program.module(9 * X)
    once = before.low - low
    assert bool(once < 0)  # the owner's place alone moves it


def test_a_weight_s_moving_average_is_refused_by_name(tmp_path: Any) -> None:
    rules = '[[prepare.rules]]\nop = "linear"\nweight = { training = "moving-average" }\n'
    with pytest.raises(PassError, match=r"weight 'fc_weight'.*static.*moving-average.*by fc.*activations only"):
        from_config(tmp_path, rules)


def test_two_consumers_that_want_other_training_are_refused_by_name() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.one(x), self.two(x)

    program = captured(Twice(), X)
    rule = Rule(node="two", input=SpecOverride(training="lsq"))
    other = Rule(node="one", input=SpecOverride(training="log2"))
    with pytest.raises(PassError, match=r"'x'.*one value for 'training'.*log2 .*'one'.*lsq .*'two'"):
        run_pass(AssignSpecs(rules=(rule, other)), program)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lsqq", r"range training 'lsqq' is unknown.*lsq"),
        ("lsq(0.1)", r"'lsq'; expected no number; got lsq\(0.1\)"),
        ("moving-average(2)", r"expected a number in \[0, 1\] \(momentum"),
        ("moving-average(x)", r"expected a number in \[0, 1\]"),
    ],
)
def test_wrong_training_is_refused_by_name(text: str, expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        QuantSpec(training=text)
    with pytest.raises(SpecError, match=expected):
        SpecOverride(training=text)


def test_training_is_printed(tmp_path: Any) -> None:
    program = from_config(tmp_path, '[[prepare.rules]]\nop = "linear"\noutput = { training = "log2" }\n')
    assert "trained by log2" in str(quantizer(program, "fc").spec)
    assert [line for line in render(program).splitlines() if "fc_fq" in line and "trained by log2" in line]
    assert str(SpecOverride(training="log2")) == "training log2"


class Parameters(nn.Module):
    """A layer scale and a position embedding; and a second layer for their quantized result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3)
        self.gain, self.place = nn.Parameter(torch.rand(4, 1, 1)), nn.Parameter(torch.rand(4, 6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(torch.relu(self.conv(x)) * self.gain + self.place)
        return found


@pytest.mark.parametrize("preset", ["int8_per_channel", "int8_per_channel_qat"])
def test_moving_average_of_activations_leaves_parameters_to_be_followed(preset: str) -> None:
    activation = SpecOverride(training="moving-average")
    sim = fxquant.QuantSim(Parameters().eval(), X, preset, activation=activation)
    for name in ("gain", "place"):
        assert quantizer(sim.program, name).spec.training == "static" and quantizer(sim.program, name).follows
    assert quantizer(sim.program, "mul").spec.training == "moving-average"
    sim.compute_encodings([X], progress=False)
    sim.model.train()
    with torch.no_grad():
        sim.model.get_parameter("gain").fill_(9.0)
    sim.model(X)
    grid = quantizer(sim.program, "gain").encoding
    assert float(grid.scale) * 255 == pytest.approx(9.0, rel=1e-6)
    assert quantizer(sim.program, "mul").mode is Mode.TRACK


def test_moving_average_of_weights_is_refused_by_name_also_where_activations_have_one() -> None:
    moving = SpecOverride(training="moving-average")
    with pytest.raises(PassError, match="weight 'conv_weight' is wanted with a moving average"):
        fxquant.QuantSim(Parameters().eval(), X, activation=moving, weight=moving)


def test_weight_that_training_made_nan_is_what_the_error_speaks_of() -> None:
    program = fxquant.capture(Net().eval(), (X,))
    fxquant.load_pipeline("int8_per_channel").prepare(program)
    fxquant.calibrate(program, [(X,)], progress=False)
    program.module.train()
    with torch.no_grad():
        program.module.get_parameter("conv.weight")[1, 0, 0, :2] = float("nan")
    text = r"shape \(4, 3, 3, 3\), is not finite.*got 2 of 108 NaN or Inf.*lower the learning rate"
    with pytest.raises(CalibrationError, match=text):
        program.module(X)
