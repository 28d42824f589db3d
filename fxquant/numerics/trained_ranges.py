"""Ranges that are learned as parameters, and what makes a range of a spec.

A learned range's parameters (float32, of the encoding's shape) say a grid, which obeys the spec's limits:

    lsq       scale s, zero point z as calibrated       low = (qmin - z) s       high = low + (qmax - qmin) s
    lsq+      scale s and lowest value b                low = b                  high = low + (qmax - qmin) s
    min-max   both ends                                 low, high
    log2      t = log2 of the scale                     as lsq, with s = 2^t

Grids whose zero point is free and whose end a limit (or 0) holds are moved inside with their scale, as far as they fit.
Gradients are those of the plain formulas of numerics/grids.py, rounding passed straight through:

    lsq, log2    by s, z being what it is
    lsq+         z = qmin - low / s; where a limit holds high, z = qmax - high / s
    min-max      s = (high - low) / (qmax - qmin), z = qmin - low / s
    symmetric    s = max(low / (qmin - z), high / (qmax - z))

and of x_hat = s (clip(rint(x / s) + z) - z) by s and z (learned_rounding.py). lsq and lsq+ multiply their parameters'
gradients by 1 / sqrt(n p). n counts the elements of one example that share the range: a batch of twice the size has the
gradient of a mean over twice as many examples, no less. p counts the steps above 0, as the paper's Q_P does: qmax - z
where z is prescribed, all steps where it is free; so it is the same for signed and unsigned codes of one grid. A
parameter that a limit holds (or 0, or the smallest scale) takes only gradients that lead back from it, judged by all
that it gets, once: parameters that an optimizer threw beyond, a negative scale say, return.

LSQ: Esser et al., 2020 (arXiv:1902.08153); LSQ+: Bhalgat et al., 2020 (arXiv:2004.09576); log2 thresholds: Jain et al.,
2020, TQT (arXiv:1903.08066), without rounding them to powers of two; both ends: Jacob et al., 2018 (arXiv:1712.05877).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import nn

from fxquant.errors import CalibrationError
from fxquant.limits import LARGEST_BOUND
from fxquant.numerics.grids import SMALLEST_SCALE, grid_for_range, grid_from
from fxquant.numerics.moving_range import MovingRange as MovingRange
from fxquant.numerics.moving_range import TrainedRange as TrainedRange
from fxquant.numerics.range_gradients import by_ends, by_scale, by_scale_and_low
from fxquant.spec import QuantSpec, parse_training

Pair = tuple[torch.Tensor, torch.Tensor]


class LearnedRange(TrainedRange):
    """Base of the ranges that are parameters."""

    scales_gradients = False  # by 1 / sqrt(n p)

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...]) -> None:
        super().__init__(spec, shape)
        low, high = spec.limits.low, spec.limits.high
        self._lowest = min(0.0, -LARGEST_BOUND if low is None else low)
        self._highest = max(0.0, LARGEST_BOUND if high is None else high)
        full = torch.tensor(self._lowest, dtype=torch.float64), torch.tensor(self._highest, dtype=torch.float64)
        self._largest_scale = float(grid_for_range(*full, spec)[0])

    def grid(self, floor: torch.Tensor, elements: int = 1) -> Pair:
        """Scale and zero point (both float32), differentiable by the parameters; their values are exact.

        Arguments:
            floor: smallest scales allowed.
            elements: of one example, or of a weight, that share one range.

        Raises CalibrationError where a parameter is not finite.
        """
        self._require_finite()
        return self._grid(floor, floor.clamp(min=SMALLEST_SCALE), self.gradient_factor(elements))

    def gradient_factor(self, elements: int) -> float:
        """What the parameters' gradients are multiplied by, if that many elements of an example share one range."""
        if not self.scales_gradients:
            return 1.0
        spec = self.spec
        above = spec.steps if spec.fixed_zero_point is None else spec.qmax - spec.fixed_zero_point
        return 1.0 / math.sqrt(max(elements, 1) * (above or spec.steps))

    @abstractmethod
    def _grid(self, floor: torch.Tensor, smallest: torch.Tensor, factor: float) -> Pair:
        """As `grid`; the parameters' gradients are multiplied by `factor`."""

    def _within(self, scale: torch.Tensor) -> torch.Tensor:
        return scale.clamp(SMALLEST_SCALE, self._largest_scale)

    def _place(self, width: torch.Tensor) -> Pair:
        """The bounds of where a grid of this width may begin: 0 on it, its ends within the limits."""
        return (-width).clamp(min=self._lowest), (self._highest - width).clamp(self._lowest, 0.0)

    def _parameter(self, name: str, shape: tuple[int, ...]) -> None:
        self.register_parameter(name, nn.Parameter(torch.full(shape, math.nan)))

    def _require_finite(self) -> None:
        if torch.compiler.is_compiling():
            return
        for name, parameter in self._parameters.items():
            assert parameter is not None
            if math.isfinite(float(parameter.detach().sum())):  # one reduction, where all is well
                continue
            if count := int((~torch.isfinite(parameter)).sum()):
                raise CalibrationError(
                    f"learned range ({self.spec.training}): parameter '{name}'",
                    expected="finite numbers",
                    got=f"{count} of {parameter.numel()} NaN or Inf",
                    remedy="Calibrate before training; if training diverged, lower the ranges' learning rate and "
                    "resume from a checkpoint.",
                )


