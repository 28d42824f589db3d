"""Ranges that move in training: by a moving average of what is seen, or learned as parameters.

A learned range is a pair low, high, computed in float64 from float32 parameters of the encoding's shape:

    lsq       scale s, zero point z as calibrated       low = (qmin - z) s       high = low + (qmax - qmin) s
    lsq+      scale s and lowest value b                low = b                  high = low + (qmax - qmin) s
    min-max   both ends                                 low, high
    log2      t = log2 of the scale                     as lsq, with s = 2^t

From it the grid follows as it does after calibration (numerics/grids.py), limits and rounding included. Gradients are
those of the plain formulas of grids.py, rounding passed straight through:

    asymmetric   s = (high - low) / (qmax - qmin)     z = qmin - low / s
    symmetric    s = max(low / (qmin - z), high / (qmax - z))

and of x_hat = s (clip(rint(x / s) + z) - z) by s and z (rounding.learned_fake_quantize). lsq and lsq+ multiply their
parameters' gradients by 1 / sqrt(n p). n counts the elements of one example that share the range: a batch of twice the
size has the gradient of a mean over twice as many examples, no less. p counts the steps above 0, as the paper's Q_P
does: qmax - z where z is prescribed, all steps where it is free; so it is the same for signed and unsigned codes of one
grid. A bound that a limit holds (or 0, or the smallest scale) takes only gradients that lead back from it: parameters
that an optimizer threw beyond, a negative scale say, return.

LSQ: Esser et al., 2020 (arXiv:1902.08153); LSQ+: Bhalgat et al., 2020 (arXiv:2004.09576); log2 thresholds: Jain et al.,
2020, TQT (arXiv:1903.08066), without rounding them to powers of two; both ends: Jacob et al., 2018 (arXiv:1712.05877).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxquant.errors import CalibrationError
from fxquant.limits import LARGEST_BOUND
from fxquant.numerics.estimators.base import seen_by_all
from fxquant.numerics.grids import SMALLEST_SCALE, grid_for_range
from fxquant.numerics.peers import Peers
from fxquant.spec import QuantSpec, parse_training

_LOG2_BOUNDS = math.log2(SMALLEST_SCALE), math.log2(LARGEST_BOUND)


class TrainedRange(nn.Module):
    """Base of the ranges that training moves.

    Arguments:
        spec: the grid that the range is for.
        shape: the encoding's shape.
    """

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.spec = spec

    @abstractmethod
    def start(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Begin at this grid."""


