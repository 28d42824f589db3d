"""Fused multiply-add against rational numbers, rounded by hand; conversion to int32."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.numerics.kernels.float32 import fused_multiply_add, round_to_int32

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)


def rounded(exact: Fraction) -> float:
    """The nearest float32, half to even."""
    if exact == 0:
        return 0.0
    exponent = math.frexp(float(abs(exact)))[1] - 1
    exponent -= abs(exact) < Fraction(2) ** exponent  # the double may have been rounded up to a power of two
    quantum = Fraction(2) ** max(exponent - 23, -149)
    return float(round(exact / quantum) * quantum)


def exact(a: float, b: float, c: float) -> float:
    return rounded(Fraction(a) * Fraction(b) + Fraction(c))


def fused(a: float, b: float, c: float) -> float:
    return float(fused_multiply_add(*(torch.tensor(value, dtype=torch.float32) for value in (a, b, c))))


@given(numbers, numbers, numbers)
def test_fused_multiply_add_rounds_once(a: float, b: float, c: float) -> None:
    assert fused(a, b, c) == exact(a, b, c)


@given(st.integers(2**23, 2**24 - 1), st.integers(2**23, 2**24 - 1), st.integers(-4, 4), st.integers(0, 30))
def test_fused_multiply_add_rounds_once_when_the_sum_is_near_a_tie(a: int, b: int, step: int, shift: int) -> None:
    c = rounded(Fraction(a * b, 1 << shift) + step * 2**20)
    small = 2.0**-shift
    assert fused(a * small, b, c) == exact(a * small, b, c)


def test_fused_multiply_add_is_not_rounded_by_way_of_float64() -> None:
    a, b, c = 2.0**-12 * (1 + 2.0**-15), 2.0**-12 * (1 - 2.0**-15), 1 + 2.0**-23
    twice = float(torch.tensor(a * b + c, dtype=torch.float64).to(torch.float32))
    assert (fused(a, b, c), twice) == (1 + 2.0**-23, 1 + 2.0**-22)
    assert exact(a, b, c) == fused(a, b, c)


def test_fused_multiply_add_broadcasts() -> None:
    found = fused_multiply_add(torch.ones(3, 1), torch.tensor(2.0), torch.arange(4.0))
    assert torch.equal(found, (2.0 + torch.arange(4.0)).expand(3, 4))


def test_conversion_to_int32_of_what_does_not_fit_is_its_lowest_number() -> None:
    values = torch.tensor([2.0**31, -(2.0**31), 3e38, torch.inf, -torch.inf, torch.nan, 2.5, -3.5, 2.0**31 - 128])
    assert round_to_int32(values).tolist() == [-(2**31)] * 6 + [2, -4, 2**31 - 128]
