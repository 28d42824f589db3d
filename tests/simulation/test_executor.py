"""What the executor keeps between forwards is renewed when the program changes; values are dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxquant.errors import FxquantError
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.simulation import ExactArithmetic, Executor
from tests.simulation.programs import calibrated, noise, outputs
from tests.simulation.test_forms import X, program_of


def _shift(module: FakeQuant) -> None:
    module.zero_point.add_(3)


def _replace_zero_point(module: FakeQuant) -> None:
    module.zero_point = module.zero_point + 3


def _replace_scale(module: FakeQuant) -> None:
    module.scale = 2 * module.scale


def _unseen_scale(module: FakeQuant) -> None:
    module.scale.data.mul_(2)


def _unseen_zero_point(module: FakeQuant) -> None:
    module.zero_point.numpy()[...] = 99


@pytest.mark.parametrize("change", [_shift, _replace_zero_point, _replace_scale, _unseen_scale, _unseen_zero_point])
@pytest.mark.parametrize("name", ["exact", "integer"])
def test_one_change_of_a_grid_is_picked_up(name: str, change: Callable[[FakeQuant], None]) -> None:
    """Each changes one buffer only; the last two without its version counter."""
    program = program_of()
    with torch.no_grad():
        before = outputs(program, name, X)
        for _ in range(2):
            for _, module in program.fake_quant_nodes():
                if not module.follows:
                    change(module)
            found = outputs(program, name, X)
            assert torch.equal(found, outputs(program.copy(), name, X))
            assert not torch.equal(found, before)


@pytest.mark.parametrize("name", ["exact", "integer"])
def test_a_weight_that_is_switched_off_and_on_is_picked_up(name: str) -> None:
    program = program_of()
    weights = [module for _, module in program.fake_quant_nodes() if module.follows]
    with torch.no_grad():
        before = outputs(program, name, X)
        for mode in (Mode.OFF, Mode.FAKE):
            for module in weights:
                module.mode = mode
            found = outputs(program, name, X)
            assert torch.equal(found, outputs(program.copy(), name, X))
            assert torch.equal(found, before) == (mode is Mode.FAKE)


@pytest.mark.parametrize("name", ["exact", "integer"])
def test_other_precisions_are_refused(name: str) -> None:
    program = program_of()
    outputs(program, name, X)
    with pytest.raises(FxquantError, match="float32.*float64"):
        program.module(X.double())
    program.module.double()
    with pytest.raises(FxquantError, match="parameter '.*float32.*float64"):
        program.module(X)


def test_values_are_dropped_after_their_last_use() -> None:
    program = calibrated(nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))), noise(2, 4))
    values: dict[fx.Node, Any] = {}
    held = []
    inputs = {node.name: noise(2, 4) for node in program.graph.find_nodes(op="placeholder")}
    for _ in Executor(program, ExactArithmetic()).steps(inputs, {}, values):
        held.append(len(values))
    assert len(held) == 13 and max(held) < 10
    assert list(values) == program.graph.output_node().all_input_nodes
