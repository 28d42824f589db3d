"""Encoding in AIMET's terms: min, max, delta and offset, and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.errors import SpecError
from fxquant.spec import Encoding, Limits, QuantSpec
from tests.encodings.test_round_trip import encodings

U8 = QuantSpec()
S8 = QuantSpec(signed=True, symmetric=True)
STRICT = QuantSpec(signed=True, symmetric=True, strict=True)


@given(encodings())
def test_views_are_as_the_documentation_defines_them(encoding: Encoding) -> None:
    steps = 2**encoding.spec.bits - 1
    delta = encoding.delta.double()
    assert torch.equal(delta * steps, encoding.max - encoding.min)
    assert torch.equal(encoding.offset * delta, encoding.min)
    assert bool((encoding.min <= 0).all()) and bool((encoding.max >= 0).all())
    assert bool((encoding.offset <= 0).all()) and bool((encoding.offset >= -steps).all())
    assert torch.equal(encoding.positive_offset, -encoding.offset)


@given(encodings())
def test_views_lead_back_to_the_encoding(encoding: Encoding) -> None:
    spec = encoding.spec
    assert Encoding.from_offset(encoding.delta, encoding.offset, spec).same_grid(encoding)
    assert Encoding.from_offset(encoding.delta, encoding.positive_offset, spec, is_positive=True).same_grid(encoding)
    assert Encoding.from_range(encoding.min, encoding.max, spec).same_grid(encoding)


@given(st.floats(-1e6, 0, width=32), st.floats(2.0**-10, 1e6, width=32), st.sampled_from([U8, S8, STRICT]))
def test_range_is_covered_but_for_half_a_step(low: float, high: float, spec: QuantSpec) -> None:
    encoding = Encoding.from_range(torch.tensor(low), torch.tensor(high), spec)
    slack = 0.5001 * float(encoding.delta)
    assert float(encoding.min) <= low + slack and float(encoding.max) >= high - slack


def test_conventions_of_aimet_for_signed_unsigned_and_strict_grids() -> None:
    one = torch.tensor(0.5)
    assert int(Encoding(one, torch.tensor(64), U8).offset) == -64
    for spec, zero in ((S8, 0), (STRICT, 0), (QuantSpec(symmetric=True), 128)):
        encoding = Encoding(one, torch.tensor(zero), spec)
        assert (int(encoding.offset), float(encoding.min), float(encoding.max)) == (-128, -64.0, 63.5)
        assert int(encoding.positive_offset) == 128


def test_range_with_a_prescribed_zero_point_keeps_it() -> None:
    relu6 = U8.limited(Limits(0.0, 6.0, zero_point=0))
    encoding = Encoding.from_range(torch.tensor(0.0), torch.tensor(6.0), relu6)
    assert (int(encoding.zero_point), float(encoding.max)) == (0, pytest.approx(6.0))
    assert float(Encoding.from_range(torch.tensor(-1.0), torch.tensor(0.5), S8).min) == -1.0


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (0.5, 1.0), (-1.0, -0.5), (math.nan, 1.0), (0.0, math.inf)])
def test_range_without_zero_or_extent_is_refused(low: float, high: float) -> None:
    with pytest.raises(SpecError, match="low <= 0 <= high"):
        Encoding.from_range(torch.tensor(low), torch.tensor(high), U8)


@pytest.mark.parametrize("offset", [-1.5, math.nan, 1.0, -256.0, -1e30])
def test_offset_that_is_no_integer_or_off_the_grid_is_refused(offset: float) -> None:
    with pytest.raises(SpecError, match="integers|zero points"):
        Encoding.from_offset(torch.tensor(1.0), torch.tensor(offset), U8)
