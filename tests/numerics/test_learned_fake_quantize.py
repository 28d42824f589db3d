"""Gradients of learned fake quantization: those of the plain definition, and of a smoothed one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.numerics.learned_rounding import grid_gradients, learned_fake_quantize
from fxquant.numerics.rounding import along_axis, fake_quantize
from fxquant.numerics.straight_through import open_interval
from fxquant.spec import PER_TENSOR, Granularity, QuantSpec


def plain(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    """The definition, rounding passed straight through; the zero point is rounded already."""

    def rint(value: torch.Tensor) -> torch.Tensor:
        return value + (torch.round(value) - value).detach()

    return (torch.clamp(rint(x / scale) + zero_point, qmin, qmax) - zero_point) * scale


@dataclass(frozen=True)
class Case:
    """A tensor, its gradient, and a grid of `spec` for it."""

    x: torch.Tensor
    grad: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    spec: QuantSpec

    def gradients(self, function: object, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        """By x, scale and zero point."""
        assert callable(function)
        leaves = [one.to(dtype).requires_grad_() for one in (self.x.clone(), self.scale, self.zero_point)]
        grid = [along_axis(leaf, self.spec.granularity, self.x.ndim) for leaf in leaves[1:]]
        value = function(leaves[0], *grid, self.spec.qmin, self.spec.qmax)
        return list(torch.autograd.grad(value, leaves, self.grad.to(dtype)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Signed, unsigned and strict grids of 2 to 16 bits, per tensor, channel and block; x is clipped on both sides.

    Scales are powers of two, so that float64 and float32 round alike; a few x lie on ties.
    """
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    axis = draw(st.none() | st.integers(0, len(shape) - 1)) if shape else None
    granularity = PER_TENSOR
    if axis is not None:
        block = draw(st.none() | st.integers(1, 3))
        if block is not None:
            shape[axis] *= block
        granularity = Granularity(axis, block)
    signed = draw(st.booleans())
    strict = signed and draw(st.booleans())
    bits = draw(st.integers(2, 16))
    spec = QuantSpec(bits, signed=signed, symmetric=strict, strict=strict, granularity=granularity)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    encodings = granularity.encoding_shape(tuple(shape))
    scale = 2.0 ** torch.randint(-6, 6, encodings, generator=generator).float()
    zero_point = torch.randint(spec.qmin, spec.qmax + 1, encodings, generator=generator).float()
    steps = torch.rand(shape, generator=generator) * 1.5 * spec.steps - 0.75 * spec.steps
    steps = torch.where(torch.rand(shape, generator=generator) < 0.2, steps.round() + 0.5, steps)
    x = steps * along_axis(scale, granularity, len(shape))
    return Case(x, torch.randn(shape, generator=generator), scale, zero_point, spec)


@given(cases())
def test_gradients_are_autograd_s_of_the_plain_definition(case: Case) -> None:
    expected = case.gradients(plain, torch.float64)
    found = case.gradients(learned_fake_quantize)
    assert torch.equal(found[0], expected[0].float())
    for one, other, bound in zip(found[1:], expected[1:], (case.spec.steps, 1.0), strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one.double(), other, rtol=1e-5, atol=1e-6 * bound * max(1, case.x.numel()) * 32)


@given(cases())
def test_values_are_those_of_fake_quantize(case: Case) -> None:
    scale, zero_point = (along_axis(one, case.spec.granularity, case.x.ndim) for one in (case.scale, case.zero_point))
    ends = case.spec.qmin, case.spec.qmax
    found = learned_fake_quantize(case.x, scale, zero_point, *ends)
    assert torch.equal(found, fake_quantize(case.x, scale, zero_point.to(torch.int64), *ends))


@given(cases())
def test_gradients_of_one_grid_are_those_of_many(case: Case) -> None:
    """The way with two scalar products, and the one with masks, which autograd takes where it records the backward."""
    if case.scale.numel() != 1:
        return
    scale, zero_point = case.scale.reshape(()), case.zero_point.reshape(())
    ends = case.spec.qmin, case.spec.qmax
    with torch.no_grad():
        one = grid_gradients(case.grad, case.x, scale, scale, zero_point, ends)
    with torch.enable_grad():
        many = grid_gradients(case.grad, case.x, scale, scale, zero_point, ends)
    assert torch.equal(one[0], many[0])
    slack = 1e-6 * case.spec.steps * max(1, case.x.numel())
    assert all(
        torch.allclose(a, b, rtol=1e-5, atol=slack * float(scale)) for a, b in zip(one[2:], many[2:], strict=True)
    )
    assert torch.allclose(one[1], many[1], rtol=1e-5, atol=slack)


