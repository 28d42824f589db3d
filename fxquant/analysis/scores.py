"""The sweeps by a user's `evaluate`: one score for each choice of quantizers, each kept as soon as it is known."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fxquant.analysis.sweep import Sweep
from fxquant.evaluation import Evaluate, score_of
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.training.seeding import seed_epoch
from fxquant.trials import TrialLog

FLOAT = "float"


class Scores:
    """What `evaluate` says of each choice; without one nothing is asked."""

    def __init__(self, sweep: Sweep, evaluate: Evaluate | None, seed: int, log: TrialLog) -> None:
        self._sweep, self._evaluate, self._seed, self._log = sweep, evaluate, seed, log

    @property
    def count(self) -> int:
        """How many choices there are."""
        return 0 if self._evaluate is None else 4 + 2 * len(self._sweep.units)

    def run(self) -> Iterator[None]:
        """Ask for every choice that is not known yet; yields after each."""
        if self._evaluate is None:
            return
        for name, on in ((FLOAT, frozenset()), *self._sweep.groups().items(), *self._sweep.choices()):
            if self._log.get(_key(name)) is None:
                self._log.put(_key(name), {"score": self._ask(self._evaluate, name, on)})
            yield

    def of(self, name: str) -> float | None:
        """The score of one choice; None without `evaluate`."""
        record = None if self._evaluate is None else self._log.get(_key(name))
        return None if record is None else float(record["score"])

    def _ask(self, evaluate: Evaluate, name: str, on: frozenset[FakeQuant]) -> float:
        self._sweep.route.switch(on)
        with _seeded(self._seed):
            return score_of(self._sweep.program, evaluate, "float", f"analyze: the score of '{name}'")


def _key(name: str) -> str:
    return f"evaluate {name}"


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random generators begin at `seed`, and go on afterwards where they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed_epoch(seed, 0)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
