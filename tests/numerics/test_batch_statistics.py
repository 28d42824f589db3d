"""Batch norm of z / r from the statistics of z, against torch's own of a z that was divided."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fxquant.numerics.batch_statistics import batch_statistics, normalise
from fxquant.numerics.live_batch_norm import LiveBatchNorm

SHAPES = [(6, 5), (4, 5, 7), (3, 5, 4, 6), (2, 5, 3, 2, 2)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Seeded normal noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(dtype: torch.dtype, **options: Any) -> tuple[nn.BatchNorm1d, LiveBatchNorm]:
    """torch's batch norm of 5 channels, for any rank, and a live one with equal tensors of its own."""
    norm = nn.BatchNorm1d(5, **options).to(dtype)
    norm._check_input_dim = lambda input: None  # type: ignore[assignment]
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(randn(5, seed=8))
            norm.bias.copy_(randn(5, seed=9))
    return norm, LiveBatchNorm.of(copy.deepcopy(norm))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether they differ by less than `tolerance` of the largest, or of 1."""
    found, expected = found.detach(), expected.detach()
    return bool((found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**16),
    st.sampled_from(SHAPES),
    st.sampled_from([(torch.float64, 1e-10), (torch.float32, 3e-4)]),
    st.sampled_from([0.0, 1.5, 100.0]),
    st.integers(-8, 8),
    st.sampled_from([0.1, 1.0, None]),
    st.booleans(),
)
def test_live_is_batch_norm_of_the_quotient_with_its_gradients_and_statistics(
    seed: int,
    shape: tuple[int, ...],
    kind: tuple[torch.dtype, float],
    offset: float,
    exponent: int,
    momentum: float | None,
    affine: bool,
) -> None:
    dtype, tolerance = kind
    norm, live = pair(dtype, momentum=momentum, affine=affine, eps=1e-3)
    ratio = (randn(5, seed=seed).sign() * (randn(5, seed=seed + 1).abs() + 0.1) * 2.0**exponent).to(dtype)
    wide = ratio.view(-1, *[1] * (len(shape) - 2))
    for step in range(2):
        z = ((randn(*shape, seed=seed + step) + offset).to(dtype) * wide).requires_grad_()
        twin = z.detach().clone().requires_grad_()
        found, expected = live(z, ratio), norm(twin / wide)
        assert close(found, expected, tolerance)
        grad = randn(*shape, seed=seed + 7).to(dtype)
        for out in (found, expected):
            out.backward(grad)
        assert z.grad is not None and twin.grad is not None
        assert close(z.grad * wide, twin.grad * wide, tolerance)
    for name, tensor in norm.state_dict().items():
        assert close(live.state_dict()[name], tensor, tolerance), name
    for name, parameter in norm.named_parameters():
        assert parameter.grad is not None
        mine = dict(live.named_parameters())[name].grad
        assert mine is not None and close(mine, parameter.grad, 10 * tolerance)


@pytest.mark.parametrize(
    "asked", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_gradients_are_those_of_finite_differences_and_only_those_asked_for(asked: tuple[bool, bool, bool]) -> None:
    values = (randn(3, 2, 4), randn(2, seed=1), randn(2, seed=2))
    inputs = tuple(value.requires_grad_(wanted) for value, wanted in zip(values, asked, strict=True))
    ratio = torch.tensor([0.3, -2.0], dtype=torch.float64)

    def normalised(z: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        return normalise(z, batch_statistics(z), ratio, gamma, beta, 0.1)

    assert torch.autograd.gradcheck(normalised, inputs)


@pytest.mark.parametrize("layout", ["channels last", "sliced", "expanded"])
def test_layouts_in_memory_do_not_count(layout: str) -> None:
    _, live = pair(torch.float64)
    plain = randn(4, 5, 6, 6)
    if layout == "expanded":
        plain = randn(4, 5, 1, 6).expand(4, 5, 6, 6)
    z = {
        "channels last": plain.contiguous(memory_format=torch.channels_last),
        "sliced": torch.cat([plain, plain], dim=1)[:, :5],
        "expanded": plain,
    }[layout]
    ratio = randn(5, seed=3)
    assert close(live(z, ratio), copy.deepcopy(live)(plain.contiguous(), ratio), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_statistics_in_float32_and_its_own_dtype_back(dtype: torch.dtype) -> None:
    _, live = pair(torch.float32)
    z, ratio = (randn(4, 5, 8, 8) + 3.0).to(dtype).requires_grad_(), randn(5, seed=3).float()
    statistics = batch_statistics(z)
    assert statistics.mean.dtype == statistics.var.dtype == torch.float32
    assert close(statistics.var, z.double().var((0, 2, 3), correction=0), 1e-5)
    out = live(z, ratio)
    expected = copy.deepcopy(live)(z.detach().float(), ratio)
    assert out.dtype == dtype and close(out.float(), expected, 2.0**-7)
    out.sum().backward()
    assert z.grad is not None and z.grad.dtype == dtype and live.weight.grad is not None
    assert live.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("offset", [0.0, 1.9, 2.1, 1e4])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e25])
def test_statistics_keep_their_accuracy_far_from_zero_and_at_any_size(offset: float, scale: float) -> None:
    z = ((randn(8, 3, 40, 40) + offset) * scale).float()
    found = batch_statistics(z)
    mean, var = z.double().mean((0, 2, 3)), z.double().var((0, 2, 3), correction=0)
    assert found.count == 8 * 1600
    assert bool(((found.mean - mean).abs() <= 1e-6 * (mean.abs() + var.sqrt())).all())
    representable = torch.finfo(torch.float32).max > float(var.max()) and float(var.min()) > 1e-37
    assert not representable or bool(((found.var - var).abs() <= 4e-6 * var).all())


class Calls(TorchDispatchMode):
    """The names of the operators that are called, with the shape of their first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], torch.Tensor):
            self.seen.append((func.overloadpacket.__name__, args[0].shape))
        return func(*args, **(kwargs or {}))


