"""The range that loses least information: Kullback-Leibler divergence of what a grid can tell from what was observed.

    KL = sum_i p_i log(p_i / q_i)

P is the histogram within the candidate range, what lies outside added to its outermost occupied bins. Q is what the
codes tell of the histogram within: each code's mass, spread evenly over the occupied bins that have that code (Migacz,
"8-bit inference with TensorRT", 2017). Both sums run over codes, by differences of running sums over bins:

    sum_i p_i log q_i = sum_c S_c log(S_c / n_c)      S_c, n_c: mass and number of the occupied bins of code c

The bin of 0 takes no part: 0 is exact on every grid, and a ReLU's zeros would outweigh all else.
"""

from __future__ import annotations

import torch

from fxquant.numerics.estimators.search import Ranges, Samples
from fxquant.numerics.grids import grid_for_range
from fxquant.spec import QuantSpec

CANDIDATES = 128  # both ends times k / 128, k = 128..1


def entropy_range(samples: Samples, spec: QuantSpec) -> Ranges:
    """The range of the smallest divergence, both ends of the observed one shrunk in proportion.

    A candidate must have at least one bin for each step of the grid: with fewer, Q equals P and says nothing. Where
    none has, and where no more values than steps were seen, the observed range stays.
    """
    shares = torch.arange(CANDIDATES, 0, -1, device=samples.low.device, dtype=torch.float64) / CANDIDATES
    low = (samples.low[:, None] * shares).to(torch.float32).double()
    high = (samples.high[:, None] * shares).to(torch.float32).double()
    scale, zero_point = grid_for_range(low, high, spec)
    usable = (scale.double() >= 2 * samples.reach[:, None]) & (samples.mass.sum(dim=1) > spec.steps)[:, None]
    if not bool(usable.any()):
        return samples.low, samples.high
    found = divergences(samples, scale.double(), zero_point, spec).masked_fill(~usable, torch.inf)
    best = found.argmin(dim=1, keepdim=True)  # the first, the observed range, where all are infinite
    return low.gather(1, best)[:, 0], high.gather(1, best)[:, 0]


def divergences(samples: Samples, scale: torch.Tensor, zero_point: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """KL for each candidate grid, float64 [encodings, candidates]; inf where nothing lies within."""
    bins = _OccupiedBins(samples)
    first, last = spec.qmin - zero_point, spec.qmax - zero_point
    codes = first[:, :, None] + torch.arange(spec.steps + 2, device=scale.device)
    bounds = (codes - 0.5) * scale[:, :, None]
    bounds = torch.where(codes % 2 == 1, torch.nextafter(bounds, bounds.new_tensor(torch.inf)), bounds)  # half to even
    edges = torch.searchsorted(samples.points, bounds.flatten(1)).view(codes.shape)
    mass = bins.between(bins.mass, edges)
    level = torch.log(mass / bins.between(bins.number, edges)).nan_to_num_(nan=0.0, neginf=0.0)  # log Q by code
    start, stop = edges[:, :, 0], edges[:, :, -1]
    inside, total = mass.sum(dim=2), bins.mass[:, -1:]
    below = bins.mass.gather(1, start)
    above = total - below - inside
    one, two = bins.first_from(start), bins.last_before(stop)
    ends = [torch.clamp(torch.round(samples.points.gather(1, at) / scale), first, last) - first for at in (one, two)]
    level_one, level_two = (level.gather(2, end.to(torch.int64)[:, :, None])[:, :, 0] for end in ends)
    entropy = bins.log_mass.gather(1, stop) - bins.log_mass.gather(1, start)
    entropy += bins.with_clipped(one, two, below, above)
    told = (mass * level).sum(dim=2) + below * level_one + above * level_two
    divergence = (entropy - told) / total + torch.log(inside / total)
    return divergence.masked_fill(inside <= 0, torch.inf)


class _OccupiedBins:
    """Running sums over the bins other than 0's, each with a leading 0: float64 [encodings, bins + 1]."""

    def __init__(self, samples: Samples) -> None:
        self.each = samples.mass.masked_fill(samples.points == 0, 0.0)
        self.mass = _running(self.each)
        self.number = _running((self.each > 0).double())
        self.log_mass = _running(torch.xlogy(self.each, self.each))
        place = torch.arange(self.each.shape[1], device=self.each.device).expand_as(self.each)
        taken = self.each > 0
        self._previous = place.masked_fill(~taken, 0).cummax(dim=1).values
        self._next = place.masked_fill(~taken, place.shape[1] - 1).flip(1).cummin(dim=1).values.flip(1)

    @staticmethod
    def between(running: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """Sums between consecutive edges, [encodings, candidates, edges - 1]."""
        at = running.gather(1, edges.flatten(1)).view(edges.shape)
        return at[:, :, 1:] - at[:, :, :-1]

    def first_from(self, place: torch.Tensor) -> torch.Tensor:
        """The first occupied bin at `place` or after it."""
        return self._next.gather(1, place.clamp(max=self._next.shape[1] - 1))

    def last_before(self, place: torch.Tensor) -> torch.Tensor:
        """The last occupied bin before `place`."""
        return self._previous.gather(1, (place - 1).clamp(min=0))

    def with_clipped(
        self, one: torch.Tensor, two: torch.Tensor, below: torch.Tensor, above: torch.Tensor
    ) -> torch.Tensor:
        """What sum p log p gains where bins `one` and `two` take the mass below and above the range."""
        mass_one, mass_two = self.each.gather(1, one), self.each.gather(1, two)
        apart = _gain(mass_one, below) + _gain(mass_two, above)
        return torch.where(one == two, _gain(mass_one, below + above), apart)


def _gain(mass: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    return torch.xlogy(mass + more, mass + more) - torch.xlogy(mass, mass)


def _running(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(values.cumsum(dim=1), (1, 0))
