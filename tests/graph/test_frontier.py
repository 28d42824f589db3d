"""Walks over batches: a program's grids are brought up to date once a step, whatever the number of batches."""

from __future__ import annotations

import pytest
import torch

from fxquant.graph.frontier import Frontier, show_all
from fxquant.graph.module import ProgramModule
from fxquant.graph.program import Program
from fxquant.passes.quantized_layers import quantized_layers
from tests.passes.pipelines import residual
from tests.reconstruction.layers import calibrated, correlated

BATCHES = [correlated(4, 4, 8, 8, seed=index) for index in range(5)]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[ProgramModule]:
    """The modules that were brought up to date, in turn."""
    seen: list[ProgramModule] = []
    settle = ProgramModule.settle

    def count(module: ProgramModule) -> None:
        seen.append(module)
        settle(module)

    monkeypatch.setattr(ProgramModule, "settle", count)
    return seen


def stops(program: Program) -> list[torch.fx.Node]:
    """What its layers read."""
    return [layer.input for layer in quantized_layers(program)]


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("limit", [0, 2**30], ids=["nothing kept", "all kept"])
def test_frontier_settles_a_program_once_a_step(settled: list[ProgramModule], count: int, limit: int) -> None:
    program = calibrated(residual(), BATCHES)
    frontier = Frontier(program, stops(program), BATCHES[:count], limit)
    settled.clear()
    for stop in stops(program):
        frontier.advance(stop, lambda value: None)
    assert len(settled) == 3


def test_frontier_steps_with_weights_as_they_are_when_it_goes_on() -> None:
    program = calibrated(residual(), BATCHES)
    first, second, third = quantized_layers(program)
    frontier = Frontier(program, [first.input, third.input], BATCHES, 2**30)
    frontier.advance(first.input, lambda value: None)
    with torch.no_grad():
        program.tensor(second.weight).mul_(3.0)
    seen: list[torch.Tensor] = []
    frontier.advance(third.input, seen.append)
    expected: list[torch.Tensor] = []
    show_all(program, [third.input], BATCHES, lambda _, value: expected.append(value))
    assert all(torch.equal(found, wanted) for found, wanted in zip(seen, expected, strict=True))


def test_show_all_settles_a_program_once(settled: list[ProgramModule]) -> None:
    program = calibrated(residual(), BATCHES)
    settled.clear()
    show_all(program, stops(program), BATCHES, lambda node, value: None)
    assert len(settled) == 1


def test_a_program_in_training_mode_is_in_eval_mode_for_each_batch() -> None:
    program = calibrated(residual(), BATCHES)
    program.module.train()
    modes: list[bool] = []
    show_all(program, stops(program), BATCHES, lambda node, value: modes.append(program.module.training))
    assert modes == [True] * 15 and program.module.training