class _ScaledGrid(LearnedRange):
    """Base of lsq and log2: a scale, and the zero point as calibrated."""

    zero_point: torch.Tensor

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...]) -> None:
        super().__init__(spec, shape)
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int64))

    @torch.no_grad()
    def _values(self, plain: torch.Tensor, floor: torch.Tensor) -> Pair:
        """The grid of this scale (float32)."""
        scale, spec = self._within(plain), self.spec
        zero_point = self.zero_point
        if spec.fixed_zero_point is None and (spec.limits.low, spec.limits.high) != (None, None):
            wide = scale.double()
            low = (spec.qmin - zero_point) * wide
            lower, upper = self._place(spec.steps * wide)
            scale, zero_point = grid_from(scale, low.clamp(lower, upper), spec)
        return torch.maximum(scale, floor), zero_point.to(torch.float32)


class LearnedScale(_ScaledGrid):
    """lsq."""

    scales_gradients = True
    scale: nn.Parameter

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...]) -> None:
        super().__init__(spec, shape)
        self._parameter("scale", shape)

    @torch.no_grad()
    def start(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Begin at this grid."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def _grid(self, floor: torch.Tensor, smallest: torch.Tensor, factor: float) -> Pair:
        plain = self.scale.detach()
        scale, zero_point = self._values(plain, floor)
        return by_scale(self.scale, scale, plain, factor, smallest, self._largest_scale), zero_point


class LearnedLog2(_ScaledGrid):
    """log2."""

    log2_scale: nn.Parameter

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...]) -> None:
        super().__init__(spec, shape)
        self._parameter("log2_scale", shape)

    @torch.no_grad()
    def start(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Begin at this grid, but for the rounding of t to float32: its scale may differ by a factor 1 +- 2^-24 |t|."""
        self.log2_scale.copy_(scale.double().log2())
        self.zero_point.copy_(zero_point)

    def _grid(self, floor: torch.Tensor, smallest: torch.Tensor, factor: float) -> Pair:
        plain = self.log2_scale.detach().double().exp2().float()
        scale, zero_point = self._values(plain, floor)
        slope = self._within(plain) * math.log(2.0)
        return by_scale(self.log2_scale, scale, plain, slope, smallest, self._largest_scale), zero_point


class LearnedScaleAndOffset(LearnedRange):
    """lsq+."""

    scales_gradients = True
    scale: nn.Parameter
    low: nn.Parameter

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...]) -> None:
        super().__init__(spec, shape)
        self._parameter("scale", shape)
        self._parameter("low", shape)

    @torch.no_grad()
    def start(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Begin at this grid."""
        self.scale.copy_(scale)
        self.low.copy_((self.spec.qmin - zero_point) * scale)

    def _grid(self, floor: torch.Tensor, smallest: torch.Tensor, factor: float) -> Pair:
        with torch.no_grad():
            scale = self._within(self.scale)
            wide, low = scale.double(), self.low.double()
            width = self.spec.steps * wide
            lower, upper = self._place(width)
            held = low.clamp(lower, upper)
            scale, zero_point = grid_from(scale, held, self.spec)
            scale = torch.maximum(scale, floor)
            anchor = torch.where((low >= upper) & (upper < 0.0), held + width, held)
        values = scale, zero_point.to(torch.float32)
        bounds = smallest, self._largest_scale, lower, upper
        return by_scale_and_low(self.scale, self.low, *values, anchor, *bounds, factor)


class LearnedEnds(LearnedRange):
    """min-max; where the zero point is prescribed at one end, that end is 0 and no parameter of the optimizer's."""

    low: nn.Parameter
    high: nn.Parameter

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...]) -> None:
        super().__init__(spec, shape)
        self._parameter("low", shape)
        self._parameter("high", shape)
        self.low.requires_grad_(spec.fixed_zero_point != spec.qmin)
        self.high.requires_grad_(spec.fixed_zero_point != spec.qmax)

    @torch.no_grad()
    def start(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Begin at this grid; where the zero point is prescribed, at one whose scale may differ by an ulp.

        Elsewhere the larger end is rounded to float32, and the other lies all steps from it: it is at most half of the
        range, so that its own rounding moves the range by less than 2^-25 of it: less than half an ulp of the scale.
        """
        wide = scale.double()
        low, width = (self.spec.qmin - zero_point) * wide, self.spec.steps * wide
        if self.spec.fixed_zero_point is None:
            low = low.clamp(*self._place(width))
        low, high = self._held(low, low + width)
        if self.spec.fixed_zero_point is None:
            is_high_larger, ends = high > -low, self._held(low.float().double(), high.float().double())
            low, high = (
                torch.where(is_high_larger, ends[1] - width, low),
                torch.where(is_high_larger, high, ends[0] + width),
            )
        for end, value in zip((self.low, self.high), self._held(low, high), strict=True):
            end.copy_(value)

    def _held(self, low: torch.Tensor, high: torch.Tensor) -> Pair:
        return low.clamp(self._lowest, 0.0), high.clamp(0.0, self._highest)

    def _grid(self, floor: torch.Tensor, smallest: torch.Tensor, factor: float) -> Pair:
        with torch.no_grad():
            low, high = self._held(self.low.double(), self.high.double())
            plain, weights = self._plain(low, high)
            scale, zero_point = grid_from(plain.clamp(min=SMALLEST_SCALE).float(), low, self.spec)
            values = torch.maximum(scale, floor), zero_point.to(torch.float32)
        bounds = smallest, self._lowest, self._highest
        scale, zero_point = by_ends(self.low, self.high, *values, low, plain, *weights, *bounds)
        return scale, zero_point if self.spec.fixed_zero_point is None else zero_point.detach()

    def _plain(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, Pair]:
        """s, and its derivatives by low and high; where both sides of a symmetric grid say the same, each has half."""
        spec, prescribed = self.spec, self.spec.fixed_zero_point
        if prescribed is None:
            each = torch.full_like(low, 1.0 / spec.steps)
            return (high - low) / spec.steps, (-each, each)
        below, above = prescribed - spec.qmin, spec.qmax - prescribed
        needs = -low / below if below else torch.zeros_like(low), high / above if above else torch.zeros_like(high)
        share = 0.5 * (1.0 + torch.sign(needs[0] - needs[1])) if below and above else torch.full_like(low, bool(below))
        return torch.maximum(*needs), (-share / max(below, 1), (1.0 - share) / max(above, 1))


_LEARNED: dict[str, Callable[[QuantSpec, tuple[int, ...]], LearnedRange]] = {
    "lsq": LearnedScale,
    "lsq+": LearnedScaleAndOffset,
    "min-max": LearnedEnds,
    "log2": LearnedLog2,
}


def make_range(spec: QuantSpec, shape: tuple[int, ...]) -> TrainedRange | None:
    """The range that `spec.training` asks for; None where training leaves it alone.

    A fixed range is left alone. Where the zero point is prescribed, lsq+ is lsq.
    """
    name, number = parse_training(spec.training)
    if name == "static" or spec.fixed is not None:
        return None
    if name == "moving-average":
        assert number is not None
        return MovingRange(spec, shape, number)
    if name == "lsq+" and spec.fixed_zero_point is not None:
        name = "lsq"
    return _LEARNED[name](spec, shape)
