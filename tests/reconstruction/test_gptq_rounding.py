"""GPTQ's rounding against a plain loop, and where its answer is known."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.reconstruction.gptq import GptqOptions, MatrixGrid, gptq
from fxquant.reconstruction.product import squared_errors


def grid_of(weight: torch.Tensor, qmax: int = 7) -> MatrixGrid:
    """A symmetric grid a row, over its extremes."""
    scale = weight.abs().amax(-1, keepdim=True).clamp(min=1e-3) / qmax
    return MatrixGrid(scale.expand_as(weight), torch.zeros(weight.shape, dtype=torch.int64), -qmax, qmax)


def correlated(columns: int, rows: int, seed: int, groups: int = 1) -> torch.Tensor:
    """Second moment of inputs whose channels are mixtures of a few."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(groups, rows, max(columns // 3, 1), generator=generator, dtype=torch.float64)
    mixed = few @ torch.randn(groups, few.shape[-1], columns, generator=generator, dtype=torch.float64)
    x = mixed + 0.2 * torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
    return x.transpose(1, 2) @ x


def by_plain_loop(weight: torch.Tensor, moment: torch.Tensor, grid: MatrixGrid, damping: float) -> torch.Tensor:
    """Steps of one group, with the inverse of what is left computed anew for each column (optimal brain quantization,
    in the order of the columns): no factors, no blocks.
    """
    rest = weight.double().clone()
    damped = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    steps = torch.zeros_like(rest)
    for column in range(rest.shape[1]):
        inverse = torch.linalg.inv(damped[column:, column:])
        scale = grid.scale[0, :, column].double()
        steps[:, column] = torch.clamp(torch.round(rest[:, column] / scale), grid.qmin, grid.qmax)
        error = (rest[:, column] - steps[:, column] * scale) / inverse[0, 0]
        rest[:, column:] -= error[:, None] * inverse[0][None, :]
    return steps


@given(columns=st.integers(1, 9), outputs=st.integers(1, 4), block=st.integers(1, 10), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_codes_are_those_of_a_plain_loop_whatever_the_block_size(
    columns: int, outputs: int, block: int, seed: int
) -> None:
    weight = torch.randn(1, outputs, columns, generator=torch.Generator().manual_seed(seed))
    moment, grid = correlated(columns, 20, seed), grid_of(weight)
    steps = by_plain_loop(weight[0], moment[0], grid, 0.01)
    errors = squared_errors(grid.real(steps[None]) - weight, moment)
    plain = squared_errors(grid.real(grid.steps(weight)) - weight, moment)
    expected = torch.where((errors < plain)[..., None], steps[None], grid.steps(weight))
    found = gptq(weight, moment, grid, GptqOptions(block_size=block))
    assert torch.equal(found.codes.double(), expected)
    assert torch.allclose(found.chosen, torch.minimum(errors, plain))


@pytest.mark.parametrize("act_order", [False, True])
def test_codes_are_the_nearest_when_no_two_inputs_are_correlated(act_order: bool) -> None:
    weight = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))
    moment = torch.diag_embed(torch.rand(3, 12, dtype=torch.float64) + 0.1)
    grid = grid_of(weight)
    found = gptq(weight, moment, grid, GptqOptions(act_order=act_order))
    assert torch.equal(found.codes, grid.codes(grid.steps(weight)))


@given(columns=st.integers(2, 9), groups=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_act_order_is_a_plain_loop_over_columns_of_falling_power(columns: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, 3, columns, generator=generator)
    power = torch.logspace(0, 2, columns, dtype=torch.float64)[torch.randperm(columns, generator=generator)]
    moment = correlated(columns, 20, seed, groups) * power[:, None] * power
    grid = grid_of(weight)
    order = sorted(range(columns), key=lambda column: -float(moment[:, column, column].sum()))
    expected = []
    for group in range(groups):
        part = MatrixGrid(grid.scale[group, None][..., order], grid.zero_point[:1], grid.qmin, grid.qmax)
        steps = by_plain_loop(weight[group][:, order], moment[group][order][:, order], part, 0.01)
        expected.append(steps[:, torch.argsort(torch.tensor(order))])
    errors = squared_errors(grid.real(torch.stack(expected)) - weight, moment)
    plain = squared_errors(grid.real(grid.steps(weight)) - weight, moment)
    codes = torch.where((errors < plain)[..., None], torch.stack(expected), grid.steps(weight))
    assert torch.equal(gptq(weight, moment, grid, GptqOptions(act_order=True)).codes.double(), codes)


@pytest.mark.parametrize("act_order", [False, True])
def test_error_is_less_than_half_of_the_nearest_on_correlated_inputs(act_order: bool) -> None:
    weight = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(1))
    moment = correlated(48, 400, 1, groups=2)
    found = gptq(weight, moment, grid_of(weight), GptqOptions(act_order=act_order))
    errors = squared_errors(grid_of(weight).real(found.codes.double()) - weight, moment)
    assert torch.allclose(errors, found.chosen)
    assert found.chosen.sum() < 0.5 * found.nearest.sum()


