"""What a search is to reach: a score, or a drop against the float model's.

threshold = target                               a score
threshold = float score - amount                 Drop(amount)
threshold = float score - amount |float score|   Drop(amount, relative=True)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from fxquant.errors import ConfigError


@dataclass(frozen=True)
class Drop:
    """The largest drop against the float model's score that is accepted.

    Arguments:
        amount: 0 or more, in the units of the score; a fraction of the float score if `relative`.
        relative: Drop(0.01, relative=True) accepts 99 % of the float score.
    """

    amount: float
    relative: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.amount) and self.amount >= 0):
            raise ConfigError("Drop.amount", expected="a finite number, 0 or more", got=f"{self.amount}")

    def __str__(self) -> str:
        return f"a drop of {100 * self.amount:g} %" if self.relative else f"a drop of {self.amount:g}"


def check_target(target: float | Drop, thing: str) -> None:
    """Refuse what is neither a Drop nor a finite score; `thing` is for messages."""
    is_number = isinstance(target, (int, float)) and not isinstance(target, bool)
    if not isinstance(target, Drop) and not (is_number and math.isfinite(target)):
        remedy = "target=0.71 is a score, target=Drop(0.01) one 0.01 below the float model's."
        raise ConfigError(f"{thing}: target", expected="a finite score, or a Drop", got=repr(target), remedy=remedy)


def threshold_of(target: float | Drop, float_score: float) -> float:
    """The score that is to be reached."""
    if not isinstance(target, Drop):
        return float(target)
    return float_score - target.amount * (abs(float_score) if target.relative else 1.0)


def plain_target(target: float | Drop) -> Any:
    """The target as plain values, for JSON."""
    return asdict(target) if isinstance(target, Drop) else target


def outcome_text(target: float | Drop, threshold: float, score: float) -> str:
    """Whether a score reaches a target, in words: "target (a drop of 1 %: 0.94) reached: 0.945"."""
    asked = f"{target}: {threshold:.6g}" if isinstance(target, Drop) else f"{threshold:.6g}"
    return f"target ({asked}) {'reached' if score >= threshold else 'NOT reached'}: {score:.6g}"