@pytest.mark.parametrize("shape", [(3, 5, 7, 2), (2, 4, 130, 130)])
def test_layouts_make_no_difference(shape: tuple[int, ...]) -> None:
    """Contiguous, channels last, transposed, and gradients that are expanded or laid out otherwise."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    scale, zero_point = torch.tensor(0.02), torch.tensor(100.0)

    def gradients(x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return grid_gradients(grad, x, scale, scale, zero_point, (0, 255))

    expected, last = gradients(x, grad), torch.channels_last
    backwards = (grad.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), x.permute(3, 2, 1, 0).contiguous())
    for other in (
        (x.to(memory_format=last), grad.to(memory_format=last)),
        (x, grad.to(memory_format=last)),
        (x.to(memory_format=last), grad),
        (backwards[1].permute(3, 2, 1, 0), backwards[0]),
    ):
        found = gradients(*other)
        assert torch.equal(found[0], expected[0])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(found[1:], expected[1:], strict=True))
    ones = torch.ones(()).expand(shape)
    assert torch.equal(gradients(x, ones)[0], gradients(x, ones.contiguous())[0])


def test_one_grid_s_sums_are_exact_to_float32_over_a_million_elements() -> None:
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    case = Case(
        x,
        torch.randn(x.shape, generator=torch.Generator().manual_seed(1)),
        torch.tensor(0.0157),
        torch.tensor(99.0),
        QuantSpec(),
    )
    units = x / case.scale  # as float32 has it: the sum is what is compared
    with torch.no_grad():
        found = grid_gradients(case.grad, x, case.scale, case.scale, case.zero_point, (0, 255))
    clamped = units.round().clamp(-99.0, 156.0).double()
    inside = units.round() == clamped
    by_scale = (case.grad.double() * (clamped - units.double() * inside)).sum()
    by_zero_point = -(case.grad.double() * ~inside).sum() * case.scale.double()
    assert abs(float(found[1] - by_scale)) < 1e-4 * 156 * 10
    assert abs(float(found[2] - by_zero_point)) < 1e-3


@pytest.mark.parametrize("low", [-128.0, -127.0, 0.0])
@pytest.mark.parametrize("high", [0.0, 1.0, 127.0, 255.0])
def test_open_interval_of_whole_steps_is_what_rounds_inside(low: float, high: float) -> None:
    below, above = open_interval(1.0, low, high)
    ends = torch.tensor([below, above])
    within = torch.nextafter(ends, torch.tensor([1e9, -1e9]))
    assert bool((ends.round() < low)[0]) and bool((ends.round() > high)[1])
    assert float(within[0].round()) == low and float(within[1].round()) == high


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_point", [0.0, 1.0, 3.0])
def test_gradients_are_finite_differences_of_the_dithered_definition(bits: int, zero_point: float) -> None:
    """Where the two are provably the same.

    With a dither v, uniform over a step, E rint(u + v) = u: the expectation of x_hat is x for u in [n + 3/2, p - 3/2]
    (no dithered code is clipped, nor would be if an end moved by less than a step), and s n or s p for u beyond
    [n - 1, p + 1]. Its derivative by x is 1 inside and 0 outside, by s is 0 inside and n or p outside, and by z (which
    moves n and p) is 0 inside and -s outside. Fake quantization's gradient, averaged over the same dither, is the
    same: E (rint(u + v) - (u + v)) = 0. Nearer to an end the expectation has a kink, or the dither straddles the end:
    there the straight-through estimator is one of several conventions, and nothing to compare with a difference.
    """
    spec = QuantSpec(bits)
    count = 2000
    scale = torch.tensor(0.25, dtype=torch.float64)
    low, high = spec.qmin - zero_point, spec.qmax - zero_point
    dither = (torch.arange(count, dtype=torch.float64) + 0.5) / count - 0.5

    def mean(u: float, ds: float, dx: float, dz: float) -> float:
        x = u * 0.25 + dx
        codes = torch.round(x / (0.25 + ds) + dither).clamp(low - dz, high - dz)
        return float((codes * (0.25 + ds)).mean())

    for u in (low - 3.0, low - 1.1, low + 1.5, (low + high) / 2 + 0.1, high - 1.5, high + 1.1, high + 40.0):
        x = ((u + dither) * 0.25).float()
        share = torch.full_like(x, 1.0 / count)
        with torch.no_grad():
            found = grid_gradients(
                share, x, scale.float(), scale.float(), torch.tensor(zero_point), (spec.qmin, spec.qmax)
            )
        step = 0.02  # some hundred dithered codes change
        expected = (
            (mean(u, 0, step, 0) - mean(u, 0, -step, 0)) / (2 * step),
            (mean(u, step / 50, 0, 0) - mean(u, -step / 50, 0, 0)) * 25 / step,
            (mean(u, 0, 0, 1e-3) - mean(u, 0, 0, -1e-3)) / 2e-3,
        )
        tolerance = 2.0 / (count * 0.25 * 0.02), 0.25 * 25 / (count * 0.02) * 4, 1e-6
        for one, other, most in zip((found[0].sum(), *found[1:]), expected, tolerance, strict=True):
            assert abs(float(one) - other) <= most + 1e-4, u


def test_infinite_values_have_their_bound_s_gradient_and_nan_shows() -> None:
    x = torch.tensor([torch.inf, -torch.inf, 1.0], requires_grad=True)
    scale, zero_point = torch.tensor(0.5, requires_grad=True), torch.tensor(10.0, requires_grad=True)
    learned_fake_quantize(x, scale, zero_point, 0, 255).sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 1.0]
    assert float(scale.grad) == 245.0 - 10.0 and float(zero_point.grad) == -1.0
    scale.grad = None
    learned_fake_quantize(torch.tensor([torch.nan, 1.0]), scale, zero_point, 0, 255).sum().backward()
    assert bool(torch.isnan(scale.grad))


@pytest.mark.parametrize("shape", [(), (0, 3), (4, 3)])
def test_tensors_without_axes_or_elements_have_gradients(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, requires_grad=True)
    scale, zero_point = torch.tensor(0.3, requires_grad=True), torch.tensor(4.0, requires_grad=True)
    learned_fake_quantize(x, scale, zero_point, 0, 255).sum().backward()
    assert x.grad.shape == shape and scale.grad.shape == zero_point.grad.shape == ()
    assert float(scale.grad) == pytest.approx(x.numel() * (3.0 - 1.0 / 0.3), abs=1e-5)


def test_only_what_wants_a_gradient_gets_one() -> None:
    x, scale, zero_point = torch.ones(3), torch.tensor(0.3, requires_grad=True), torch.tensor(4.0)
    learned_fake_quantize(x, scale, zero_point, 0, 255).sum().backward()
    assert x.grad is None and zero_point.grad is None and scale.grad is not None


def test_second_derivatives_are_those_of_the_plain_definition() -> None:
    x = torch.linspace(-3.0, 3.0, 21, dtype=torch.float64)

    def second(function: object, dtype: torch.dtype) -> list[torch.Tensor]:
        assert callable(function)
        leaves = [one.to(dtype).requires_grad_() for one in (x.clone(), torch.tensor(0.25), torch.tensor(7.0))]
        value = function(*leaves, 0, 15).square().sum()
        first = torch.autograd.grad(value, leaves, create_graph=True)
        return list(torch.autograd.grad(sum((one.square().sum() for one in first), torch.zeros(())), leaves))

    expected, found = second(plain, torch.float64), second(learned_fake_quantize, torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.linspace(-3.0, 3.0, 21).to(dtype).requires_grad_()
    scale, zero_point = torch.tensor(0.25, requires_grad=True), torch.tensor(7.0, requires_grad=True)
    out = learned_fake_quantize(x, scale, zero_point, 0, 15)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == dtype and scale.grad.dtype == torch.float32
    expected = learned_fake_quantize(x.float(), scale, zero_point, 0, 15)
    assert torch.equal(out, expected.to(dtype))