def test_error_lies_between_the_optimum_and_the_nearest() -> None:
    gains = []
    for seed in range(20):
        weight = torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(seed))
        moment, grid = correlated(4, 30, seed), grid_of(weight, qmax=2)
        tried = torch.tensor(list(itertools.product(range(-2, 3), repeat=4)), dtype=torch.float64)
        optimum = squared_errors(tried[None] * grid.scale[0, 0].double() - weight.double(), moment).min()
        found = gptq(weight, moment, grid, GptqOptions(damping=1e-6))
        assert optimum <= found.chosen * (1 + 1e-9) <= found.nearest * (1 + 2e-9)
        gains.append(((found.nearest - found.chosen) / (found.nearest - optimum).clamp(min=1e-12)).item())
    assert sum(gains) / len(gains) > 0.3  # of what there is to win


def test_dead_column_keeps_its_nearest_codes_and_moves_no_other() -> None:
    weight = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(2))
    moment = correlated(6, 40, 3)
    moment[:, 2] = 0.0
    moment[:, :, 2] = 0.0
    grid = grid_of(weight)
    found = gptq(weight, moment, grid, GptqOptions())
    rest = [0, 1, 3, 4, 5]
    small = MatrixGrid(grid.scale[..., rest], grid.zero_point[..., rest], grid.qmin, grid.qmax)
    alone = gptq(weight[..., rest], moment[:, rest][:, :, rest], small, GptqOptions(damping=0.01 * 5 / 6))
    assert torch.equal(found.codes[..., 2], grid.codes(grid.steps(weight))[..., 2])
    assert torch.equal(found.codes[..., rest], alone.codes)


def test_codes_stay_on_an_asymmetric_grid() -> None:
    weight = torch.randn(1, 8, 10, generator=torch.Generator().manual_seed(4)) + 1.0
    scale = torch.full_like(weight, 0.4)
    grid = MatrixGrid(scale, torch.full(weight.shape, 3, dtype=torch.int64), 0, 7)
    found = gptq(weight, correlated(10, 50, 5), grid, GptqOptions())
    assert 0 <= int(found.codes.min()) and int(found.codes.max()) <= 7
    assert bool((found.chosen <= found.nearest).all()) and bool((found.chosen < found.nearest).any())


def test_nearest_is_kept_where_few_rows_say_nothing_of_others() -> None:
    weight, x = few_rows(64, 6), few_rows(64, 400, seed=1)
    moment, held_back = moment_of(x[:10]), moment_of(x[10:20])
    options, grid = GptqOptions(), grid_of(weight[None])
    nearest = grid.codes(grid.steps(weight[None]))
    fooled = gptq(weight[None], moment + held_back, grid, options).codes
    assert not torch.equal(fooled, nearest)
    others = [squared_errors(codes * grid.scale - weight[None], moment_of(x[20:])).sum() for codes in (fooled, nearest)]
    assert others[0] > others[1]  # rounding that fits 20 rows hurts on 380 others
    on_rest = gptq(weight[None], moment.clone(), grid, options).codes
    kept = gptq(weight[None], moment, grid, options, held_back)
    assert torch.equal(kept.codes, nearest)
    on_held = [squared_errors(codes * grid.scale - weight[None], held_back).sum() for codes in (nearest, on_rest)]
    assert kept.refused is not None and torch.allclose(kept.refused, torch.stack(on_held), rtol=1e-5)


def test_rows_held_back_count_where_they_agree() -> None:
    weight = torch.randn(1, 16, 48, generator=torch.Generator().manual_seed(1))
    moment, held_back = correlated(48, 400, 1), correlated(48, 400, 1) * 0.25
    both, grid = moment + held_back, grid_of(weight)
    expected = gptq(weight, both, grid, GptqOptions())
    found = gptq(weight, moment, grid, GptqOptions(), held_back)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.chosen, expected.chosen)
    assert found.refused is None
    assert not torch.equal(found.codes, grid.codes(grid.steps(weight)))


def few_rows(columns: int, rows: int, seed: int = 0) -> torch.Tensor:
    """Rows of independent numbers, of which few tell nothing of others."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def moment_of(rows: torch.Tensor) -> torch.Tensor:
    """Their second moment, of one group."""
    return (rows.double().T @ rows.double())[None]
