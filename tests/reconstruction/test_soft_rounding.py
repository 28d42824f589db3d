"""SoftRounding: begins at the weight, ends on the grid, and has autograd's gradients."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.reconstruction import SoftRounding
from fxquant.spec import PER_TENSOR, Granularity, QuantSpec

GRANULARITIES = (PER_TENSOR, Granularity(0), Granularity(1, block=2))
SPECS = tuple(
    QuantSpec(bits=bits, signed=signed, symmetric=symmetric, granularity=granularity)
    for bits in (2, 4, 8)
    for signed, symmetric in ((True, True), (False, False))
    for granularity in GRANULARITIES
)
specs = st.sampled_from(SPECS)


def made(spec: QuantSpec, seed: int, clip: float = 1.0) -> tuple[torch.Tensor, FakeQuant]:
    """A weight and its FakeQuant, whose range is `clip` of the weight's extremes."""
    weight = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    module = FakeQuant(spec, spec.granularity.encoding_shape(tuple(weight.shape)), follows=True)
    low, high = module.estimator.range_of(weight)
    module.set_range(low * clip, high * clip)
    module.mode = Mode.FROZEN
    return weight, module


@given(specs, st.integers(0, 100), st.sampled_from((1.0, 0.5)))
def test_soft_weight_begins_at_the_weight_within_the_grid(spec: QuantSpec, seed: int, clip: float) -> None:
    weight, module = made(spec, seed, clip)
    scale, zero_point = module.grid_for(weight.ndim)
    expected = torch.clamp(weight, (spec.qmin - zero_point) * scale, (spec.qmax - zero_point) * scale)
    difference = (SoftRounding(weight, module).weight().detach() - expected).abs() / scale
    assert float(difference.max()) < 1e-3


@given(specs, st.integers(0, 100), st.floats(-4, 4))
def test_hard_codes_are_the_floor_or_one_more_and_on_the_grid(spec: QuantSpec, seed: int, shift: float) -> None:
    weight, module = made(spec, seed)
    rounding = SoftRounding(weight, module)
    rounding.alpha += shift * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed + 1))
    codes = rounding.codes()
    _, zero_point = module.grid_for(weight.ndim)
    lowest = torch.clamp(rounding.floor + zero_point, spec.qmin, spec.qmax).to(torch.int32)
    assert set((codes - lowest).unique().tolist()) <= {0, 1}
    assert spec.qmin <= int(codes.min()) and int(codes.max()) <= spec.qmax
    assert torch.equal(module.codes(rounding.real(codes)), codes)


@given(specs, st.integers(0, 100))
def test_codes_at_the_beginning_are_those_of_rounding_to_nearest(spec: QuantSpec, seed: int) -> None:
    weight, module = made(spec, seed)
    rounding = SoftRounding(weight, module)
    assert torch.equal(rounding.codes_of(weight), module.codes(weight))
    assert torch.equal(rounding.codes(), module.codes(weight))


@given(specs, st.integers(0, 100), st.sampled_from((None, 2.0, 3.7, 20.0)), st.sampled_from((1.0, 0.4)))
def test_gradient_is_that_of_autograd(spec: QuantSpec, seed: int, beta: float | None, clip: float) -> None:
    weight, module = made(spec, seed, clip)
    rounding = SoftRounding(weight, module)
    generator = torch.Generator().manual_seed(seed + 1)
    rounding.alpha += 2 * torch.randn(weight.shape, generator=generator)
    upstream, strength = torch.randn(weight.shape, generator=generator), 0.3
    rounding.weight()
    rounding.backward(upstream, beta, strength)
    assert rounding.alpha.grad is not None
    expected = by_autograd(rounding, upstream, beta, strength)
    assert torch.allclose(rounding.alpha.grad.double(), expected, rtol=1e-4, atol=1e-6)


def by_autograd(rounding: SoftRounding, upstream: torch.Tensor, beta: float | None, strength: float) -> torch.Tensor:
    """d(<upstream, W~> + strength r) / d alpha, in float64, as the definitions say."""
    alpha = rounding.alpha.double().requires_grad_()
    h = torch.clamp(1.2 * torch.sigmoid(alpha) - 0.1, 0, 1)
    low, high = rounding.low.double(), rounding.high.double()
    soft = torch.clamp(rounding.floor.double() + h, low, high) * rounding.scale.double()
    loss = (soft * upstream.double()).sum()
    if beta is not None:
        loss = loss + strength * (1 - (2 * h - 1).abs() ** beta).sum()
    (found,) = torch.autograd.grad(loss, alpha)
    return found


def test_regulariser_is_zero_only_where_all_is_hard() -> None:
    weight, module = made(SPECS[0], 0)
    rounding = SoftRounding(weight, module)
    rounding.weight()
    assert rounding.regulariser(2.0) > 0 and not rounding.is_hard()
    rounding.alpha.copy_(torch.where(rounding.alpha >= 0, 5.0, -5.0))
    soft = rounding.weight().detach()
    assert rounding.regulariser(2.0) == 0 and rounding.is_hard()
    assert torch.equal(soft, rounding.real(rounding.codes()))


@pytest.mark.parametrize("shape", [(3, 4, 2, 2), (5,)])
def test_soft_weight_is_a_leaf_that_wants_a_gradient(shape: tuple[int, ...]) -> None:
    spec = QuantSpec(bits=4, signed=True, symmetric=True)
    module = FakeQuant(spec, (), follows=True)
    module.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    found = SoftRounding(torch.randn(shape), module).weight()
    assert found.is_leaf and found.requires_grad and found.shape == shape
