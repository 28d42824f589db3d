"""Schedule: how long quantization-aware training goes on, at which learning rates, and what is frozen when.

The rate of epoch e (from 0) is learning_rate / learning_rate_divisor ^ floor(e / divide_every).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from numbers import Real
from typing import Any

from fxquant.errors import ConfigError, clipped

NEVER = "never"  # how a file says None, where None is never
MAY_BE_NEVER = ("divide_every", "freeze_batch_norm_after", "freeze_encodings_after")
MOST_EPOCHS = 2**63 - 1  # what TOML can say


@dataclass(frozen=True)
class Schedule:
    """Quantization-aware training as data; units are epochs, and learning rates as optimizers take them.

    Arguments:
        epochs: how many, 15 to 20 as a rule (AIMET's guide to QAT).
        learning_rate: of the first epochs: about the float training's last one, of the order of 1e-6 or ten times that
            (AIMET's guide).
        range_learning_rate: of learned ranges; None for the same.
        learning_rate_divisor: what learning rates are divided by.
        divide_every: after how many epochs they are, again and again (AIMET's guide: 5 to 10); None is never.
        freeze_batch_norm_after: after how many epochs batch norm uses its running statistics in training, too
            (PyTorch's recipe: about 3); None is never.
        freeze_encodings_after: after how many epochs no grid moves any more, learned ones included (PyTorch's
            recipe: about 4); None is never.

    Numbers of numpy become plain ones. To freeze before the first epoch, call `sim.freeze_batch_norm()` or
    `sim.freeze_encodings()`. Raises ConfigError.
    """

    epochs: int = 15
    learning_rate: float = 1e-5
    range_learning_rate: float | None = None
    learning_rate_divisor: float = 10.0
    divide_every: int | None = 5
    freeze_batch_norm_after: int | None = 3
    freeze_encodings_after: int | None = 4

    def __post_init__(self) -> None:
        for name in ("epochs", *MAY_BE_NEVER):
            if name == "epochs" or getattr(self, name) is not None:
                self._make_plain(name, _count(name, getattr(self, name)))
        self._make_plain("learning_rate", _rate("learning_rate", self.learning_rate))
        if self.range_learning_rate is not None:
            self._make_plain("range_learning_rate", _rate("range_learning_rate", self.range_learning_rate))
        self._make_plain("learning_rate_divisor", _divisor(self.learning_rate_divisor))

    def _make_plain(self, name: str, value: float) -> None:
        object.__setattr__(self, name, value)

    def divides_after(self, epoch: int) -> bool:
        """Whether learning rates are divided once `epoch` epochs are done."""
        return self.divide_every is not None and epoch > 0 and epoch % self.divide_every == 0

    def learning_rate_at(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        rate = self.learning_rate
        for done in range(1, epoch + 1):
            if self.divides_after(done):
                rate /= self.learning_rate_divisor
        return rate


def plain_integer(value: Any) -> int | None:
    """`value` (of numpy, too) as an int; None for what is no integer."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def shown(value: object) -> str:
    """A wrong value, for a message."""
    try:
        return clipped(repr(value))
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "an integer of thousands of digits"


def _float(value: object) -> float:
    """`value` as a float; NaN for what is no number, infinity for what no float can hold."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _count(name: str, value: object) -> int:
    count = plain_integer(value)
    if count is not None and 1 <= count <= MOST_EPOCHS:
        return count
    frozen = name.removesuffix("_after")
    remedies = {
        "epochs": "Train for one epoch or more.",
        "divide_every": "None never divides the learning rate.",
    }
    remedy = remedies.get(name, f"None never freezes; to freeze before the first epoch, call sim.{frozen}().")
    expected = f"a number of epochs, {'1 or more' if count is None or count < 1 else 'at most 2^63 - 1'}"
    raise ConfigError(f"Schedule.{name}", expected=expected, got=shown(value), remedy=remedy)


def _rate(name: str, value: object) -> float:
    rate = _float(value)
    if not (math.isfinite(rate) and rate > 0.0):
        remedy = "Start near the last learning rate of the float training, of the order of 1e-5."
        raise ConfigError(f"Schedule.{name}", expected="a positive number", got=shown(value), remedy=remedy)
    return rate


def _divisor(value: object) -> float:
    divisor = _float(value)
    if not (math.isfinite(divisor) and divisor >= 1.0):
        remedy = "It divides: 10 makes a tenth of the rate, 1 leaves it."
        raise ConfigError(
            "Schedule.learning_rate_divisor", expected="a number of at least 1", got=shown(value), remedy=remedy
        )
    return divisor


DEFAULT_SCHEDULE = Schedule()
