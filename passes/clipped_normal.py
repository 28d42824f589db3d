"""Mean and deviation of functions of a normal variable: what an activation makes of a batch norm's output.

With x ~ N(m, s), a = (low - m) / s, b = (high - m) / s, Z = Phi(b) - Phi(a), phi and Phi of the standard normal:

    E[clip(x)]    = m Z + s (phi(a) - phi(b)) + low Phi(a) + high Phi(-b)
    E[clip(x)^2]  = (m^2 + s^2) Z + s ((low + m) phi(a) - (high + m) phi(b)) + low^2 Phi(a) + high^2 Phi(-b)

An infinite bound adds nothing. ReLU is the clip to [0, inf): m Phi(m / s) + s phi(m / s). Nagel et al. 2019
(arXiv:1906.04721), section 4.2.1, and the appendix for the clip with two bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Pair = tuple[torch.Tensor, torch.Tensor]  # mean and deviation, float64 of shape (channels,)
_REACH = 10.0  # deviations to either side that are integrated over
_POINTS = 4001


def clipped(mean: torch.Tensor, std: torch.Tensor, low: float, high: float) -> Pair:
    """Of x clipped to [low, high]; where std is 0, x is its mean."""
    first, second = _clipped_powers(mean, std, low, high)
    return first, (second - first.square()).clamp(min=0).sqrt()


def leaky(mean: torch.Tensor, std: torch.Tensor, slope: torch.Tensor | float) -> Pair:
    """Of x where it is positive, slope * x elsewhere: relu(x) - slope * relu(-x)."""
    up, up_square = _clipped_powers(mean, std, 0.0, math.inf)
    down, down_square = _clipped_powers(-mean, std, 0.0, math.inf)
    first, second = up - slope * down, up_square + slope**2 * down_square
    return first, (second - first.square()).clamp(min=0).sqrt()


def _clipped_powers(mean: torch.Tensor, std: torch.Tensor, low: float, high: float) -> Pair:
    is_spread = std > 0
    spread = torch.where(is_spread, std, torch.ones_like(std))
    below, above = (low - mean) / spread, (high - mean) / spread
    inside = torch.special.ndtr(above) - torch.special.ndtr(below)
    first, second = mean * inside, (mean.square() + spread.square()) * inside
    for bound, place, sign in ((low, below, 1.0), (high, above, -1.0)):
        if math.isfinite(bound):
            density, tail = torch.exp(-place.square() / 2) / math.sqrt(2 * math.pi), torch.special.ndtr(sign * place)
            first = first + sign * spread * density + bound * tail
            second = second + sign * spread * (bound + mean) * density + bound**2 * tail
    constant = mean.clamp(low, high)
    return torch.where(is_spread, first, constant), torch.where(is_spread, second, constant.square())


def integrated(mean: torch.Tensor, std: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> Pair:
    """Of function(x), by the trapezoidal rule; `function` takes float64 of shape (channels, points)."""
    z = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64, device=mean.device)
    weights = torch.exp(-z.square() / 2)
    weights = weights / weights.sum()
    values = function(mean[:, None] + std[:, None] * z)
    first = (values * weights).sum(1)
    return first, ((values - first[:, None]).square() * weights).sum(1).sqrt()
