"""What quantization did to a program's outputs: the error's energy against the reference's, and top-1 agreement.

    noise = mean over the outputs of   sum of (output - reference)^2 / sum of reference^2        over all batches
    SQNR  = -10 log10(noise)                                                                     in dB

So a detector's large features do not drown its boxes. Of several outputs one that is 0 throughout counts as noise 1
where it is changed.

Integer and boolean outputs are left out, and so are elements that the reference has as infinite (masked logits).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from fxquant.errors import FxquantError


@dataclass(frozen=True)
class Noise:
    """Sums over elements and rows.

    Arguments:
        energies: of the error, for each float output.
        agreeing: rows whose largest output is the reference's.
    """

    energies: tuple[float, ...] = ()
    agreeing: int = 0

    def __add__(self, other: Noise) -> Noise:
        return Noise(added(self.energies, other.energies), self.agreeing + other.agreeing)


class Reference:
    """The outputs of the float program on one batch.

    `energies`: of each float output.
    `rows`: of a single output [batch, classes], which top-1 agreement is counted on; 0 of all other outputs.
    Raises FxquantError for outputs without a float tensor, and for NaN.
    """

    def __init__(self, outputs: Sequence[Any], batch: int) -> None:
        self._places = [place for place, value in enumerate(outputs) if _is_float(value)]
        self._values = [outputs[place] for place in self._places]
        if not self._values:
            raise FxquantError("analyze: the program's outputs", expected="a tensor of floats", got="none")
        if any(bool(torch.isnan(value).any()) for value in self._values):
            raise FxquantError(
                f"analyze: the float program's output is NaN in batch {batch}", remedy="Check that batch and the model."
            )
        self.energies = tuple(energy_of(_without_inf(value)) for value in self._values)
        single = self._values[0]
        self.rows = single.shape[0] if len(outputs) == 1 and single.ndim == 2 and single.shape[1] > 1 else 0

    def noise(self, outputs: Sequence[Any]) -> Noise:
        """Compare the outputs of another run."""
        energies = []
        for place, value in zip(self._places, self._values, strict=True):
            difference = outputs[place] - value
            energy = energy_of(torch.where(torch.isfinite(value), difference, torch.zeros_like(difference)))
            energies.append(math.inf if math.isnan(energy) else energy)
        agreeing = 0
        if self.rows:
            agreeing = int((outputs[self._places[0]].argmax(1) == self._values[0].argmax(1)).sum())
        return Noise(tuple(energies), agreeing)


def energy_of(x: torch.Tensor) -> float:
    """The sum of squares, in float64."""
    return float(torch.linalg.vector_norm(x.detach(), dtype=torch.float64)) ** 2 if x.numel() else 0.0


def added(one: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    """The sum, output by output; what has none yet is 0."""
    return tuple(x + y for x, y in zip_longest(one, other, fillvalue=0.0))


def outputs_sqnr_db(signals: Sequence[float], noises: Sequence[float]) -> float:
    """The SQNR over all outputs of the module's docstring; that of a single one is its own."""
    if not any(signals):
        return sqnr_db(0.0, math.fsum(noises))
    ratios = [noise / signal if signal else float(noise > 0) for signal, noise in zip(signals, noises, strict=True)]
    return sqnr_db(1.0, math.fsum(ratios) / len(ratios))


def sqnr_db(signal: float, noise: float) -> float:
    """Signal over noise in dB: inf where nothing differs, -inf where there is no signal."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if 0 < signal and noise < math.inf else -math.inf


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _without_inf(value: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.isfinite(value), value, torch.zeros_like(value))
