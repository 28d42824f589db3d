"""Candidate ranges, and the one that costs least: the square of the quantization error, weighed by how often it occurs.

    cost = sum_i mass_i * weight_i * (Q(point_i) - point_i)^2        weight_i = gamma where Q clips, else 1

Points are the centres of a histogram's bins, or values as they are. Ties go to the first candidate, the widest range:
the observed one, but in a search around the best of another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxquant.numerics.grids import grid_for_range
from fxquant.spec import QuantSpec

Ranges = tuple[torch.Tensor, torch.Tensor]

MOST_NUMBERS = 1 << 20  # encodings x candidates x points at a time: 8 MB of float64 for each intermediate result
MOST_CANDIDATES = 358


@dataclass(frozen=True, eq=False)
class Samples:
    """What a range is searched for.

    Arguments:
        points, mass: float64 [encodings, points]: values in ascending order, and how often each occurs.
        low, high: float64 [encodings]: the observed range, with 0 in it, within the spec's limits.
        reach: float64 [encodings]: how far a value may lie from its point: half a bin.
    """

    points: torch.Tensor
    mass: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    reach: torch.Tensor

    def of(self, chosen: torch.Tensor) -> Samples:
        """Those of the encodings that `chosen` (bool [encodings]) names."""
        return Samples(*(part[chosen] for part in (self.points, self.mass, self.low, self.high, self.reach)))


def observed_range(low: torch.Tensor, high: torch.Tensor, spec: QuantSpec) -> Ranges:
    """The range (float64) that a search may use: what was observed, with 0 in it, within the spec's limits."""
    low64, high64 = low.double(), high.double()
    if spec.limits.low is not None:
        low64 = low64.clamp(min=spec.limits.low)
    if spec.limits.high is not None:
        high64 = high64.clamp(max=spec.limits.high)
    return low64.clamp(max=0.0), high64.clamp(min=0.0)


