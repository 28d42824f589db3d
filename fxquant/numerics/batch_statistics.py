"""Batch norm of z / r, by the statistics of z alone: no z / r is made, and none is kept for backward.

With mean and var of z, each channel's, and sign = sign(r):

    BN(z / r) = (z - mean) * invstd * (gamma * sign) + beta            invstd = 1 / sqrt(var + eps * r^2)
    batch statistics of z / r: mean / r, var / r^2

whose derivatives are batch norm's own (Ioffe and Szegedy, 2015, arXiv:1502.03167) with this invstd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from fxquant.numerics.peer_statistics import normalise_together, statistics_of_all
from fxquant.numerics.peers import Peers


@dataclass(frozen=True)
class BatchStatistics:
    """Mean and biased variance of each channel, float32 or float64, and how many elements each of them is of."""

    mean: torch.Tensor
    var: torch.Tensor
    count: int


# Above this mean^2 / var, sums of squares in float32 lose more than rounding the normalised values does.
_LARGEST_OFFSET = 4.0
_SMALLEST_PLANE = 16  # below, torch's own is as fast: there is a sum in float32 for each plane


@torch.no_grad()
def batch_statistics(input: torch.Tensor) -> BatchStatistics:
    """Statistics of `input` (N, C, ...), in float32 at least; everything behind them takes only these."""
    count = input.numel() // input.shape[1]
    if torch.compiler.is_compiling():
        axes = [axis for axis in range(input.ndim) if axis != 1]
        wide = input if input.dtype == torch.float64 else input.float()
        var, mean = torch.var_mean(wide, axes, correction=0)
        return BatchStatistics(mean, var, count)
    return BatchStatistics(*(_fast_statistics if _has_fast_statistics(input) else _statistics)(input), count)


def _statistics(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance, as torch's own batch norm computes them."""
    like = [input.new_empty(input.shape[1], dtype=dtype_of_statistics(input)).fill_(value) for value in (0.0, 1.0)]
    mean, var = torch.ops.aten.batch_norm_update_stats(input, *like, 0.0)
    return mean, var


def _has_fast_statistics(input: torch.Tensor) -> bool:
    is_plain = input.is_cpu and input.dtype == torch.float32 and input.is_contiguous()
    return is_plain and input.shape[2:].numel() >= _SMALLEST_PLANE


def _fast_statistics(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance by sums of planes; as torch does, of those channels where that is not accurate."""
    mean, var = _statistics_of_planes(input.flatten(2), input.numel() // input.shape[1])
    is_accurate = (mean.square() <= _LARGEST_OFFSET * var) & torch.isfinite(var)
    mean, var = mean.float(), var.float()
    if not bool(is_accurate.all()):
        channels = is_accurate.logical_not().nonzero().squeeze(1)
        mean[channels], var[channels] = _statistics(input.index_select(1, channels))
    return mean, var


def _statistics_of_planes(planes: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (float64) of (N, C, elements): one example's sums in float32, which vectorises, and all
    else in float64.
    """
    mean = planes.sum(2).double().sum(0) / count
    squares = torch.linalg.vector_norm(planes, dim=2).double().square().sum(0) / count
    return mean, squares - mean.square()


def dtype_of_statistics(input: torch.Tensor) -> torch.dtype:
    """What a batch norm of `input` computes in."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def statistics_of_peers(input: torch.Tensor, peers: Peers) -> BatchStatistics:
    """Statistics of what all peers give, one of them perhaps nothing."""
    if input.numel():
        mine = batch_statistics(input)
    else:
        nothing = input.new_zeros(input.shape[1], dtype=dtype_of_statistics(input))
        mine = BatchStatistics(nothing, nothing, 0)
    return BatchStatistics(*statistics_of_all(mine.mean, mine.var, mine.count, peers))


class _Normalise(torch.autograd.Function):
    """(input - mean) / sqrt(var) * weight + bias; in backward, mean and var less a constant are `input`'s own."""

    @staticmethod
    def forward(  # with a setup_context a call takes three times as long
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        var: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight, mean, var.rsqrt())
        return functional.batch_norm(input, mean, var, weight, bias, False, 0.0, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable  # mean and var are no inputs of the graph
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, mean, invstd = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.native_batch_norm_backward(
            grads[0], input, weight, None, None, mean, invstd, True, 0.0, mask
        )
        return *(grad if wanted else None for grad, wanted in zip(found, mask, strict=True)), None, None


_normalise: Callable[..., torch.Tensor] = _Normalise.apply  # torch leaves Function.apply untyped


def normalise(
    input: torch.Tensor,
    statistics: BatchStatistics,
    ratio: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
    peers: Peers | None = None,
) -> torch.Tensor:
    """BN(input / ratio) of `input` (N, C, ...) in its dtype; `ratio` takes no gradient. `statistics` are all peers'."""
    mean, var = statistics.mean, statistics.var
    ratio = ratio.detach()
    sign = ratio.sign().to(mean.dtype)
    weight = sign if gamma is None else gamma.to(mean.dtype) * sign
    bias = None if beta is None else beta.to(mean.dtype)
    var = (var.double() + eps * ratio.double().square()).to(mean.dtype)
    if peers is not None:
        return normalise_together(input, weight, bias, mean, var, statistics.count, peers)
    return _normalise(input, weight, bias, mean, var)
