"""QLinearAdd and QLinearMul: all pairs of codes, many grids, broadcast operands, the order of operands."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given

from fxquant.numerics.codes import Grid
from fxquant.numerics.kernels.elementwise import add, multiply, scalar_is_first
from fxquant.numerics.runtime import Level
from tests.numerics.quantized_models import (
    LEVELS,
    Array,
    Case,
    Operator,
    bytes_of,
    decades,
    differing,
    every_pair,
    grid,
    random_cases,
    seeds,
    tensor,
)

Formula = Callable[[torch.Tensor, torch.Tensor, Grid, Grid, Grid], torch.Tensor]
ADD, MULTIPLY = Operator("Add", "QLinearAdd"), Operator("Mul", "QLinearMul")
BOTH = pytest.mark.parametrize(("operator", "formula"), [(ADD, add), (MULTIPLY, multiply)], ids=["add", "multiply"])


def of(formula: Formula, first: Array, second: Array) -> Callable[[Case], torch.Tensor]:
    def codes(case: Case) -> torch.Tensor:
        one, other = case.operands
        return formula(tensor(first), tensor(second), one, other, case.out)

    return codes


def exchanged(formula: Formula, first: Array, second: Array) -> Callable[[Case], torch.Tensor]:
    """The second operand first."""

    def codes(case: Case) -> torch.Tensor:
        one, other = case.operands
        return formula(tensor(second), tensor(first), other, one, case.out)

    return codes


def add_without_fma(a: torch.Tensor, b: torch.Tensor, grid_a: Grid, grid_b: Grid, out: Grid) -> torch.Tensor:
    ratio_a, ratio_b = grid_a.scale / out.scale, grid_b.scale / out.scale
    fixed = out.zero_point - (ratio_a * grid_a.zero_point + ratio_b * grid_b.zero_point)
    return torch.round(a * ratio_a + (b * ratio_b + fixed)).clamp(out.qmin, out.qmax).to(torch.int64)


def add_then_zero_point(a: torch.Tensor, b: torch.Tensor, grid_a: Grid, grid_b: Grid, out: Grid) -> torch.Tensor:
    centred = replace(out, zero_point=torch.tensor(0), qmin=-255)
    real = (a - grid_a.zero_point) * grid_a.scale + (b - grid_b.zero_point) * grid_b.scale
    return (torch.round(real / centred.scale) + out.zero_point).clamp(out.qmin, out.qmax).to(torch.int64)


def multiply_then_zero_point(a: torch.Tensor, b: torch.Tensor, grid_a: Grid, grid_b: Grid, out: Grid) -> torch.Tensor:
    ratio = (grid_a.scale * grid_b.scale) / out.scale
    scaled = ((a - grid_a.zero_point) * (b - grid_b.zero_point)).to(torch.float32) * ratio
    return (torch.round(scaled) + out.zero_point).clamp(out.qmin, out.qmax).to(torch.int64)


@BOTH
def test_all_pairs_of_codes_are_onnxruntimes(operator: Operator, formula: Formula) -> None:
    pairs = every_pair()
    assert differing(operator, pairs, random_cases(60, 2, seed=1), of(formula, *pairs)) == 0


@pytest.mark.parametrize(
    ("operator", "fault"),
    [(ADD, add_without_fma), (ADD, add_then_zero_point), (MULTIPLY, multiply_then_zero_point)],
    ids=["no fma", "add, then zero point", "multiply, then zero point"],
)
def test_faults_are_found_when_all_pairs_are_compared(operator: Operator, fault: Formula) -> None:
    pairs = every_pair()
    assert differing(operator, pairs, random_cases(60, 2, seed=1), of(fault, *pairs)) > 0


@BOTH
@given(seed=seeds, decades=decades)
def test_codes_are_onnxruntimes_on_any_grids(operator: Operator, formula: Formula, seed: int, decades: float) -> None:
    """Up to where the result does not fit an int32: onnxruntime then writes the lowest code."""
    first, second = bytes_of(seed, 777), bytes_of(seed + 1, 777)
    cases = random_cases(12, 2, seed, decades)
    assert differing(operator, (first, second), cases, of(formula, first, second)) == 0


@BOTH
def test_codes_are_onnxruntimes_on_narrow_grids(operator: Operator, formula: Formula) -> None:
    first, second = bytes_of(1, 999) % 16, bytes_of(2, 999) % 16
    cases = [
        Case(
            tuple(replace(x, zero_point=x.zero_point % 16, qmax=15) for x in case.operands),
            replace(case.out, zero_point=case.out.zero_point % (qmax + 1), qmax=qmax),
        )
        for case, qmax in zip(random_cases(40, 2, seed=3), [1, 3, 7, 15, 63] * 8, strict=True)
    ]
    assert differing(operator, (first, second), cases, of(formula, first, second)) == 0


SHAPES = [
    ((2, 3, 5, 5), (2, 3, 5, 5)),
    ((2, 3, 1, 1), (2, 3, 5, 5)),
    ((2, 3, 5, 5), (2, 3, 1, 1)),
    ((2, 1, 5, 5), (2, 3, 5, 5)),
    ((), (7,)),
    ((7,), ()),
    ((), ()),
    ((1, 1, 1, 1), (1, 1, 1, 1)),
    ((1, 3, 1, 1), (1, 3, 1, 1)),
    ((3, 1), (1, 4)),
    ((1, 4), (3, 1)),
    ((9,), (4, 9)),
    ((1,), (3, 1)),
    ((3, 1), (1, 1)),
]


@BOTH
@pytest.mark.parametrize(("first", "second"), SHAPES, ids=str)
def test_broadcast_operands_are_onnxruntimes(
    operator: Operator, formula: Formula, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    inputs = bytes_of(1, *first), bytes_of(2, *second)
    ordered = exchanged if scalar_is_first(first, second) else of
    assert differing(operator, inputs, random_cases(40, 2, seed=5), ordered(formula, *inputs)) == 0


def order_sensitive() -> tuple[tuple[int, int], Case]:
    """A pair of codes whose sum depends on which operand is the first."""
    a, b = every_pair()
    case = Case((grid(0.7, 127), grid(0.35, 1)), grid(2.1, 1))
    found = int(of(add, a, b)(case).ne(exchanged(add, a, b)(case)).nonzero()[0])
    return (int(a[found]), int(b[found])), case


@pytest.mark.parametrize(("first", "second"), SHAPES, ids=str)
def test_order_of_a_sums_operands_is_onnxruntimes(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    (a, b), case = order_sensitive()
    inputs = np.full(first, a, np.uint8), np.full(second, b, np.uint8)
    right, wrong = (exchanged, of) if scalar_is_first(first, second) else (of, exchanged)
    count = len(LEVELS) * math.prod(np.broadcast_shapes(first, second))
    assert differing(ADD, inputs, [case], right(add, *inputs)) == 0
    assert differing(ADD, inputs, [case], wrong(add, *inputs)) == count


@pytest.mark.parametrize("full_is_first", [True, False])
def test_order_of_a_sum_with_channels_last_follows_the_layout_unless_the_full_operand_is_first(
    full_is_first: bool,
) -> None:
    """[N, 1, H, W] beside [N, C, H, W] has one element on the innermost axis where channels are last, W before."""
    (a, b), case = order_sensitive()
    layout = replace(ADD, channels_last=True)
    shapes = [(2, 4, 5, 5), (2, 1, 5, 5)] if full_is_first else [(2, 1, 5, 5), (2, 4, 5, 5)]
    first, second = (np.full(shape, code, np.uint8) for shape, code in zip(shapes, (a, b), strict=True))
    assert differing(ADD, [first, second], [case], of(add, first, second)) == 0
    assert (differing(layout, [first, second], [case], of(add, first, second), [Level.ALL]) == 0) == full_is_first


def test_operands_may_be_of_a_grid_of_their_own_scale() -> None:
    pairs = every_pair()
    one = grid(0.05, 128)
    assert differing(ADD, pairs, [Case((one, one), one)], of(add, *pairs)) == 0
    assert differing(MULTIPLY, pairs, [Case((one, one), one)], of(multiply, *pairs)) == 0