def test_channels_far_from_zero_alone_are_computed_again() -> None:
    z = randn(4, 5, 12, 12)
    z[:, 1] += 50.0
    z[:, 4] = torch.nan
    with Calls() as calls:
        found = batch_statistics(z.float())
    mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
    assert [shape for name, shape in calls.seen if name == "batch_norm_update_stats"] == [(4, 2, 12, 12)]
    torch.testing.assert_close(found.mean.double(), mean, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(found.var.double(), var, rtol=4e-6, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(("size", "name"), [(1, "batch_norm_update_stats"), (12, "linalg_vector_norm")])
def test_small_planes_take_no_sum_each(size: int, name: str) -> None:
    with Calls() as calls:
        batch_statistics(randn(4, 5, size, size).float())
    names = {"batch_norm_update_stats", "linalg_vector_norm"}
    assert [called for called, _ in calls.seen if called in names] == [name]


def test_one_value_a_channel_is_refused_and_none_passes() -> None:
    norm, live = pair(torch.float64)
    for one in (lambda x: norm(x), lambda x: live(x, torch.ones(5, dtype=torch.float64))):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            one(randn(1, 5, 1))
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    assert live(randn(0, 5, 3), torch.ones(5, dtype=torch.float64)).shape == (0, 5, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in live.state_dict().items())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_moves_the_statistics_once(use_reentrant: bool) -> None:
    norm, live = pair(torch.float64)
    ratio, z = torch.ones(5, dtype=torch.float64), randn(4, 5, 6).requires_grad_()
    checkpoint(live, z, ratio, use_reentrant=use_reentrant).square().sum().backward()
    norm(z.detach())
    for name, tensor in norm.state_dict().items():
        assert close(live.state_dict()[name], tensor, 1e-12), name


def test_nothing_but_the_input_is_kept_of_its_size() -> None:
    _, live = pair(torch.float32)
    z = randn(4, 5, 16, 16, dtype=torch.float32).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        live(z, torch.ones(5))
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() > 5] == [z.data_ptr()]


def test_a_second_derivative_is_refused() -> None:
    _, live = pair(torch.float64)
    z = randn(4, 5, 3).requires_grad_()
    (grad,) = torch.autograd.grad(live(z, torch.ones(5, dtype=torch.float64)).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("offset", [0.5, 5.0, 20.0, 100.0, 400.0])
def test_statistics_are_as_accurate_as_torch_s_whatever_mean_squared_over_variance_is(offset: float) -> None:
    x = randn(8, 4, 32, 32, dtype=torch.float32) + offset**0.5
    found, wide = batch_statistics(x), x.double()
    torch.testing.assert_close(found.mean.double(), wide.mean((0, 2, 3)), rtol=2e-7, atol=1e-7)
    torch.testing.assert_close(found.var.double(), wide.var((0, 2, 3), correction=0), rtol=5e-7, atol=0.0)
