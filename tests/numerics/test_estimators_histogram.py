"""Histogram: what it counts, and how it grows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.numerics.estimators.histogram import BINS, LARGEST_EXPONENT, SMALLEST_EXPONENT, Histogram

HUGE = torch.finfo(torch.float32).max

magnitudes = st.sampled_from([0.0, 1e-40, 1e-12, 1e-3, 0.7, 1.0, 3.0, 25.0, 1e4, 1e20, 1e38])
tensors = st.lists(
    st.tuples(magnitudes, st.integers(1, 40), st.integers(0, 1000)).map(
        lambda drawn: drawn[0] * torch.randn(drawn[1], generator=torch.Generator().manual_seed(drawn[2]))
    ),
    min_size=1,
    max_size=5,
)


def counted(parts: list[torch.Tensor]) -> Histogram:
    """A histogram of one encoding that has seen the parts in turn."""
    histogram = Histogram.empty(1, torch.device("cpu"))
    low, high = math.inf, -math.inf
    for part in parts:
        low, high = min(low, float(part.min())), max(high, float(part.max()))
        histogram.add(part[None], torch.tensor([low]), torch.tensor([high]))
    return histogram


def contents(histogram: Histogram, row: int = 0) -> dict[int, int]:
    """Index -> count of the bins that hold anything."""
    start = int(histogram.start[row])
    return {start + i: n for i, n in enumerate(histogram.counts[row].tolist()) if n}


def plainly_counted(values: list[float]) -> tuple[int, dict[int, int]]:
    """Exponent and contents, by the definition: the smallest power of three at which all of it fits."""
    low, high = min(0.0, *values), max(0.0, *values)
    exponent = SMALLEST_EXPONENT
    while round(high / 3.0**exponent) - round(low / 3.0**exponent) + 3 > BINS:
        exponent += 1
    found: dict[int, int] = {}
    for value in values:
        index = round(value / 3.0**exponent)
        found[index] = found.get(index, 0) + 1
    return exponent, found


@settings(max_examples=100, deadline=None)
@given(tensors)
def test_no_count_is_lost_however_it_grows(parts: list[torch.Tensor]) -> None:
    histogram = counted(parts)
    assert int(histogram.counts.sum()) == sum(part.numel() for part in parts)
    assert bool((histogram.counts >= 0).all())


@settings(max_examples=100, deadline=None)
@given(tensors, st.randoms(use_true_random=False))
def test_order_and_cuts_do_not_matter(parts: list[torch.Tensor], random: object) -> None:
    shuffled = list(parts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other, whole = counted(parts), counted(shuffled), counted([torch.cat(parts)])
    assert int(one.exponent) == int(other.exponent) == int(whole.exponent)
    assert contents(one) == contents(other) == contents(whole)


@settings(max_examples=100, deadline=None)
@given(tensors)
def test_counts_are_those_of_the_definition(parts: list[torch.Tensor]) -> None:
    histogram = counted(parts)
    assert (int(histogram.exponent), contents(histogram)) == plainly_counted(torch.cat(parts).tolist())


def test_rows_are_counted_as_each_would_be_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(5, 3000, generator=generator) * torch.tensor([0.0, 1e-3, 1.0, 50.0, 1e30])[:, None]
    histogram = Histogram.empty(5, torch.device("cpu"))
    for part in rows.split(1000, dim=1):
        seen = rows[:, : part.storage_offset() + 1000]
        histogram.add(part, seen.amin(dim=1), seen.amax(dim=1))
    for row, values in enumerate(rows):
        alone = counted(list(values.split(1000)))
        assert int(alone.exponent) == int(histogram.exponent[row])
        assert contents(alone) == contents(histogram, row)


@pytest.mark.parametrize("exponent", range(SMALLEST_EXPONENT, LARGEST_EXPONENT - 2, 3))
def test_values_halfway_between_the_outermost_bins_are_counted(exponent: int) -> None:
    """x * (1 / width) may round to the bin next to that of x / width."""
    for free in (1, 2, 3, 4):
        bins = BINS // 2 - free
        values = torch.tensor([bins + 0.5, 0.5 - bins, bins + 0.49999997], dtype=torch.float64) * 3.0**exponent
        row = values.to(torch.float32)
        for rows in (row[None], torch.stack([row, row * 3])):
            histogram = Histogram.empty(len(rows), torch.device("cpu"))
            histogram.add(rows, rows.amin(dim=1), rows.amax(dim=1))
            assert int(histogram.counts.sum()) == rows.numel()


def test_zeros_stay_apart_from_all_else_in_the_bin_of_zero() -> None:
    values = torch.cat([torch.zeros(1000), torch.linspace(0.05, 10.0, 500)])
    histogram = counted([values, values * 7, values * 400])
    assert contents(histogram)[0] >= 3000
    assert float(histogram.centres[0, -int(histogram.start)]) == 0.0


def test_a_chunk_boundary_loses_nothing() -> None:
    values = torch.randn(300_001, generator=torch.Generator().manual_seed(0))
    assert int(counted([values]).counts.sum()) == 300_001


@pytest.mark.parametrize(
    ("values", "exponent"),
    [([0.0], SMALLEST_EXPONENT), ([1e-40, -1e-40], SMALLEST_EXPONENT), ([HUGE, -HUGE], LARGEST_EXPONENT - 1)],
)
def test_ends_of_float32_fit(values: list[float], exponent: int) -> None:
    histogram = counted([torch.tensor(values)])
    assert int(histogram.exponent) <= LARGEST_EXPONENT and int(histogram.exponent) == plainly_counted(values)[0]
    assert abs(int(histogram.exponent) - exponent) <= 1
    assert int(histogram.counts.sum()) == len(values)


def test_width_is_the_smallest_that_fits_so_a_third_of_the_bins_or_more_are_in_range() -> None:
    for reach in torch.logspace(-6, 9, 60).tolist():
        histogram = counted([torch.tensor([-reach, reach])])
        spread = 2 * reach / float(histogram.width)
        assert BINS / 3 - 4 <= spread <= BINS
