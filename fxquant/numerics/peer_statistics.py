"""Batch norm over the batches of all peers, and what is different about its derivative.

Statistics of shards of n_r elements with mean m_r and biased variance v_r (Chan, Golub and LeVeque, 1979):

    n = sum n_r      mean = sum n_r m_r / n      var = sum n_r (v_r + (m_r - mean)^2) / n

With x_hat = (x - mean) * invstd and g the gradient of the sum of all processes' losses by the output:

    dx = w * invstd * (g - S / n - x_hat * T / n)      S = sum g, T = sum g * x_hat, over all peers' elements

while dw and db are sums over one's own elements: DistributedDataParallel averages them, as it does all parameters'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from fxquant.numerics.peers import Peers


@torch.no_grad()
def statistics_of_all(
    mean: torch.Tensor, var: torch.Tensor, count: int, peers: Peers
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Mean and biased variance (their dtype) and count of what all peers hold; one's own do not matter at count 0."""
    mine = torch.stack([mean.double(), var.double(), torch.full_like(mean, count, dtype=torch.float64)])
    if count == 0:
        mine.zero_()
    means, variances, counts = peers.gathered(mine).unbind(dim=1)
    total = counts.sum(dim=0)
    found = (counts * means).sum(dim=0) / total
    spread = (counts * (variances + (means - found).square())).sum(dim=0) / total
    return found.to(mean.dtype), spread.to(var.dtype), int(total[0])


class _NormaliseTogether(torch.autograd.Function):
    """(input - mean) / sqrt(var) * weight + bias; in backward, mean and var less a constant are all peers' inputs'."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        var: torch.Tensor,
        count: int,
        peers: Peers,
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight, mean, var.rsqrt())
        ctx.count, ctx.peers = count, peers
        return functional.batch_norm(input, mean, var, weight, bias, False, 0.0, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, mean, invstd = ctx.saved_tensors
        grad = grads[0].contiguous()
        by_weight = by_bias = torch.zeros_like(weight)
        if input.numel():  # the operator divides by the number of elements
            _, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
                grad, input, weight, None, None, mean, invstd, True, 0.0, [False, True, True]
            )
        by_input = None
        if ctx.needs_input_grad[0]:
            mean_grad, mean_product = (ctx.peers.total(torch.stack([by_bias, by_weight])) / ctx.count).unbind()
            shape = (-1, *[1] * (input.ndim - 2))
            slope = -weight * invstd.square() * mean_product
            shift = -weight * invstd * mean_grad - slope * mean
            factors = [factor.view(shape).to(input.dtype) for factor in (weight * invstd, slope, shift)]
            by_input = (grad * factors[0]).addcmul_(input, factors[1]).add_(factors[2])
        return by_input, by_weight, by_bias if ctx.needs_input_grad[2] else None, None, None, None, None


# torch leaves Function.apply untyped.
normalise_together: Callable[..., torch.Tensor] = _NormaliseTogether.apply
