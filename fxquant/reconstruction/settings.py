"""Settings: how the rounding of a unit's weights is learned (learn.py): steps, rates, the regularization's course."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxquant.errors import FxquantError

TRAVEL = 10.0  # learning rate times iterations: 10,000 steps of 1e-3
LARGEST_RATE = 0.1


@dataclass(frozen=True)
class Settings:
    """How rounding is learned.

    Arguments:
        iterations: steps of Adam; None: 10,000, or 15,000 where a weight has fewer than 8 bits.
        learning_rate: of alpha; None: 1e-3, or as much more as fewer iterations need to go as far.
        batch_size: samples of a step, drawn without replacement.
        regularization: lambda.
        beta_start, beta_end: of the exponent's way down.
        warm_start: the part of the iterations without regularization.
        drop: the probability with which a quantized activation's element passes in float (blocks only).
        early_stop: end as soon as every number is rounded for good.
        check_every: of so many samples one is held back, to compare the learned rounding with that to the nearest; 0:
            none, all samples are learned from and compared on.
        seed: of what is drawn; each unit draws by its name and this.
    """

    iterations: int | None = None
    learning_rate: float | None = None
    batch_size: int = 32
    regularization: float = 0.01
    beta_start: float = 20.0
    beta_end: float = 2.0
    warm_start: float = 0.2
    drop: float = 0.0
    early_stop: bool = True
    check_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        rate = self.learning_rate
        _require("iterations", self.iterations is None or self.iterations >= 1, "at least 1", self.iterations)
        _require("learning_rate", rate is None or 0 < rate < math.inf, "above 0", rate)
        _require("batch_size", self.batch_size >= 1, "at least 1", self.batch_size)
        _require("regularization", 0 <= self.regularization < math.inf, "0 or more", self.regularization)
        _require("beta_end", self.beta_end >= 1, "at least 1", self.beta_end)
        _require("beta_start", self.beta_end <= self.beta_start < math.inf, "at least beta_end", self.beta_start)
        _require("warm_start", 0 <= self.warm_start < 1, "in [0, 1)", self.warm_start)
        _require("check_every", self.check_every == 0 or self.check_every >= 2, "0, or at least 2", self.check_every)
        _require("drop", 0 <= self.drop <= 1, "in [0, 1]", self.drop)

    def steps_for(self, bits: int) -> int:
        """Iterations for weights of so many bits."""
        return self.iterations if self.iterations is not None else 15_000 if bits < 8 else 10_000

    def rate_for(self, steps: int) -> float:
        """The learning rate of so many iterations."""
        return self.learning_rate or min(max(TRAVEL / 10_000, TRAVEL / steps), LARGEST_RATE)

    def beta_at(self, step: int, steps: int) -> float | None:
        """The exponent at a step; None while r does not count."""
        first = self.warm_start * steps
        if step < first:
            return None
        way = (step - first) / (steps - first)
        return self.beta_end + (self.beta_start - self.beta_end) * (1 + math.cos(math.pi * way)) / 2


def _require(option: str, is_right: bool, expected: str, got: object) -> None:
    if not is_right:
        raise FxquantError(f"option '{option}'", expected=expected, got=str(got))
