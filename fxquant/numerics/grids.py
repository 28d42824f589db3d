"""From a real range to a grid: scale and zero point that cover [low, high], hold 0 exactly and obey the spec's limits.

    asymmetric   s = (high - low) / (qmax - qmin)             z = clip(rint(qmin - low / s), qmin, qmax)
    symmetric    s = max(|low| / -qmin, |high| / qmax)        z = 0   (an unsigned symmetric grid has z in its middle)

with low <= 0 <= high (so that 0 is on the grid: zero padding is exact), in float64, the scale then rounded to float32.
"""

from __future__ import annotations

import torch

from fxquant.errors import SpecError
from fxquant.spec import QuantSpec

SMALLEST_SCALE = 2.0**-60  # the product of two such scales is still a normal float32
# A tensor that is 0 everywhere is exact at any scale. A weight's (symmetric) is the smallest, then raised to what its
# bias needs: at 1.0 the bias of a channel without weights would be rounded to steps of the input's scale. An
# activation's is not: the scale of a float bias that onnxruntime quantizes itself has nothing that raises it.
CONSTANT_ZERO_SCALE = 1.0
_MOST_ULPS = 4


def grid_for_range(
    low: torch.Tensor, high: torch.Tensor, spec: QuantSpec, *, is_weight: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (float32) and zero point (int64), of the shape of `low` and `high`, for a spec of up to 16 bits.

    `is_weight` decides the scale of a range that is 0 alone.
    """
    low64, high64 = _within_limits(low.double(), high.double(), spec)
    zero_point = spec.fixed_zero_point
    if zero_point is None:
        scale = _positive((high64 - low64) / spec.steps, CONSTANT_ZERO_SCALE)
        return _within_clip(scale, low64, spec)
    below, above = zero_point - spec.qmin, spec.qmax - zero_point
    need_below = -low64 / below if below else torch.zeros_like(low64)
    need_above = high64 / above if above else torch.zeros_like(high64)
    instead_of_zero = SMALLEST_SCALE if spec.symmetric and is_weight else CONSTANT_ZERO_SCALE
    scale = _positive(torch.maximum(need_below, need_above), instead_of_zero)
    return scale, torch.full_like(scale, zero_point, dtype=torch.int64)


def grid_from(scale: torch.Tensor, low: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (float32) and zero point (int64) of a range that is within its limits, of such a scale and lowest value."""
    if spec.fixed_zero_point is not None:
        return scale, torch.full_like(scale, spec.fixed_zero_point, dtype=torch.int64)
    return _within_clip(scale, low, spec)


def clip_codes(low: float, high: float, scale: torch.Tensor, zero_point: torch.Tensor) -> list[torch.Tensor]:
    """The codes (float32, not clamped) of a clip's bounds, as onnxruntime compares them with qmin and qmax.

    Where they are qmin or less and qmax or more, the clip is redundant: rint(f(bound / s)) + z, f() being float32.
    """
    return [torch.round(scale.new_tensor(bound) / scale) + zero_point for bound in (low, high)]


def _within_limits(low: torch.Tensor, high: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise SpecError("range", expected="finite bounds", got=f"[{low}, {high}]")
    if spec.fixed is not None:
        low, high = torch.full_like(low, spec.fixed[0]), torch.full_like(high, spec.fixed[1])
    if spec.limits.low is not None:
        low = low.clamp(min=spec.limits.low)
    if spec.limits.high is not None:
        high = high.clamp(max=spec.limits.high)
    return low.clamp(max=0.0), high.clamp(min=0.0)


def _within_clip(scale: torch.Tensor, low64: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """`scale` and its zero point; made smaller by an ulp or two where a clip at the limits would not be redundant.

    [-6, 6] in 255 steps ends at 127.5 steps to either side: both round to 127 if the scale was rounded up.
    """
    zero_point = _zero_point(scale, low64, spec)
    low, high = spec.limits.low, spec.limits.high
    if low is None or high is None or not low < 0.0 < high:
        return scale, zero_point
    for _ in range(_MOST_ULPS):
        codes = clip_codes(low, high, scale, zero_point)
        cuts = (codes[0] > spec.qmin) | (codes[1] < spec.qmax)
        if not torch.compiler.is_compiling() and not bool(cuts.any()):
            break
        scale = torch.where(cuts, torch.nextafter(scale, torch.zeros_like(scale)), scale)
        zero_point = _zero_point(scale, low64, spec)
    return scale, zero_point


def _zero_point(scale: torch.Tensor, low64: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    return torch.clamp(torch.round(spec.qmin - low64 / scale.double()), spec.qmin, spec.qmax).to(torch.int64)


def _positive(scale: torch.Tensor, instead_of_zero: float) -> torch.Tensor:
    floored = scale.clamp(min=SMALLEST_SCALE)
    return torch.where(scale == 0, torch.full_like(scale, instead_of_zero), floored).to(torch.float32)