class MovingRange(TrainedRange):
    """Moving average of each batch's extremes, in training mode: m <- m + momentum * (new - m).

    Buffers: `low` and `high` (float32). With `peers`, all processes' tensors are one batch.
    """

    low: torch.Tensor
    high: torch.Tensor
    peers: Peers | None = None

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...], momentum: float) -> None:
        super().__init__(spec, shape)
        self.momentum = momentum
        self.register_buffer("low", torch.full(shape, math.nan))
        self.register_buffer("high", torch.full(shape, math.nan))

    def start(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Begin at the range that this grid covers."""
        self.low.copy_((self.spec.qmin - zero_point) * scale)
        self.high.copy_((self.spec.qmax - zero_point) * scale)

    def update(self, x: torch.Tensor) -> None:
        """Move towards the extremes of `x`; an empty tensor says nothing, nor do extremes that are not finite.

        A batch that overflows, as loss scaling provokes them, shows in the loss; it must not end the average.
        """
        seen = seen_by_all(x, self.spec.granularity, self.low.shape, self.peers)
        if seen is None:
            return
        _, low, high = seen
        is_finite = torch.isfinite(low) & torch.isfinite(high)
        for kept, new in ((self.low, low), (self.high, high)):
            kept.copy_(torch.where(is_finite, kept + self.momentum * (new - kept), kept))


class LearnedRange(TrainedRange):
    """Base of the ranges that are parameters."""

    scales_gradients = False  # by 1 / sqrt(n p)

    def grid(self, floor: torch.Tensor, elements: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point (both float32), differentiable by the parameters; their values are exact.

        Arguments:
            floor: smallest scales allowed.
            elements: of one example, or of a weight, that share one range.

        Raises CalibrationError where a parameter is not finite.
        """
        self._require_finite()
        low, high = self.ends(self.gradient_factor(elements))
        scale, zero_point = self._plain(low, high, floor.double().clamp(min=SMALLEST_SCALE))
        with torch.no_grad():
            exact_scale, exact_zero_point = grid_for_range(low, high, self.spec)
            # A range that shrank to nothing stays next to where it was: 0 alone would have a scale of its own.
            exact_scale = exact_scale.masked_fill((low == 0.0) & (high == 0.0), SMALLEST_SCALE)
        return _valued(scale, torch.maximum(exact_scale, floor)), _valued(
            zero_point, exact_zero_point.to(torch.float32)
        )

    def gradient_factor(self, elements: int) -> float:
        """What the parameters' gradients are multiplied by, if that many elements of an example share one range."""
        if not self.scales_gradients:
            return 1.0
        spec = self.spec
        above = spec.steps if spec.fixed_zero_point is None else spec.qmax - spec.fixed_zero_point
        return 1.0 / math.sqrt(max(elements, 1) * (above or spec.steps))

    @property
    def moves_zero_point(self) -> bool:
        """Whether the zero point depends on the parameters."""
        return True

    @abstractmethod
    def ends(self, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Low and high (float64) within the limits; the parameters' gradients are multiplied by `factor`."""

    def _plain(
        self, low: torch.Tensor, high: torch.Tensor, smallest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        spec, prescribed = self.spec, self.spec.fixed_zero_point
        if prescribed is None:
            scale = _held((high - low) / spec.steps, smallest, math.inf)
            zero_point = spec.qmin - low / scale
            return scale, zero_point if self.moves_zero_point else zero_point.detach()
        below, above = prescribed - spec.qmin, spec.qmax - prescribed
        sides = [side / count for side, count in ((-low, below), (high, above)) if count]
        scale = _held(torch.stack(sides).amax(dim=0), smallest, math.inf)
        return scale, torch.full_like(scale, prescribed).detach()

    def _span(self, low: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The ends of a grid that begins at `low`; one with a free zero point is first moved towards the limits.

        Where the zero point was rounded, a grid within its limits reaches up to half a step beyond one of them.
        """
        width = self.spec.steps * scale
        if self.spec.fixed_zero_point is not None or not self._is_limited:
            return self._low(low), self._high(low + width)
        high = self._high(self._low(low) + width)
        return self._low(high - width), high

    @property
    def _is_limited(self) -> bool:
        return (self.spec.limits.low, self.spec.limits.high) != (None, None)

    def _low(self, low: torch.Tensor) -> torch.Tensor:
        limit = self.spec.limits.low
        return _held(low, min(0.0, -LARGEST_BOUND if limit is None else limit), 0.0)

    def _high(self, high: torch.Tensor) -> torch.Tensor:
        limit = self.spec.limits.high
        return _held(high, 0.0, max(0.0, LARGEST_BOUND if limit is None else limit))

    def _parameter(self, name: str, shape: tuple[int, ...]) -> None:
        self.register_parameter(name, nn.Parameter(torch.full(shape, math.nan)))

    def _require_finite(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if not torch.compiler.is_compiling() and not bool(torch.isfinite(parameter).all()):
                count = int((~torch.isfinite(parameter)).sum())
                raise CalibrationError(
                    f"learned range ({self.spec.training}): parameter '{name}'",
                    expected="finite numbers",
                    got=f"{count} of {parameter.numel()} NaN or Inf",
                    remedy="Calibrate before training; if training diverged, lower the ranges' learning rate and "
                    "resume from a checkpoint.",
                )


class LearnedScale(LearnedRange):
    """lsq."""

    scales_gradients = True
    scale: nn.Parameter
    zero_point: torch.Tensor

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...]) -> None:
        super().__init__(spec, shape)
        self._parameter("scale", shape)
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int64))

    @property
    def moves_zero_point(self) -> bool:
        """Only where a limit moves the grid: otherwise its derivative is 0."""
        return self._is_limited

    @torch.no_grad()
    def start(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Begin at this grid."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def ends(self, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The ends of the grid of this scale."""
        scale = _scaled(self.scale, factor).double()
        return self._span((self.spec.qmin - self.zero_point) * scale, scale)


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

    def ends(self, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The lowest value, and all steps above it."""
        return self._span(_scaled(self.low, factor).double(), _scaled(self.scale, factor).double())


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
        below = (self.spec.qmin - zero_point) * scale.double()
        low, high = self._span(below, scale.double())
        width, is_high_larger = self.spec.steps * scale.double(), high > -low
        if self.spec.fixed_zero_point is None:
            from_low = self._low(low.float().double()) + width
            from_high = self._high(high.float().double()) - width
            low, high = torch.where(is_high_larger, from_high, low), torch.where(is_high_larger, high, from_low)
        self.low.copy_(low)
        self.high.copy_(high)

    def ends(self, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The parameters."""
        return self._low(self.low.double()), self._high(self.high.double())


class LearnedLog2(LearnedRange):
    """log2."""

    log2_scale: nn.Parameter
    zero_point: torch.Tensor

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...]) -> None:
        super().__init__(spec, shape)
        self._parameter("log2_scale", shape)
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int64))

    @property
    def moves_zero_point(self) -> bool:
        """As lsq."""
        return self._is_limited

    @torch.no_grad()
    def start(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Begin at this grid, but for the rounding of t to float32: its scale may differ by a factor 1 +- 2^-24 |t|."""
        self.log2_scale.copy_(scale.double().log2())
        self.zero_point.copy_(zero_point)

    def ends(self, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The ends of the grid of this scale."""
        scale = _held(self.log2_scale.double(), *_LOG2_BOUNDS).exp2()
        return self._span((self.spec.qmin - self.zero_point) * scale, scale)


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


class _Valued(torch.autograd.Function):
    """`value`, with the gradient of `plain`."""

    @staticmethod
    def forward(ctx: Any, plain: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.dtype = plain.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0].to(ctx.dtype), None


class _Held(torch.autograd.Function):
    """clip(x, low, high); at a bound, or beyond it, the gradient passes if descent leads back inside."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, low: torch.Tensor | float, high: torch.Tensor | float) -> torch.Tensor:
        bounds = [torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (low, high)]
        ctx.save_for_backward(x, *bounds)
        return x.clamp(*bounds)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, low, high), grad = ctx.saved_tensors, grads[0]
        passes = ((x > low) | (grad < 0)) & ((x < high) | (grad > 0))
        return grad * passes, None, None


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0] * ctx.factor, None


# torch leaves Function.apply untyped.
_valued: Callable[..., torch.Tensor] = _Valued.apply
_held: Callable[..., torch.Tensor] = _Held.apply
_scaled: Callable[..., torch.Tensor] = _Scaled.apply
