"""parameter_groups: every trainable parameter once, in the group where it belongs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import ConfigError
from tests.helpers import residual_program
from tests.training.residual import FOLDED, LIVE, WAYS, simulated


@pytest.mark.parametrize(("preset", "training"), WAYS)
def test_every_trainable_parameter_is_there_once(preset: str, training: str | None) -> None:
    program = simulated(preset, training).program
    groups = fxquant.parameter_groups(program, 1e-3)
    found = [id(one) for group in groups for one in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(one) for one in program.module.parameters() if one.requires_grad}


def test_groups_have_the_rates_and_decay_of_their_kind() -> None:
    program = simulated(LIVE, "lsq+").program
    names = {id(one): name for name, one in program.module.named_parameters()}
    weights, others, ranges = fxquant.parameter_groups(program, 1e-3, 1e-5, 0.1)
    assert [group["name"] for group in (weights, others, ranges)] == ["weights", "norms and biases", "ranges"]
    assert [(group["lr"], group["weight_decay"]) for group in (weights, others, ranges)] == [
        (1e-3, 0.1),
        (1e-3, 0.0),
        (1e-5, 0.0),
    ]
    assert {names[id(one)] for one in weights["params"]} == {
        "stem.weight",
        "block.conv.weight",
        "block.last.weight",
        "fc.weight",
    }
    assert {name.split(".")[-2] for name in (names[id(one)] for one in ranges["params"])} == {"range"}
    assert "bn.bias" in {names[id(one)] for one in others["params"]}
    assert fxquant.parameter_groups(program, 1e-3)[2]["lr"] == 1e-3


def test_empty_groups_and_frozen_parameters_are_left_out() -> None:
    program = simulated(FOLDED).program
    assert [group["name"] for group in fxquant.parameter_groups(program, 1e-3)] == ["weights", "norms and biases"]
    program.module.fc.requires_grad_(False)
    kept = {id(one) for group in fxquant.parameter_groups(program, 1e-3) for one in group["params"]}
    assert kept == {id(one) for one in program.module.parameters() if one.requires_grad}


def test_a_tied_parameter_is_there_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    (weights, _) = fxquant.parameter_groups(fxquant.capture(model, torch.randn(2, 4)), 1e-3)
    assert len(weights["params"]) == 1


def test_modules_and_their_wrappers_are_taken() -> None:
    module = simulated(LIVE, "lsq").model
    for given in (module, nn.Sequential(module)):
        assert [group["name"] for group in fxquant.parameter_groups(given, 1e-3)] == [
            "weights",
            "norms and biases",
            "ranges",
        ]


@pytest.mark.parametrize("rate", [-1e-3, math.nan, math.inf])
def test_impossible_rates_are_refused_by_name(rate: float) -> None:
    program = residual_program()
    with pytest.raises(ConfigError, match="parameter_groups: range_learning_rate; expected a number"):
        fxquant.parameter_groups(program, 1e-3, rate)
    with pytest.raises(ConfigError, match="parameter_groups: weight_decay"):
        fxquant.parameter_groups(program, 1e-3, weight_decay=rate)


def test_nothing_to_train_is_refused() -> None:
    program = residual_program()
    program.module.requires_grad_(False)
    with pytest.raises(ConfigError, match="expected at least one trainable parameter; got none"):
        fxquant.parameter_groups(program, 1e-3)


@pytest.mark.parametrize("wrong", ["1e-3", None, True, [1e-3], math.nan, math.inf, -1e-3, 10**400])
@pytest.mark.parametrize("name", ["learning_rate", "range_learning_rate", "weight_decay"])
def test_rate_that_is_no_number_is_refused_by_name_with_a_remedy(name: str, wrong: object) -> None:
    if (name, wrong) == ("range_learning_rate", None):
        return
    options: dict[str, Any] = {"learning_rate": 1e-3, name: wrong}
    with pytest.raises(ConfigError) as raised:
        fxquant.parameter_groups(residual_program(), **options)
    error = raised.value
    assert (error.thing, error.got) == (f"parameter_groups: {name}", repr(wrong))
    assert error.expected and f"{name}=1e-4" in error.remedy
