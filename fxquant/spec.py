"""What a quantizer should do (QuantSpec) and what it found (Encoding).

    code  = clip(rint(x / scale) + zero_point, qmin, qmax)        x_hat = (code - zero_point) * scale

`rint` rounds half to even (ONNX QuantizeLinear, opset 21). Scales are float32 values; division is true division.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum

import torch

from fxquant.errors import SpecError


class Target(Enum):
    """The runtime whose rules a program obeys."""

    ONNXRUNTIME_X64 = "onnxruntime-x64"
    TENSORRT = "tensorrt"
    OPENVINO = "openvino"
    XNNPACK = "xnnpack"
    QNN_HTP = "qnn-htp"

    @property
    def merges_activation_specs(self) -> bool:
        """Whether the runtime merges two quantizers on one activation, so that a value may have one spec only."""
        return self is Target.ONNXRUNTIME_X64


@dataclass(frozen=True)
class Granularity:
    """How many encodings a tensor has: one, one for each index of `axis`, or one for each `block` indices along it."""

    axis: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        if self.block is not None and (self.axis is None or self.block < 1):
            raise SpecError("granularity", expected="an axis and a block of at least 1", got=f"{self}")

    def __str__(self) -> str:
        if self.axis is None:
            return "per-tensor"
        return f"per-channel({self.axis})" if self.block is None else f"per-block({self.axis}, {self.block})"


PER_TENSOR = Granularity()


@dataclass(frozen=True)
class Limits:
    """A range [low, high] that an encoding may not exceed, and a zero point that it must have; None leaves it free.

    onnxruntime removes a ReLU6 only if the grid behind it ends at or below 6: `Limits(0.0, 6.0, zero_point=0)`.
    """

    low: float | None = None
    high: float | None = None
    zero_point: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            if value is not None and not math.isfinite(value):
                raise SpecError(f"limit '{name}'", expected="a finite number or none", got=str(value))
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise SpecError("limits", expected="low < high", got=f"[{self.low}, {self.high}]")

    def meet(self, other: Limits) -> Limits:
        """The limits that obey both."""
        lows = [v for v in (self.low, other.low) if v is not None]
        highs = [v for v in (self.high, other.high) if v is not None]
        if None not in (self.zero_point, other.zero_point) and self.zero_point != other.zero_point:
            raise SpecError("limits", expected=f"zero point {self.zero_point}", got=f"zero point {other.zero_point}")
        zero_point = self.zero_point if self.zero_point is not None else other.zero_point
        return Limits(max(lows, default=None), min(highs, default=None), zero_point)


NO_LIMITS = Limits()


@dataclass(frozen=True)
class QuantSpec:
    """How one value is to be quantized.

    Arguments:
        bits: 2 to 16, or 32 for a bias.
        signed: codes in [-2^(bits-1), 2^(bits-1)-1] (signed) or [0, 2^bits-1].
        symmetric: zero point 0 (signed) or the middle of the grid (unsigned).
        strict: symmetric only: leave out the lowest code, so that -max and max are both on the grid.
        granularity: per tensor, per channel or per block.
        limits: a range and zero point that every estimator, learned range and loaded encoding obeys.
        fixed: a fixed real range (low, high) instead of an estimated one.
        estimator: name of the range estimator ("min-max", "moving-average").
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    strict: bool = False
    granularity: Granularity = PER_TENSOR
    limits: Limits = NO_LIMITS
    fixed: tuple[float, float] | None = None
    estimator: str = "min-max"

    def __post_init__(self) -> None:
        if not (2 <= self.bits <= 16 or self.bits == 32):
            raise SpecError("QuantSpec.bits", expected="2 to 16 (or 32 for a bias)", got=str(self.bits))
        if self.strict and not (self.symmetric and self.signed):
            raise SpecError("QuantSpec.strict", expected="a symmetric signed grid", got=str(self))
        if self.fixed is not None and not self.fixed[0] < self.fixed[1]:
            raise SpecError("QuantSpec.fixed", expected="low < high", got=str(self.fixed))
        zero_point = self.limits.zero_point
        if zero_point is not None and not self.qmin <= zero_point <= self.qmax:
            raise SpecError(
                "QuantSpec.limits", expected=f"a zero point in [{self.qmin}, {self.qmax}]", got=str(zero_point)
            )

    @property
    def qmin(self) -> int:
        """Lowest code."""
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + (1 if self.strict else 0)

    @property
    def qmax(self) -> int:
        """Highest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def steps(self) -> int:
        """qmax - qmin."""
        return self.qmax - self.qmin

    def limited(self, limits: Limits) -> QuantSpec:
        """This spec, with `limits` obeyed too."""
        return replace(self, limits=self.limits.meet(limits))

    def __str__(self) -> str:
        kind = f"{'s' if self.signed else 'u'}{self.bits}"
        shape = ("strict " if self.strict else "") + ("symmetric" if self.symmetric else "asymmetric")
        extras = [str(self.granularity)]
        if self.limits != NO_LIMITS:
            extras.append(f"within [{_bound(self.limits.low)}, {_bound(self.limits.high)}]")
        if self.fixed is not None:
            extras.append(f"fixed [{self.fixed[0]:g}, {self.fixed[1]:g}]")
        return f"{kind} {shape} {' '.join(extras)}"


def _bound(value: float | None) -> str:
    return "free" if value is None else f"{value:g}"


BIAS_SPEC = QuantSpec(bits=32, signed=True, symmetric=True)


@dataclass(frozen=True, eq=False)
class Encoding:
    """The grid of one value: `scale` (float32) and `zero_point` (int64), both of shape () or (channels,), on the CPU.

    `min`, `max`, `delta` and `offset` are views in AIMET's terms: min = (qmin - zero_point) * scale, delta = scale,
    offset = qmin - zero_point (the number of steps from code qmin to real 0, negated, as AIMET's files write it).
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    spec: QuantSpec

    def __post_init__(self) -> None:
        if self.scale.dtype != torch.float32 or self.zero_point.dtype != torch.int64:
            got = f"{self.scale.dtype} and {self.zero_point.dtype}"
            raise SpecError("Encoding", expected="a float32 scale and an int64 zero point", got=got)
        if self.scale.shape != self.zero_point.shape:
            got = f"{tuple(self.scale.shape)} and {tuple(self.zero_point.shape)}"
            raise SpecError("Encoding", expected="scale and zero point of one shape", got=got)
        if not bool(torch.isfinite(self.scale).all()) or not bool((self.scale > 0).all()):
            raise SpecError("Encoding", expected="finite scales above 0", got=str(self.scale))
        outside = (self.zero_point < self.spec.qmin) | (self.zero_point > self.spec.qmax)
        if bool(outside.any()):
            expected = f"zero points in [{self.spec.qmin}, {self.spec.qmax}]"
            raise SpecError("Encoding", expected=expected, got=str(self.zero_point))

    @property
    def min(self) -> torch.Tensor:
        """Real value of the lowest code, float64."""
        return (self.spec.qmin - self.zero_point).double() * self.scale.double()

    @property
    def max(self) -> torch.Tensor:
        """Real value of the highest code, float64."""
        return (self.spec.qmax - self.zero_point).double() * self.scale.double()

    @property
    def delta(self) -> torch.Tensor:
        """Step between two codes, float32: the scale."""
        return self.scale

    @property
    def offset(self) -> torch.Tensor:
        """qmin - zero_point: AIMET's offset, 0 or negative."""
        return self.spec.qmin - self.zero_point

    def same_grid(self, other: Encoding) -> bool:
        """Whether both map codes to the same real numbers."""
        return (
            self.spec.qmin == other.spec.qmin
            and self.spec.qmax == other.spec.qmax
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero_point, other.zero_point)
        )
