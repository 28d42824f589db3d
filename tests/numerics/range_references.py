"""What each estimator should find, in plain numpy loops over candidates: written apart from the code under test.

All take the points of one encoding (float64, ascending), how often each occurs, and the observed extremes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxquant.spec import QuantSpec

Numbers = npt.NDArray[np.float64]
Candidate = tuple[float, float]


@dataclass(frozen=True)
class Seen:
    """One encoding's distribution."""

    points: Numbers
    mass: Numbers
    low: float
    high: float
    width: float  # of the bins; 0 where points are values


def ends(seen: Seen, spec: QuantSpec) -> Candidate:
    """Observed extremes with 0 between them, within the limits."""
    low = max(seen.low, -math.inf if spec.limits.low is None else spec.limits.low)
    high = min(seen.high, math.inf if spec.limits.high is None else spec.limits.high)
    return min(low, 0.0), max(high, 0.0)


def zero_point_of(spec: QuantSpec) -> int | None:
    """The prescribed zero point."""
    if spec.limits.zero_point is not None:
        return spec.limits.zero_point
    if spec.symmetric:
        return 0 if spec.signed else 2 ** (spec.bits - 1)
    return None


def codes_of(spec: QuantSpec) -> tuple[int, int]:
    """Lowest and highest code."""
    if not spec.signed:
        return 0, 2**spec.bits - 1
    half = 2 ** (spec.bits - 1)
    return (1 - half if spec.strict else -half), half - 1


def grid(candidate: Candidate, spec: QuantSpec) -> tuple[float, int, int]:
    """Scale, and first and last multiple of it, of the grid that covers a range."""
    low, high = candidate
    qmin, qmax = codes_of(spec)
    zero_point = zero_point_of(spec)
    if zero_point is None:
        scale = (high - low) / (qmax - qmin) or 1.0
    else:
        needs = [0.0]
        if zero_point > qmin:
            needs.append(-low / (zero_point - qmin))
        if zero_point < qmax:
            needs.append(high / (qmax - zero_point))
        scale = max(needs) or 1.0
    scale = float(np.float32(max(scale, 2.0**-60)))
    if zero_point is None:
        zero_point = min(max(round(qmin - low / scale), qmin), qmax)
    return scale, qmin - zero_point, qmax - zero_point


def error(candidate: Candidate, seen: Seen, spec: QuantSpec, gamma: float) -> float:
    """Squared error over all points, clipped ones `gamma` times."""
    scale, first, last = grid(candidate, spec)
    steps = np.rint(seen.points / scale)
    kept = np.minimum(np.maximum(steps, first), last)
    noise = (kept * scale - seen.points) ** 2
    return float(np.sum(seen.mass * noise * np.where(steps == kept, 1.0, gamma)))


def float32(candidate: Candidate) -> Candidate:
    """A candidate as estimators give it."""
    return float(np.float32(candidate[0])), float(np.float32(candidate[1]))


def least(candidates: list[Candidate], price: Callable[[Candidate], float]) -> Candidate:
    """The first of the cheapest."""
    rounded = [float32(candidate) for candidate in candidates]
    return min(rounded, key=price)


def tf_enhanced(seen: Seen, spec: QuantSpec, gamma: float) -> Candidate:
    """The observed range, and 17 steps at 21 offsets each; or 100 steps at the prescribed one."""
    low, high = ends(seen, spec)
    if zero_point_of(spec) is not None:
        candidates = [(low * k / 100, high * k / 100) for k in range(100, 0, -1)]
        return least(candidates, lambda candidate: error(candidate, seen, spec, gamma))
    n = 2**spec.bits - (2 if spec.strict else 1)
    widest = (high - low) / n
    if widest == 0.0:
        return 0.0, 0.0
    candidates = [(low, high)]
    for k in range(17, 0, -1):
        for offset in (round(low / widest), *(round(-n + j * n / 19) for j in range(20))):
            delta = k / 16 * widest
            candidates.append((min(max(delta * offset, low), 0.0), max(min(delta * (offset + n), high), 0.0)))
    ranges = [candidate for candidate in candidates if candidate[0] < candidate[1]]
    return least(ranges, lambda candidate: error(candidate, seen, spec, gamma))


def mse(seen: Seen, spec: QuantSpec) -> Candidate:
    """Eight octaves down from the observed range, then finer around the best."""
    low, high = ends(seen, spec)
    line = zero_point_of(spec) is not None or low == 0.0 or high == 0.0
    steps = 8 if line else 2
    coarse = [2.0 ** (-k / steps) for k in range(8 * steps + 1)]
    fine = [2.0 ** (-j / (8 * steps)) for j in range(-8, 9)]

    def price(candidate: Candidate) -> float:
        return error(candidate, seen, spec, 1.0)

    def pairs(factors: list[float]) -> list[Candidate]:
        return [(f, f) for f in factors] if line else [(f, g) for f in factors for g in factors]

    best = least([(low * f, high * g) for f, g in pairs(coarse)], price)
    return least([(max(best[0] * f, low), min(best[1] * g, high)) for f, g in pairs(fine)], price)


def percentile(seen: Seen, spec: QuantSpec, percent: float) -> Candidate:
    """Where a share of the values lies below, and above, counted one bin after the other."""
    share, total = percent / 100.0, seen.mass.sum()

    def reached(places: list[int]) -> int:
        count = 0.0
        for place in places:
            count += seen.mass[place]
            if count > 0 and count >= share * total - 1e-6:
                return place
        return places[-1]

    up = list(range(len(seen.points)))
    low, high = ends(seen, spec)
    upper = seen.points[reached(up)] + seen.width / 2
    lower = seen.points[reached(up[::-1])] - seen.width / 2
    return min(max(float(lower), low), 0.0), max(min(float(upper), high), 0.0)


def divergence(candidate: Candidate, seen: Seen, spec: QuantSpec) -> float:
    """KL of what was observed and what the codes tell, bin by bin."""
    scale, first, last = grid(candidate, spec)
    taken = (seen.mass > 0) & (seen.points != 0.0)
    points, mass = seen.points[taken], seen.mass[taken]
    steps = np.rint(points / scale)
    inside = (steps >= first) & (steps <= last)
    if not inside.any():
        return math.inf
    codes, weights = steps[inside].astype(int), mass[inside]
    p = weights.copy()
    p[0] += mass[steps < first].sum()
    p[-1] += mass[steps > last].sum()
    q = np.empty_like(p)
    for code in np.unique(codes):
        q[codes == code] = weights[codes == code].mean()
    p, q = p / p.sum(), q / q.sum()
    return float(np.sum(p * np.log(p / q)))


def entropy(seen: Seen, spec: QuantSpec) -> Candidate:
    """128 thresholds, of those whose steps are no narrower than a bin."""
    low, high = ends(seen, spec)
    qmin, qmax = codes_of(spec)
    candidates = [float32((low * k / 128, high * k / 128)) for k in range(128, 0, -1)]
    usable = [candidate for candidate in candidates if grid(candidate, spec)[0] >= seen.width]
    if seen.mass.sum() <= qmax - qmin or len({*usable, candidates[0]}) < 2:
        return low, high
    return least(list(dict.fromkeys([candidates[0], *usable])), lambda candidate: divergence(candidate, seen, spec))