def blocks(encodings: int, numbers: int) -> list[slice]:
    """All encodings, as many at a time as memory allows if each needs so many numbers."""
    size = max(1, MOST_NUMBERS // max(1, numbers))
    return [slice(first, first + size) for first in range(0, encodings, size)]


def cheapest(samples: Samples, low: torch.Tensor, high: torch.Tensor, spec: QuantSpec, gamma: float = 1.0) -> Ranges:
    """The candidate [low, high] (float64 [encodings, candidates]) of the smallest cost, for each encoding."""
    low, high = low.to(torch.float32).double(), high.to(torch.float32).double()
    best = costs(samples, low, high, spec, gamma).argmin(dim=1, keepdim=True)
    return low.gather(1, best)[:, 0], high.gather(1, best)[:, 0]


def costs(samples: Samples, low: torch.Tensor, high: torch.Tensor, spec: QuantSpec, gamma: float) -> torch.Tensor:
    """Cost of each candidate, float64 [encodings, candidates]."""
    scale32, zero_point = grid_for_range(low, high, spec)
    scale = scale32.double()[:, :, None]
    first, last = (spec.qmin - zero_point).double()[:, :, None], (spec.qmax - zero_point).double()[:, :, None]
    points = samples.points[:, None, :]
    error = torch.clamp((points / scale).round_(), first, last).mul_(scale).sub_(points)
    square = error * error
    cost = square.bmm(samples.mass[:, :, None])[:, :, 0]
    if gamma != 1.0:
        clipped = square.mul_(error.abs_() > _HALF * scale)
        cost += (gamma - 1.0) * clipped.bmm(samples.mass[:, :, None])[:, :, 0]
    return cost


_HALF = 0.5 + 1e-9  # of a step: more than rounding can be off


# --- smallest mean squared error -------------------------------------------------------------------------------------

# How much of each end a candidate keeps: from all of it to 1/256, then finer around the best.
_COARSE_STEPS = 8.0  # per factor 2, where one number says both ends
_COARSE_PLANE_STEPS = 2.0  # per factor 2, where each end has its own
_FINE_REACH = 8  # fine steps to either side; a fine step is a coarse one divided by this
_OCTAVES = 8


def mean_squared_error_range(samples: Samples, spec: QuantSpec) -> Ranges:
    """The range of the smallest mean squared error.

    Both ends shrink in proportion where one number says the grid (a zero point that is prescribed, or data on one side
    of 0): 2^(-k/8), k = 0..64, then 2^(j/64) around the best, j = -8..8. Else each end shrinks by itself: 2^(-k/2),
    k = 0..16, then 2^(j/16) around the best, j = -8..8. No candidate exceeds the observed range.
    """
    on_line = (samples.low == 0) | (samples.high == 0)
    if spec.fixed_zero_point is not None:
        on_line = torch.ones_like(on_line)
    low, high = torch.empty_like(samples.low), torch.empty_like(samples.high)
    for steps, chosen in ((_COARSE_STEPS, on_line), (_COARSE_PLANE_STEPS, ~on_line)):
        if bool(chosen.any()):
            plane = steps == _COARSE_PLANE_STEPS
            low[chosen], high[chosen] = _coarse_then_fine(samples.of(chosen), spec, steps, plane=plane)
    return low, high


def _coarse_then_fine(samples: Samples, spec: QuantSpec, steps: float, *, plane: bool) -> Ranges:
    device = samples.low.device
    coarse = torch.pow(2.0, -torch.arange(0, _OCTAVES * steps + 1, device=device, dtype=torch.float64) / steps)
    reach = torch.arange(_FINE_REACH, -_FINE_REACH - 1, -1, device=device, dtype=torch.float64)
    fine = torch.pow(2.0, reach / (_FINE_REACH * steps))
    low, high = cheapest(samples, *_scaled(samples.low, samples.high, coarse, plane=plane), spec)
    lows, highs = _scaled(low, high, fine, plane=plane)
    return cheapest(
        samples,
        torch.maximum(lows, samples.low[:, None]),
        torch.minimum(highs, samples.high[:, None]),
        spec,
    )


def _scaled(low: torch.Tensor, high: torch.Tensor, factors: torch.Tensor, *, plane: bool) -> Ranges:
    """[encodings, candidates]: both ends times each factor, or times each pair of factors."""
    if not plane:
        return low[:, None] * factors, high[:, None] * factors
    pairs = torch.cartesian_prod(factors, factors)
    return low[:, None] * pairs[:, 0], high[:, None] * pairs[:, 1]


# --- TF-Enhanced -----------------------------------------------------------------------------------------------------

_DELTAS = 16  # asymmetric: k / 16 of the observed step, k = 17..1
_OFFSETS = 20  # offsets -N + j N / 19, j = 0..19, and the observed one
_SYMMETRIC_DELTAS = 100  # k / 100 of the observed step, k = 100..1


def tf_enhanced_range(samples: Samples, spec: QuantSpec, gamma: float) -> Ranges:
    """The range of the smallest error, clipping noise weighed by `gamma`: AIMET's TF-Enhanced, as it is documented.

    A prescribed zero point leaves the step alone to be chosen: k/100 of the observed one (k = 0, which AIMET tries as
    well, would clip everything). Else 17 steps k/16, each at 21 offsets (the observed one among them), the range then
    cut to the observed one and the step computed anew. Data on one side of 0 thereby give many steps at one offset.
    The observed range itself is tried first: offsets are rounded, so that it may be none of these.
    """
    if spec.fixed_zero_point is not None:
        shares = torch.arange(_SYMMETRIC_DELTAS, 0, -1, device=samples.low.device, dtype=torch.float64)
        return cheapest(
            samples, *_scaled(samples.low, samples.high, shares / _SYMMETRIC_DELTAS, plane=False), spec, gamma
        )
    return cheapest(samples, *_deltas_and_offsets(samples, spec.steps), spec, gamma)


def _deltas_and_offsets(samples: Samples, steps: int) -> Ranges:
    """[encodings, 1 + 17 * 21] candidates; the observed range comes first."""
    device = samples.low.device
    low, high = samples.low[:, None, None], samples.high[:, None, None]
    widest = ((high - low) / steps).clamp(min=torch.finfo(torch.float64).tiny)
    share = torch.arange(_DELTAS + 1, 0, -1, device=device, dtype=torch.float64) / _DELTAS
    delta = widest * share[None, :, None]
    spread = torch.round(-steps + torch.arange(_OFFSETS, device=device, dtype=torch.float64) * steps / (_OFFSETS - 1))
    observed = torch.round(low / widest)
    offset = torch.cat([observed, spread.expand(len(low), 1, -1)], dim=2)
    lows = torch.maximum(delta * offset, low)
    highs = torch.minimum(delta * (offset + steps), high)
    is_range = lows < highs  # an offset of -N leaves nothing of data above 0
    lows, highs = torch.where(is_range, lows, low), torch.where(is_range, highs, high)
    return torch.cat([low[:, 0], lows.flatten(1)], dim=1), torch.cat([high[:, 0], highs.flatten(1)], dim=1)
