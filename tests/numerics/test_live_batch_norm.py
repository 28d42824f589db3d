"""The fold's operators against float64, its two forms, and the module that holds a live batch norm's tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxquant.numerics.live_batch_norm import (
    BATCH_NORM_RATIO,
    BATCH_NORM_SHIFT,
    SCALE_CHANNELS,
    SMALLEST_GAMMA,
    BatchNormRatio,
    BatchNormShift,
    LiveBatchNorm,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Seeded normal noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([1e-5, 1e-3]), st.integers(-20, 20), st.booleans())
def test_ratio_and_shift_are_float64_rounded_once(seed: int, eps: float, exponent: int, has_bias: bool) -> None:
    gamma, beta, mean, bias = randn(4, 7, seed=seed)
    var = randn(7, seed=seed + 1).square() * 2.0**exponent
    ratio = BATCH_NORM_RATIO(gamma, var, eps)
    assert torch.equal(ratio, (gamma.double() / torch.sqrt(var.double() + eps)).float())
    shift = BATCH_NORM_SHIFT(bias if has_bias else None, beta, mean, ratio)
    layer = bias.double() if has_bias else torch.zeros(7, dtype=torch.float64)
    assert torch.equal(shift, (beta.double() + (layer - mean.double()) * ratio.double()).float())


@pytest.mark.parametrize(("kind", "groups"), [(nn.Conv2d, 1), (nn.Conv2d, 2), (nn.ConvTranspose2d, 2)])
def test_scaled_weight_scales_the_output_channels(kind: Any, groups: int) -> None:
    layer, x, ratio = kind(4, 6, 3, groups=groups, bias=False), randn(2, 4, 7, 7), randn(6, seed=2)
    with torch.no_grad():
        expected = layer(x) * ratio.view(-1, 1, 1)
        axis = 0 if kind is nn.Conv2d else 1
        layer.weight.copy_(SCALE_CHANNELS(layer.weight, ratio, axis, groups))
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_ratio_keeps_away_from_zero_in_train_alone_and_takes_no_gradient_there() -> None:
    gamma = torch.tensor([0.0, -0.0, 1e-9, -1e-9, 0.5, -2.0], requires_grad=True)
    module, var = BatchNormRatio(0.0), torch.full((6,), 4.0)
    small = SMALLEST_GAMMA / 2
    found = module.train()(gamma, var)
    assert found.tolist() == [small, small, small, -small, 0.25, -1.0] and not found.requires_grad
    found = module.eval()(gamma, var)
    assert found.requires_grad and torch.equal(found.detach(), gamma.detach() / 2)
    assert torch.equal(module.train().at_rest(gamma, var), found)


def test_shift_is_the_folded_bias_in_eval_and_the_scaled_one_in_train() -> None:
    bias, beta, mean, ratio = randn(4, 5)
    module = BatchNormShift()
    assert torch.equal(module.train()(bias, beta, mean, ratio), bias * ratio)
    assert torch.equal(module.train()(None, beta, mean, ratio), torch.zeros(5))
    for training in (False, True):
        module.train(training)
        assert torch.equal(module.at_rest(bias, None, mean, ratio), BATCH_NORM_SHIFT(bias, None, mean, ratio))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("channels_last", [False, True])
def test_live_batch_norm_is_nothing_in_eval_and_undoes_the_ratio_in_train(
    momentum: float | None, channels_last: bool
) -> None:
    plain: nn.Module = nn.BatchNorm1d(6, momentum=momentum)
    live = LiveBatchNorm.of(nn.BatchNorm1d(6, momentum=momentum).train())
    x = randn(4, 3, 6) if channels_last else randn(4, 6, 5)
    ratio = randn(6, seed=3).abs() + 0.1
    scaled = x * (ratio if channels_last else ratio.view(-1, 1))
    expected = plain(x.flatten(0, 1)).view_as(x) if channels_last else plain(x)
    assert torch.allclose(live(scaled, ratio, channels_last), expected, atol=1e-5)
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(live.state_dict()[name], tensor, atol=1e-6), name
    assert live.eval()(x, ratio) is x


def test_twin_shares_tensors_and_mode_and_adds_none() -> None:
    norm = nn.BatchNorm2d(3, eps=1e-3, momentum=None, affine=False).eval()
    live = LiveBatchNorm.of(norm)
    assert not live.training and not live.ratio.training and live.ratio.eps == 1e-3
    assert live.state_dict().keys() == norm.state_dict().keys()
    assert all(live.state_dict(keep_vars=True)[name] is tensor for name, tensor in norm.named_buffers())
