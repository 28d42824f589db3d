"""The fast paths of fake quantization against its plain definition: values and gradients, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.numerics.rounding import fake_quantize
from fxquant.numerics.straight_through import absorbs, clip_activation, grid_bounds, open_interval

RELU, RELU6 = (0.0, math.inf), (0.0, 6.0)
SCALES = st.floats(2.0**-40, 2.0**40, width=32)


def plain(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, qmin: int, qmax: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_hat, and where it is inside the grid, as the definition says."""
    grid = torch.round(x.detach() / scale)
    clamped = torch.clamp(grid, qmin - zero.float(), qmax - zero.float())
    return clamped * scale, grid == clamped


def gradients(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Of a sum with weights that differ."""
    weights = torch.linspace(-1.0, 2.0, max(x.numel(), 1))[: x.numel()].view_as(x)
    return torch.autograd.grad(out, x, weights)[0]


def numbers(seed: int, scale: float, spread: float) -> torch.Tensor:
    """Noise, ties and their neighbours, both ends of any 8-bit grid among them."""
    noise = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * (spread * scale)
    ties = (torch.arange(-260.0, 260.0) + 0.5) * scale
    far = torch.tensor([0.0, -0.0, math.inf, -math.inf, 3e38, -3e38])
    near = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (-math.inf, math.inf)]
    return torch.cat([noise, ties, *near, far])


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**16), SCALES, st.integers(-128, 127))
def test_values_and_gradients_are_those_of_the_definition_at_all_ties(seed: int, scale: float, zero: int) -> None:
    x = numbers(seed, scale, 100.0).requires_grad_()
    step, zero_point = torch.tensor(scale), torch.tensor(zero)
    out = fake_quantize(x, step, zero_point, -128, 127)
    expected, inside = plain(x, step, zero_point, -128, 127)
    assert torch.equal(out, expected)
    assert torch.equal(gradients(out, x), gradients(x * 1.0, x) * inside)
    assert torch.equal(fake_quantize(x.detach(), step, zero_point, -128, 127), expected)


@settings(max_examples=60, deadline=None)
@given(SCALES, st.integers(-128, 0), st.integers(0, 255))
def test_interval_ends_next_to_what_rounds_into_the_grid(scale: float, low: int, high: int) -> None:
    first, last = open_interval(scale, float(low), float(high))
    step, up = np.float32(scale), np.float32(math.inf)
    assert np.rint(np.float32(last) / step) > high >= np.rint(np.nextafter(np.float32(last), -up) / step)
    assert np.rint(np.float32(first) / step) < low <= np.rint(np.nextafter(np.float32(first), up) / step)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**16), st.floats(2.0**-10, 1.0, width=32), st.sampled_from([RELU, RELU6]), st.integers(0, 1))
def test_absorbed_clip_has_the_values_and_gradients_of_the_clip_in_front(
    seed: int, scale: float, clip: tuple[float, float], above: int
) -> None:
    step, zero_point = torch.tensor(scale), torch.tensor(-128 + above)
    if not absorbs(clip, step, zero_point, -128, 127):
        assert above or 6.0 / scale < 255.5
        return
    assert not above
    x = torch.cat([numbers(seed, scale, 100.0), torch.tensor([6.0, 5.9999995, 6.0000005, 1e-30])]).requires_grad_()
    found = fake_quantize(x, step, zero_point, -128, 127, clip)
    expected = fake_quantize(clip_activation(x, clip), step, zero_point, -128, 127)
    assert torch.equal(found, expected)
    assert torch.equal(gradients(found, x), gradients(expected, x))


@pytest.mark.parametrize("zeros", [[0, 0, 0], [3, -5, 0], [7, 7, 7]])
@pytest.mark.parametrize("spread", [0.1, 3.0])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_channels_have_their_own_grids_whatever_their_bounds(
    zeros: list[int], spread: float, is_transposed: bool
) -> None:
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1)) * spread
    x = (x.transpose(1, 2) if is_transposed else x).requires_grad_()
    scale, zero = torch.tensor([0.02, 0.01, 0.5]).view(3, 1, 1), torch.tensor(zeros).view(3, 1, 1)
    out = fake_quantize(x, scale, zero, -128, 127)
    expected, inside = plain(x, scale, zero, -128, 127)
    assert torch.equal(out, expected)
    weights = torch.arange(60.0).view(x.shape)
    assert torch.equal(torch.autograd.grad(out, x, weights)[0], weights * inside)


@pytest.mark.parametrize("scale", [0.0, 1e-42, 2.0**-120, 1e38, math.inf])
def test_extreme_scales_take_the_definition_itself(scale: float) -> None:
    x = torch.tensor([-1.0, 0.0, 1e-40, 2.0, 1e38], requires_grad=True)
    step, zero = torch.tensor(scale), torch.tensor(0)
    out, (expected, _) = fake_quantize(x, step, zero, -128, 127), plain(x, step, zero, -128, 127)
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.nan_to_num(), expected.nan_to_num())
    out.nan_to_num().sum().backward()
    assert x.grad is not None


def test_gradient_stops_at_nan_and_passes_beside_it() -> None:
    x = torch.tensor([0.5, math.nan, 300.0], requires_grad=True)
    out = fake_quantize(x, torch.tensor(1.0), torch.tensor(0), -128, 127)
    assert torch.equal(gradients(out, x), torch.tensor([-1.0, 0.0, 0.0]))
    assert math.isnan(float(out.detach()[1]))


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (), (1,)])
def test_empty_and_single_values_keep_their_shape(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    out = fake_quantize(x, torch.tensor(0.1), torch.tensor(0), -128, 127)
    out.sum().backward()
    assert out.shape == shape and x.grad is not None and torch.equal(x.grad, torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_float32_and_given_back(dtype: torch.dtype) -> None:
    x = torch.linspace(-20.0, 20.0, 41, dtype=dtype, requires_grad=True)
    out = fake_quantize(x, torch.tensor(0.1), torch.tensor(0), -128, 127)
    expected, inside = plain(x.float(), torch.tensor(0.1), torch.tensor(0), -128, 127)
    assert out.dtype == dtype and torch.equal(out, expected.to(dtype))
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, inside.to(dtype))


def kept_bytes(x: torch.Tensor, scale: float, clip: tuple[float, float] | None = None) -> int:
    """Bytes that fake quantization of `x` keeps for backward."""
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        fake_quantize(x, torch.tensor(scale), torch.tensor(-128), -128, 127, clip)
    return sum(kept)


def test_backward_keeps_nothing_inside_the_grid_and_a_byte_an_element_else() -> None:
    x = torch.rand(1000, requires_grad=True)
    assert kept_bytes(x, 0.1) == 0
    assert kept_bytes(x, 0.001) == 1000
    assert kept_bytes(x, 0.1, RELU) == 1000


def test_bounds_are_numbers_on_the_cpu_unless_channels_differ_or_they_are_huge() -> None:
    x = torch.zeros(3)
    assert grid_bounds(x, torch.tensor(-128), -128, 127) == (0.0, 255.0)
    assert grid_bounds(x, torch.zeros(3, dtype=torch.int64), -127, 127) == (-127.0, 127.0)
    for zero, qmin in ((torch.tensor([0, 1, 0]), -128), (torch.tensor(0), -(2**31))):
        low, high = grid_bounds(x, zero, qmin, 127)
        assert isinstance(low, torch.Tensor) and isinstance(high, torch.Tensor)
        assert torch.equal(low, qmin - zero.float()) and torch.equal(high, 127 - zero.float())


def test_gradient_of_a_gradient_passes_the_same_way() -> None:
    x = torch.tensor([-300.0, 0.5, 2.0], requires_grad=True)
    out = fake_quantize(x, torch.tensor(1.0), torch.tensor(0), -128, 127)
    (first,) = torch.autograd.grad((out * x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.tolist() == [0.0, 2.0, 2.0]
