"""Estimators that choose a range from a distribution: what all values looked like, not the extremes alone.

What each of them does with inputs at the edge:

    empty          says nothing
    all zero       [0, 0], as min-max; a constant c or a single element: [min(c, 0), max(c, 0)], on which c is exact
    huge (1e38)    as any other: bins grow as wide as 3^75
    denormal       narrower than the narrowest bin (3^-45), hence counted as zeros; the range is the observed one
    NaN, Inf       neither they nor the rest of their tensor is counted, the extremes become NaN or Inf, and the range
                   is the extremes until `reset`: fxquant.calibrate refuses the value and names the batch
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fxquant.numerics.estimators.base import Estimator, extremes, rows_of
from fxquant.numerics.estimators.entropy import CANDIDATES, entropy_range
from fxquant.numerics.estimators.histogram import BINS, SMALLEST_EXPONENT, Histogram
from fxquant.numerics.estimators.search import (
    MOST_CANDIDATES,
    Ranges,
    Samples,
    blocks,
    mean_squared_error_range,
    observed_range,
    tf_enhanced_range,
)
from fxquant.spec import QuantSpec


class DistributionEstimator(Estimator):
    """Base of the estimators that keep a histogram for each encoding, and the extremes.

    Buffers: `counts`, `exponent`, `start`: a histogram.Histogram. `counts` has no bins before something is observed:
    the estimator of a weight, which `range_of` looks at by itself, has none. It keeps the tensor that it searched last,
    so that an unchanged weight is not searched again: a second copy of the weight in memory.
    """

    counts: torch.Tensor
    exponent: torch.Tensor
    start: torch.Tensor

    candidates = 1  # ranges that `choose` tries at a time
    takes_values = True  # whether `choose` can do with values, of reach 0, in place of bins
    _is_apart = False  # whether `counts` says less than all peers counted

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...] = (), number: float | None = None) -> None:
        super().__init__(spec, shape, number)
        encodings = math.prod(shape)
        self.register_buffer("counts", torch.zeros(encodings, 0, dtype=torch.int64))
        self.register_buffer("exponent", torch.full((encodings,), SMALLEST_EXPONENT, dtype=torch.int64))
        self.register_buffer("start", torch.zeros(encodings, dtype=torch.int64))
        self._last_search: _Search | None = None

    def reset(self) -> None:
        """Forget everything observed."""
        super().reset()
        self._is_apart = False
        self.counts = self.counts.new_zeros(len(self.counts), 0)

    def update(self, rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        """Widen the extremes and count the values."""
        self._widen(low, high)
        if self._is_finite:
            self._part()
            self._histogram().add(rows, self.low.flatten(), self.high.flatten())

    def range(self) -> Ranges:
        """The range chosen from all that was observed."""
        if not self._is_finite:
            return self.low, self.high
        self._join()
        return self._chosen(self._histogram(), self.low.flatten(), self.high.flatten())

    def _part(self) -> None:
        """Count apart from the peers; the first keeps what was counted before."""
        if self.peers is None or self._is_apart:
            return
        self._is_apart = True
        if self.peers.rank:
            self.counts.zero_()

    def _join(self) -> None:
        """Add the peers' counts. Bins follow from the extremes, which are those of all: all have the same."""
        if self.peers is None or not self._is_apart:
            return
        self._is_apart = False
        self.counts = self.peers.total(self.counts)

    def range_of(self, x: torch.Tensor) -> Ranges:
        """The range of `x` by itself. The last tensor is kept: as long as the values are the same, so is the range."""
        self.reset()
        if x.numel() == 0:
            return self.low, self.high
        rows = rows_of(x.detach().to(torch.float32), self.spec.granularity)
        low, high = extremes(rows)
        self._widen(low.view_as(self.low), high.view_as(self.high))
        if not self._is_finite:
            return self.low, self.high
        if self._last_search is None or not self._last_search.is_of(x):
            self._last_search = _Search(x.detach().clone(), self._range_of_rows(rows, low, high))
        return self._last_search.range

    def choose(self, samples: Samples) -> Ranges:
        """Low and high (float64 [encodings]) of the range, for a block of encodings."""
        raise AssertionError("abstract")

    @property
    def _is_finite(self) -> bool:
        return bool((torch.isfinite(self.low) & torch.isfinite(self.high)).all())

    def _widen(self, low: torch.Tensor, high: torch.Tensor) -> None:
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))

    def _histogram(self) -> Histogram:
        """The buffers as a histogram, its bins allocated."""
        if not self.counts.shape[1]:
            empty = Histogram.empty(len(self.counts), self.counts.device)
            self.counts = empty.counts
            self.exponent.copy_(empty.exponent)
            self.start.copy_(empty.start)
        return Histogram(self.counts, self.exponent, self.start)

    def _chosen(self, histogram: Histogram, low: torch.Tensor, high: torch.Tensor) -> Ranges:
        """`choose` on the bins that hold anything, as many encodings at a time as memory allows."""
        used = histogram.counts.any(dim=0).nonzero()[:, 0]
        found = []
        for rows in blocks(len(low), self.candidates * len(used)):
            part = Histogram(histogram.counts[rows], histogram.exponent[rows], histogram.start[rows])
            ends = observed_range(low[rows], high[rows], self.spec)
            mass = part.counts[:, used].double()
            found.append(self.choose(Samples(part.centres[:, used], mass, *ends, part.width / 2)))
        return self._in_shape(found)

    def _range_of_rows(self, rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> Ranges:
        """Short rows are searched value by value, long ones by a histogram."""
        if not self.takes_values or rows.shape[1] > BINS:
            histograms = []
            for part in blocks(len(rows), BINS):
                histogram = Histogram.empty(len(rows[part]), rows.device)
                histogram.add(rows[part], low[part], high[part])
                histograms.append(self._chosen(histogram, low[part], high[part]))
            return self._in_shape([(a.flatten(), b.flatten()) for a, b in histograms])
        found = []
        for part in blocks(len(rows), self.candidates * rows.shape[1]):
            points = rows[part].double().sort(dim=1).values
            ends = observed_range(low[part], high[part], self.spec)
            found.append(self.choose(Samples(points, torch.ones_like(points), *ends, torch.zeros_like(ends[0]))))
        return self._in_shape(found)

    def _in_shape(self, found: list[Ranges]) -> Ranges:
        """Blocks of encodings, joined: float32, of the encoding's shape if they are all of them."""
        low, high = (torch.cat([part[end] for part in found]).to(torch.float32) for end in (0, 1))
        return (low.view_as(self.low), high.view_as(self.high)) if low.numel() == self.low.numel() else (low, high)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take over a histogram whether or not this estimator has allocated one."""
        loaded = state_dict.get(f"{prefix}counts")
        if isinstance(loaded, torch.Tensor) and loaded.shape in ((len(self.counts), 0), (len(self.counts), BINS)):
            self.counts = self.counts.new_zeros(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


@dataclass(frozen=True, eq=False)
class _Search:
    """A tensor that was searched, and its range. Deep copies share it; pickles have None in its place."""

    tensor: torch.Tensor
    range: Ranges

    def is_of(self, x: torch.Tensor) -> bool:
        """Whether `x` has the same values."""
        kept = self.tensor
        return (kept.device, kept.dtype) == (x.device, x.dtype) and torch.equal(kept, x)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Search:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


_PART_OF_A_COUNT = 1e-6  # more than a product of count and share is off


class MeanSquaredError(DistributionEstimator):
    """The range of the smallest mean squared quantization error (search.mean_squared_error_range)."""

    candidates = MOST_CANDIDATES

    def choose(self, samples: Samples) -> Ranges:
        """Coarse, then fine."""
        return mean_squared_error_range(samples, self.spec)


class TfEnhanced(DistributionEstimator):
    """AIMET's TF-Enhanced: error by rounding, plus `number` times the error by clipping (search.tf_enhanced_range)."""

    candidates = MOST_CANDIDATES

    def choose(self, samples: Samples) -> Ranges:
        """Try all steps and offsets."""
        assert self.number is not None
        return tf_enhanced_range(samples, self.spec, self.number)


class Percentile(DistributionEstimator):
    """The values that a share p of all lie below (high), and above (low): p = `number` in %, 0 included in the range.

    They are the outer edges of the bins in which the p-th part of the values, counted from the other end, is reached
    (the value itself where a weight's row is short), but never beyond the observed range: p = 100 is min-max.
    """

    def choose(self, samples: Samples) -> Ranges:
        """Look up both ends in the running count."""
        assert self.number is not None
        running = samples.mass.cumsum(dim=1)
        share, last = running[:, -1:] * (self.number / 100.0), running.shape[1] - 1
        high = torch.searchsorted(running, share - _PART_OF_A_COUNT).clamp(max=last)
        low = torch.searchsorted(running, running[:, -1:] - share + _PART_OF_A_COUNT, right=True).clamp(max=last)
        lows = samples.points.gather(1, low)[:, 0] - samples.reach
        highs = samples.points.gather(1, high)[:, 0] + samples.reach
        return torch.maximum(lows, samples.low).clamp(max=0.0), torch.minimum(highs, samples.high).clamp(min=0.0)


class Entropy(DistributionEstimator):
    """The range that loses least information (entropy.entropy_range)."""

    candidates = CANDIDATES
    takes_values = False

    def choose(self, samples: Samples) -> Ranges:
        """Try all thresholds."""
        return entropy_range(samples, self.spec)
