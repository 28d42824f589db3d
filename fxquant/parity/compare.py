"""Differences counted batch by batch: nothing of a batch is kept but counts and the first difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fxquant.numerics.runtime import Array


@dataclass(frozen=True)
class Difference:
    """What differs between simulation and onnxruntime at one place.

    Arguments:
        compared, differing: how many numbers were compared, and how many differ.
        worst: the largest difference: in steps for codes, in real units for a float output.
        largest: the largest magnitude that onnxruntime gave, of the same unit.
        first: the first difference in words; "" if there is none.
    """

    compared: int = 0
    differing: int = 0
    worst: float = 0.0
    largest: float = 0.0
    first: str = ""

    @property
    def fraction(self) -> float:
        """Differing over compared; 0 if nothing was compared."""
        return self.differing / self.compared if self.compared else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {**vars(self), "fraction": self.fraction}


class Tally:
    """Adds up differences over batches."""

    def __init__(self) -> None:
        self._total = Difference()

    @property
    def difference(self) -> Difference:
        """All that was added."""
        return self._total

    def add(self, new: Difference) -> None:
        """Count what one batch showed."""
        old = self._total
        self._total = Difference(
            old.compared + new.compared,
            old.differing + new.differing,
            max(old.worst, new.worst),
            max(old.largest, new.largest),
            old.first or new.first,
        )


def compare_codes(simulated: Array, runtime: Array, steps: int, batch: int) -> Difference:
    """Compare integer codes of one tensor.

    Arguments:
        steps: highest minus lowest code; what a code outside the grid (a NaN was quantized) counts as.
    """
    if simulated.shape != runtime.shape:
        return _other_shape(simulated, runtime, float(steps), batch)
    distance = np.abs(simulated.astype(np.int64) - runtime.astype(np.int64))
    differing = int(np.count_nonzero(distance))
    if not differing:
        return Difference(distance.size)
    worst = float(min(int(distance.max()), steps))
    return Difference(distance.size, differing, worst, first=_first(distance != 0, simulated, runtime, batch))


def compare_values(simulated: Array, runtime: Array, batch: int) -> Difference:
    """Compare real values bit for bit; NaN equals NaN, and a NaN or infinity on one side alone is infinitely far."""
    if simulated.shape != runtime.shape:
        return _other_shape(simulated, runtime, float("inf"), batch)
    ours, theirs = simulated.astype(np.float64), runtime.astype(np.float64)
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    finite = np.isfinite(theirs)
    largest = float(np.abs(theirs[finite]).max()) if finite.any() else 0.0
    differing = int(same.size - np.count_nonzero(same))
    if not differing:
        return Difference(same.size, largest=largest)
    distance = np.abs(ours[~same] - theirs[~same])
    worst = float(np.where(np.isnan(distance), np.inf, distance).max())
    return Difference(same.size, differing, worst, largest, _first(~same, simulated, runtime, batch))


def _other_shape(simulated: Array, runtime: Array, worst: float, batch: int) -> Difference:
    first = f"batch {batch}: shape {list(simulated.shape)}, onnxruntime has {list(runtime.shape)}"
    return Difference(simulated.size, simulated.size, worst, first=first)


def _first(differs: Array, simulated: Array, runtime: Array, batch: int) -> str:
    index = tuple(int(i) for i in np.argwhere(differs)[0])
    return f"batch {batch} at {list(index)}: {simulated[index]}, onnxruntime has {runtime[index]}"
