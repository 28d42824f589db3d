"""What may find a range and what training may do to it, by the names and numbers that a QuantSpec has them by."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fxquant.errors import SpecError, nearest


@dataclass(frozen=True)
class MethodNumber:
    """The number that a method takes in brackets: "percentile(99.9)"."""

    meaning: str
    default: float
    low: float
    high: float


# What QuantSpec.estimator may say; fxquant.numerics.estimators has the algorithms.
ESTIMATORS: dict[str, MethodNumber | None] = {
    "min-max": None,
    "moving-average": MethodNumber("momentum: weight of the newest batch", 0.1, 0.0, 1.0),
    "percentile": MethodNumber("share of the values, in %, that lies below the upper bound", 99.99, 50.0, 100.0),
    "mse": None,
    "tf-enhanced": MethodNumber("gamma: weight of clipping noise", 3.0, 1.0, 1e6),
    "entropy": None,
}
# What QuantSpec.training may say; fxquant.numerics.trained_ranges has the algorithms.
RANGE_TRAINING: dict[str, MethodNumber | None] = {
    "static": None,
    "moving-average": MethodNumber("momentum: weight of the newest batch", 0.01, 0.0, 1.0),
    "lsq": None,
    "lsq+": None,
    "min-max": None,
    "log2": None,
}
_METHOD = re.compile(r"([a-z0-9+-]+)(?:\((.*)\))?")


def parse_estimator(text: str) -> tuple[str, float | None]:
    """Name and number of an estimator: "percentile(99.9)" -> ("percentile", 99.9); its default where none is given.

    Raises SpecError for an unknown name, a number that it does not take, or one out of range.
    """
    return _parse_method(text, "estimator", ESTIMATORS)


def parse_training(text: str) -> tuple[str, float | None]:
    """Name and number of what training does to a range: "moving-average(0.05)" -> ("moving-average", 0.05).

    Raises SpecError as `parse_estimator` does.
    """
    return _parse_method(text, "range training", RANGE_TRAINING)


def _parse_method(text: str, kind: str, known: dict[str, MethodNumber | None]) -> tuple[str, float | None]:
    match = _METHOD.fullmatch(text.strip())
    name = match.group(1) if match else text
    if match is None or name not in known:
        raise SpecError(f"{kind} '{text}' is unknown", remedy=nearest(name, known))
    number, given = known[name], match.group(2)
    if given is None:
        return name, None if number is None else number.default
    if number is None:
        raise SpecError(f"{kind} '{name}'", expected="no number", got=text)
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not number.low <= value <= number.high:
        expected = f"a number in [{number.low:g}, {number.high:g}] ({number.meaning})"
        raise SpecError(f"{kind} '{name}'", expected=expected, got=text)
    return name, value
