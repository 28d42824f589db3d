"""Schedule: how long quantization-aware training goes on, at which learning rates, and what is frozen when.

The rate of epoch e (from 0) is learning_rate / learning_rate_divisor ^ floor(e / divide_every).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxquant.errors import ConfigError

NEVER = "never"  # how a file says None, where None is never
MAY_BE_NEVER = ("divide_every", "freeze_batch_norm_after", "freeze_encodings_after")


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
            (torchvision's reference training: 3); None is never.
        freeze_encodings_after: after how many epochs no grid moves any more, learned ones included (torchvision's
            reference training: 4); None is never.

    To freeze before the first epoch, call `sim.freeze_batch_norm()` or `sim.freeze_encodings()`. Raises ConfigError.
    """

    epochs: int = 15
    learning_rate: float = 1e-5
    range_learning_rate: float | None = None
    learning_rate_divisor: float = 10.0
    divide_every: int | None = 5
    freeze_batch_norm_after: int | None = 3
    freeze_encodings_after: int | None = 4

    def __post_init__(self) -> None:
        _require_count("epochs", self.epochs)
        for name in MAY_BE_NEVER:
            if getattr(self, name) is not None:
                _require_count(name, getattr(self, name))
        _require_rate("learning_rate", self.learning_rate)
        if self.range_learning_rate is not None:
            _require_rate("range_learning_rate", self.range_learning_rate)
        divisor = self.learning_rate_divisor
        if not (_is_number(divisor) and math.isfinite(divisor) and divisor >= 1.0):
            remedy = "It divides: 10 makes a tenth of the rate, 1 leaves it."
            raise ConfigError(
                "Schedule.learning_rate_divisor", expected="a number of at least 1", got=repr(divisor), remedy=remedy
            )

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


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require_count(name: str, value: object) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return
    frozen = name.removesuffix("_after")
    remedies = {
        "epochs": "Train for one epoch or more.",
        "divide_every": "None never divides the learning rate.",
    }
    remedy = remedies.get(name, f"None never freezes; to freeze before the first epoch, call sim.{frozen}().")
    raise ConfigError(f"Schedule.{name}", expected="a number of epochs, 1 or more", got=repr(value), remedy=remedy)


def _require_rate(name: str, value: float) -> None:
    if not (_is_number(value) and math.isfinite(value) and value > 0.0):
        remedy = "Start near the last learning rate of the float training, of the order of 1e-5."
        raise ConfigError(f"Schedule.{name}", expected="a positive number", got=repr(value), remedy=remedy)


DEFAULT_SCHEDULE = Schedule()
