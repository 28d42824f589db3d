"""Histograms of several processes: what was counted before they came together is counted once."""

from __future__ import annotations

import pytest
import torch

from fxquant.numerics.estimators import make_estimator
from fxquant.numerics.estimators.distribution import DistributionEstimator
from fxquant.numerics.peers import Peers
from fxquant.spec import QuantSpec


class Alike(Peers):
    """A process of two, whose peer holds the same extremes."""

    def __init__(self, rank: int) -> None:
        self.rank, self.count = rank, 2

    def extremes(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One's own."""
        return low, high


@pytest.mark.parametrize(("rank", "kept"), [(0, 50), (1, 0)])
def test_only_the_first_process_keeps_what_all_had_counted(rank: int, kept: int) -> None:
    estimator = make_estimator(QuantSpec(bits=8, signed=False, symmetric=False, estimator="percentile"), ())
    assert isinstance(estimator, DistributionEstimator)
    estimator.observe(torch.linspace(0.0, 1.0, 50))
    estimator.peers = Alike(rank)
    for total in (20, 40):
        estimator.observe(torch.linspace(0.0, 1.0, 20))
        assert int(estimator.counts.sum()) == kept + total
