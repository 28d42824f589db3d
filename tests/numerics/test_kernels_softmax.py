"""QLinearSoftmax: axes, sizes and grids."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.numerics.kernels import softmax as kernel
from fxquant.numerics.kernels.softmax import softmax
from fxquant.numerics.kernels.tables import on_grid
from fxquant.numerics.rounding import dequantize
from tests.numerics.quantized_models import (
    Array,
    Case,
    Operator,
    bytes_of,
    decades,
    differing,
    grid,
    random_cases,
    random_grids,
    seeds,
    tensor,
)

UNIT = grid(1 / 255, 0)


def operator(axis: int) -> Operator:
    return Operator("Softmax", "QLinearSoftmax", {"axis": axis})


def of(x: Array, axis: int) -> Callable[[Case], torch.Tensor]:
    return lambda case: softmax(tensor(x), case.operands[0], case.out, axis)


def softmax_in_float(x: Array, axis: int) -> Callable[[Case], torch.Tensor]:
    def codes(case: Case) -> torch.Tensor:
        real = dequantize(tensor(x), case.operands[0].scale, case.operands[0].zero_point)
        return on_grid(real.softmax(axis), case.out)

    return codes


def unit_cases(count: int, seed: int) -> list[Case]:
    outs = (UNIT, grid(1 / 256, 0), grid(1 / 255, 10), grid(1 / 128, 128), grid(1 / 200.5, 3), grid(0.9 / 255, 255))
    return [Case((one,), outs[i % len(outs)]) for i, one in enumerate(random_grids(count, seed))]


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((20, 10), -1),
        ((6, 197), -1),
        ((3, 7, 5), 1),
        ((4, 3, 5, 6), 0),
        ((4, 3, 5, 6), 1),
        ((5, 6), 0),
        ((9,), 0),
        ((2, 3, 4), -1),
        ((30, 2), 1),
        ((30, 1), 1),
        ((2, 1000), 1),
    ],
    ids=str,
)
def test_softmax_is_onnxruntimes(shape: tuple[int, ...], axis: int) -> None:
    x = bytes_of(1, *shape)
    x[0] //= 8
    assert differing(operator(axis), [x], unit_cases(30, seed=2), of(x, axis)) == 0


def test_softmax_in_float_is_found_to_differ_where_steps_are_not_whole() -> None:
    x = bytes_of(3, 300, 10)
    cases = [Case(case.operands, grid(1 / 200.5, 0)) for case in unit_cases(20, seed=4)]
    assert differing(operator(-1), [x], cases, of(x, -1)) == 0
    assert differing(operator(-1), [x], cases, softmax_in_float(x, -1)) > 0


@given(seed=seeds, decades=decades, rows=st.integers(1, 9), size=st.integers(1, 40))
def test_softmax_is_onnxruntimes_on_any_grids(seed: int, decades: float, rows: int, size: int) -> None:
    x = bytes_of(seed, rows, size)
    cases = random_cases(10, 1, seed, decades)
    assert differing(operator(-1), [x], cases, of(x, -1)) == 0


def test_softmax_is_onnxruntimes_on_narrow_grids() -> None:
    x = bytes_of(5, 50, 12)
    cases = [
        Case(case.operands, grid(1 / qmax, zero, qmax))
        for case in unit_cases(8, 6)
        for qmax, zero in ((1, 0), (3, 0), (7, 2), (15, 15), (63, 0))
    ]
    assert differing(operator(-1), [x], cases, of(x, -1)) == 0


def test_softmax_of_one_element_overflows_as_in_onnxruntime() -> None:
    """The one code is 0, not 255."""
    x = np.arange(256, dtype=np.uint8).reshape(256, 1)
    cases = [Case((grid(0.1, 0),), UNIT)]
    assert differing(operator(-1), [x], cases, lambda _: torch.zeros(256, 1, dtype=torch.int64)) == 0
    assert differing(operator(-1), [x], cases, of(x, -1)) == 0


def equal_shares(size: int) -> list[Case]:
    """Grids on which each of `size` equal codes has a share halfway between two codes: n / size = k + 1/2 steps."""
    steps = [int(size * (k + 0.5)) for k in range(140)]
    scales = [float(np.nextafter(np.float32(1 / n), np.float32(0))) for n in steps]
    return [Case((grid(0.05, 0),), grid(scale, 0)) for scale in scales]


@pytest.mark.parametrize("size", [2, 8])
def test_softmax_takes_the_logarithm_in_float32_as_ties_show(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, cases = np.zeros((1, size), np.uint8), equal_shares(size)
    assert differing(operator(-1), [x], cases, of(x, -1)) == 0

    def in_float64(scale: torch.Tensor, size: int) -> torch.Tensor:
        largest = float(torch.tensor(torch.finfo(torch.float32).max) / size)
        shift = (math.log(largest) - 5.0) / scale.double()
        indices = torch.arange(256, dtype=torch.float64)
        return torch.exp((indices - 255 + shift) * scale.double()).float()

    monkeypatch.setattr(kernel, "exponentials", in_float64)
    assert differing(operator(-1), [x], cases, of(x, -1)) > 20
