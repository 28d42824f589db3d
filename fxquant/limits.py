"""The real ranges that a grid may have: bounds that float32 holds, 0 within them, and limits that narrow them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxquant.errors import SpecError


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

    def narrow(self, span: tuple[float, float]) -> tuple[float, float]:
        """The part of a range that obeys the limits; SpecError if there is none."""
        low = span[0] if self.low is None else max(span[0], self.low)
        high = span[1] if self.high is None else min(span[1], self.high)
        if not low < high:
            expected = f"a range within [{bound_text(self.low)}, {bound_text(self.high)}]"
            raise SpecError("QuantSpec.fixed", expected=expected, got=f"[{span[0]:g}, {span[1]:g}]")
        return low, high


NO_LIMITS = Limits()
LARGEST_BOUND = 1e38  # of a range: its width, and what lies a step beyond it, are float32 numbers too


def check_bound(value: float, of: str) -> None:
    """Raise SpecError, about the bound `of` a range, unless float32 holds it and the grids that end at it."""
    if not abs(value) <= LARGEST_BOUND:  # NaN is not, either
        raise SpecError(of, expected=f"a finite number of at most {LARGEST_BOUND:g}", got=f"{value:g}")


def check_range(low: float, high: float, of: str) -> None:
    """Raise SpecError unless [low, high] is a range that a grid can have: 0 is on every grid."""
    for value in (low, high):
        check_bound(value, of)
    if not low < high:
        raise SpecError(of, expected="low < high", got=f"[{low:g}, {high:g}]")
    if not low <= 0 <= high:
        raise SpecError(of, expected="a range that holds 0, as every grid does", got=f"[{low:g}, {high:g}]")


def bound_text(value: float | None) -> str:
    """One end of a range in words."""
    return "free" if value is None else f"{value:g}"
