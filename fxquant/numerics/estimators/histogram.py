"""Histogram: counts of values in bins of equal width, one row of bins for each encoding; it grows and loses no count.

    width = 3^exponent                        index = rint(x / width)                       bin = index - start

Bins are centred on the multiples of the width, so that 0 is the centre of one. When a value falls outside, the width
becomes three times as wide, as often as needed: three whole bins become one, round(index / 3), and none is split.
The width is always the smallest power of three at which [min(low, 0), max(high, 0)] fits, so that the histogram of a
set of values does not depend on how they were cut into tensors or ordered (but for values halfway between two bins).

The cost of an outlier: after growth a third of the bins or more lie between the extremes, whatever they are. One value
at 1000 sigma leaves a normal distribution some ten bins, one at 100 000 sigma a single one: finer structure is gone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BINS = 4096
SMALLEST_EXPONENT = -45  # 3^-45 < 2^-70: finer than the smallest scale of a grid, and a normal float32
LARGEST_EXPONENT = 75  # 3^75 * BINS > the largest float32, to either side
_MOST_GROWTH = 12  # 3^12 > 2 * BINS: further growth puts every bin into bin 0 all the same
_MARGIN = 1  # bins kept free at either end, because x * (1 / width) may round otherwise than x / width
_CHUNK = 1 << 17  # values counted at a time: the scratch stays in the cache
# f(_MAGIC + v) has rint(v) in its low bits for |v| < 2^22: rounding and conversion to int32 in one addition.
_MAGIC = 1.5 * 2.0**23
_MAGIC_BITS = 0x4B400000


@dataclass(frozen=True, eq=False)
class Histogram:
    """Views of an estimator's buffers, edited in place.

    Arguments:
        counts: int64 [encodings, BINS].
        exponent: int64 [encodings]: bins are 3^exponent wide.
        start: int64 [encodings]: the index of bin 0.
    """

    counts: torch.Tensor
    exponent: torch.Tensor
    start: torch.Tensor

    @staticmethod
    def empty(encodings: int, device: torch.device) -> Histogram:
        """Nothing counted, in the narrowest bins."""
        return Histogram(
            torch.zeros(encodings, BINS, dtype=torch.int64, device=device),
            torch.full((encodings,), SMALLEST_EXPONENT, dtype=torch.int64, device=device),
            torch.full((encodings,), -BINS // 2, dtype=torch.int64, device=device),
        )

    @property
    def width(self) -> torch.Tensor:
        """Width of the bins, float64 [encodings]."""
        return torch.pow(3.0, self.exponent.double())

    @property
    def centres(self) -> torch.Tensor:
        """Centres of the bins, float64 [encodings, BINS]."""
        return (self.start[:, None] + self._bins()) * self.width[:, None]

    def add(self, rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        """Count the values of `rows` (float32 [encodings, elements], finite).

        Arguments:
            low, high: extremes of all that was counted, `rows` included (float32 [encodings]).
        """
        self.cover(low, high)
        if len(rows) == 1:
            self._count_row(rows[0])
        else:
            self._count_rows(rows)

    def cover(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Widen and move the bins until [min(low, 0), max(high, 0)] fits."""
        low64, high64 = low.double().clamp(max=0.0), high.double().clamp(min=0.0)
        first, last = _indices(low64, high64, self.width)
        if bool(((first >= self.start) & (last < self.start + BINS)).all()):
            return
        exponents = torch.arange(SMALLEST_EXPONENT, LARGEST_EXPONENT + 1, device=low.device)
        firsts, lasts = _indices(low64[:, None], high64[:, None], torch.pow(3.0, exponents.double()))
        # The smallest that fits; never smaller than now, as the extremes only widen.
        exponent = exponents[(lasts - firsts < BINS).to(torch.uint8).argmax(dim=1)]
        first, last = _indices(low64, high64, torch.pow(3.0, exponent.double()))
        self._move(exponent, (first + last + 1 - BINS).div(2, rounding_mode="floor"))

    def _move(self, exponent: torch.Tensor, start: torch.Tensor) -> None:
        """Put the counts into bins of other exponents (as large or larger) and starts."""
        merged = torch.pow(3, (exponent - self.exponent).clamp(max=_MOST_GROWTH))[:, None]
        index = self.start[:, None] + self._bins()
        index = (index + merged.div(2, rounding_mode="floor")).div(merged, rounding_mode="floor")
        bins = (index - start[:, None]).clamp(0, BINS - 1)  # those clamped are empty: what was counted is covered
        self.counts.copy_(torch.zeros_like(self.counts).scatter_add_(1, bins, self.counts))
        self.exponent.copy_(exponent)
        self.start.copy_(start)

    def _count_row(self, row: torch.Tensor) -> None:
        magic = torch.tensor(_MAGIC, device=row.device)
        scratch = torch.empty(min(len(row), _CHUNK), device=row.device)
        inverse, offset = float(1.0 / self.width[0]), _MAGIC_BITS + int(self.start[0])
        for first in range(0, len(row), _CHUNK):
            part = row[first : first + _CHUNK]
            rounded = torch.add(magic, part, alpha=inverse, out=scratch[: len(part)])
            self.counts[0] += torch.bincount(rounded.view(torch.int32).sub_(offset), minlength=BINS)

    def _count_rows(self, rows: torch.Tensor) -> None:
        inverse = (1.0 / self.width).to(torch.float32)[:, None]
        one = torch.ones((), dtype=torch.int64, device=rows.device)
        columns = max(1, _CHUNK // len(rows))
        for first in range(0, rows.shape[1], columns):
            bins = torch.round(rows[:, first : first + columns] * inverse).to(torch.int64) - self.start[:, None]
            self.counts.scatter_add_(1, bins, one.expand_as(bins))

    def _bins(self) -> torch.Tensor:
        return torch.arange(BINS, device=self.counts.device)


def _indices(low: torch.Tensor, high: torch.Tensor, width: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last index that [low, high] needs (int64; unusable where they exceed int64: no such width is taken)."""
    return (
        torch.round(low / width).clamp(-(2.0**52), 2.0**52).to(torch.int64) - _MARGIN,
        torch.round(high / width).clamp(-(2.0**52), 2.0**52).to(torch.int64) + _MARGIN,
    )
