"""QuantSpec, Limits, Encoding and the grids made from ranges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.errors import SpecError
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.numerics.grids import SMALLEST_SCALE, clip_codes, grid_for_range
from fxquant.numerics.rounding import dequantize, fake_quantize, quantize
from fxquant.spec import Encoding, Granularity, Limits, QuantSpec, SpecOverride

U8 = QuantSpec()
S8 = QuantSpec(signed=True, symmetric=True, strict=True)
finite = st.floats(-1e6, 1e6, allow_nan=False, width=32)


def grid(low: float, high: float, spec: QuantSpec) -> tuple[float, int]:
    scale, zero_point = grid_for_range(torch.tensor(low), torch.tensor(high), spec)
    return float(scale), int(zero_point)


@pytest.mark.parametrize(
    ("spec", "qmin", "qmax"),
    [
        (U8, 0, 255),
        (S8, -127, 127),
        (QuantSpec(signed=True), -128, 127),
        (QuantSpec(bits=4, signed=True, symmetric=True), -8, 7),
        (QuantSpec(bits=16), 0, 65535),
    ],
)
def test_code_range_follows_bits_sign_and_strictness(spec: QuantSpec, qmin: int, qmax: int) -> None:
    assert (spec.qmin, spec.qmax) == (qmin, qmax)


@pytest.mark.parametrize("bits", [0, 1, 17, 31])
def test_spec_refuses_bits_out_of_range(bits: int) -> None:
    with pytest.raises(SpecError, match="2 to 16"):
        QuantSpec(bits=bits)


def test_limits_meet_and_refuse_other_zero_points() -> None:
    assert Limits(0, 6, 0).meet(Limits(-1, 5)) == Limits(0, 5, 0)
    with pytest.raises(SpecError, match="zero point"):
        Limits(zero_point=0).meet(Limits(zero_point=1))


@pytest.mark.parametrize(
    ("fixed", "said"),
    [
        ((0.0, math.inf), "finite number"),
        ((math.nan, 1.0), "finite number"),
        ((0.0, 1e39), "at most 1e"),
        ((1.0, 2.0), "holds 0"),
        ((-2.0, -1.0), "holds 0"),
        ((1.0, -1.0), "low < high"),
    ],
)
def test_fixed_range_that_no_grid_has_is_refused(fixed: tuple[float, float], said: str) -> None:
    for make in (QuantSpec, SpecOverride):
        with pytest.raises(SpecError, match=said):
            make(fixed=fixed)


@given(
    low=st.floats(-1e38, 0.0),
    high=st.floats(0.0, 1e38).filter(bool),
    spec=st.sampled_from([U8, S8, QuantSpec(bits=2), QuantSpec(bits=2, symmetric=True)]),
)
def test_fixed_range_that_is_taken_has_a_grid_in_float32(low: float, high: float, spec: QuantSpec) -> None:
    module = FakeQuant(SpecOverride(fixed=(low, high)).apply(spec))
    module.compute_encoding()
    encoding = module.encoding
    ends = torch.tensor([spec.lowest_code, spec.qmax], dtype=torch.int32)
    assert torch.isfinite(dequantize(ends, encoding.scale, encoding.zero_point)).all()


def test_fixed_range_obeys_limits_and_says_so() -> None:
    wanted = SpecOverride(fixed=(-3.0, 4.0))
    limits = Limits(0.0, 1.0)
    for spec in (wanted.apply(U8).limited(limits), wanted.apply(U8.limited(limits))):
        assert spec.fixed == (0.0, 1.0) and str(spec).endswith("fixed [0, 1]")
    with pytest.raises(SpecError, match=r"within \[0, 1\]; got \[-3, 0\]"):
        QuantSpec(fixed=(-3.0, 0.0)).limited(limits)


@given(low=finite, high=finite, spec=st.sampled_from([U8, S8, QuantSpec(bits=4), QuantSpec(bits=16, signed=True)]))
def test_grid_covers_the_range_and_holds_zero(low: float, high: float, spec: QuantSpec) -> None:
    low, high = min(low, high), max(low, high)
    scale, zero_point = grid(low, high, spec)
    assert scale > 0 and spec.qmin <= zero_point <= spec.qmax
    slack = 0.51 * scale + 1e-6 * max(abs(low), abs(high))
    assert (spec.qmin - zero_point) * scale <= min(low, 0) + slack
    assert (spec.qmax - zero_point) * scale >= max(high, 0) - slack


@given(high=st.floats(0.015625, 128, width=32))
def test_grid_obeys_a_cap(high: float) -> None:
    scale, zero_point = grid(0.0, high, U8.limited(Limits(0.0, 6.0, 0)))
    assert zero_point == 0
    assert round(6.0 / scale) >= 255  # what onnxruntime asks before it removes a Clip(0, 6)


def test_grid_of_a_constant_zero_is_exact_and_a_tiny_range_keeps_a_normal_scale() -> None:
    assert grid(0.0, 0.0, U8) == (1.0, 0)
    assert grid(0.0, 0.0, S8) == (SMALLEST_SCALE, 0)
    assert grid(0.0, 1e-40, U8)[0] == SMALLEST_SCALE


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_grid_refuses_a_range_that_is_not_finite(bad: float) -> None:
    with pytest.raises(SpecError, match="finite"):
        grid(0.0, bad, U8)


@given(st.lists(finite, min_size=1, max_size=64), st.floats(2**-10, 8, width=32), st.integers(0, 255))
def test_fake_quantize_equals_dequantized_codes(values: list[float], scale: float, zero_point: int) -> None:
    x, s, z = torch.tensor(values), torch.tensor(scale), torch.tensor(zero_point)
    codes = quantize(x, s, z, 0, 255)
    assert int(codes.min()) >= 0 and int(codes.max()) <= 255
    assert torch.equal(fake_quantize(x, s, z, 0, 255), dequantize(codes, s, z))


def test_rounding_divides_and_rounds_half_to_even() -> None:
    codes = quantize(torch.tensor([0.5, 1.5, 2.5, -0.5]), torch.tensor(1.0), torch.tensor(10), 0, 255)
    assert codes.tolist() == [10, 12, 12, 10]
    scale = torch.tensor(0.3)
    ties = (torch.arange(200) + 0.5) * scale
    by_division = torch.round(ties / scale)
    assert torch.equal(quantize(ties, scale, torch.tensor(0), 0, 255).float(), by_division)
    assert torch.equal(fake_quantize(ties, scale, torch.tensor(0), 0, 255), by_division * scale)
    assert not torch.equal(torch.round(ties * (1 / scale)), by_division)  # the fault that torch's own fake quantize has


def test_fake_quantize_passes_gradients_inside_the_grid_only() -> None:
    x = torch.tensor([-1.0, 0.3, 2.0, 300.0], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), torch.tensor(0), 0, 255).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_encoding_views_are_in_the_documented_terms() -> None:
    encoding = Encoding(torch.tensor(0.5), torch.tensor(10), U8)
    assert (float(encoding.min), float(encoding.max), int(encoding.offset)) == (-5.0, 122.5, -10)


def test_encoding_refuses_a_zero_point_off_the_grid() -> None:
    with pytest.raises(SpecError, match="zero points"):
        Encoding(torch.tensor(0.5), torch.tensor(256), U8)


def test_fake_quant_observes_then_quantizes_then_stands_still() -> None:
    module = FakeQuant(QuantSpec(granularity=Granularity(0), signed=True, symmetric=True), (2,), follows=True)
    weight = torch.tensor([[1.0, -2.0], [0.1, 0.05]])
    module.follow(weight)
    module.mode = Mode.FAKE
    first = module.scale.clone()
    module(weight * 2)
    assert torch.allclose(module.scale, first * 2)
    module.mode = Mode.FROZEN
    module(weight)
    assert torch.allclose(module.scale, first * 2)


@given(
    high=st.floats(2.0**-13, 2.0**13, width=32),
    ratio=st.one_of(st.sampled_from([1.0, 0.5, 1 / 3, 2.0, 3.0]), st.floats(1e-3, 1e3)),
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16]),
    part=st.one_of(st.just(1.0), st.floats(2.0**-10, 1.0)),  # a tensor of zeros has scale 1, whatever its limits
    is_from_zero=st.booleans(),
)
def test_clip_is_redundant_behind_any_range_that_it_limits(
    high: float, ratio: float, bits: int, part: float, is_from_zero: bool
) -> None:
    low = 0.0 if is_from_zero else -high * ratio
    spec = QuantSpec(bits=bits, limits=Limits(low, high, 0 if is_from_zero else None))
    for seen in ((low, high), (low * part, high), (low, high * part), (2 * low, 3 * high)):
        scale, zero_point = grid_for_range(torch.tensor(seen[0]), torch.tensor(seen[1]), spec)
        codes = clip_codes(low, high, scale, zero_point)
        assert codes[0] <= 0 and codes[1] >= spec.qmax, (seen, scale, zero_point)


def test_clip_would_be_kept_if_its_range_were_rounded_up() -> None:
    """255 steps from -8.5 to 8.5: the nearest float32 scale has 127.49999 of them to either side."""
    bound = 8.499281883239746
    assert [float(code) for code in clip_codes(-bound, bound, torch.tensor(2 * bound / 255), torch.tensor(127))] == [
        0,
        254,
    ]
    scale, zero_point = grid(-bound, bound, U8.limited(Limits(-bound, bound)))
    assert scale < torch.tensor(2 * bound / 255) and zero_point == 128
