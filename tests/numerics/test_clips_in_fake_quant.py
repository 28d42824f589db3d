"""A FakeQuant takes a clip over only where its grid stands: not one that follows, or moves with, what it is given."""

from __future__ import annotations

import math

import pytest
import torch

from fxquant.numerics.fake_quant import FakeQuant
from fxquant.spec import QuantSpec

RELU = (0.0, math.inf)


def calibrated(spec: QuantSpec, high: float, follows: bool) -> FakeQuant:
    """On the grid of [0, high], and engaged."""
    quantizer = FakeQuant(spec, follows=follows)
    quantizer.estimator.observe(torch.tensor([0.0, high]))
    quantizer.compute_encoding()
    quantizer.engage()
    return quantizer.train()


@pytest.mark.parametrize("training, follows", [("moving-average(0.5)", False), ("static", True)])
def test_grid_is_that_of_clipped_values(training: str, follows: bool) -> None:
    spec = QuantSpec(bits=8, signed=False, symmetric=False, training=training)
    inside, behind = calibrated(spec, 1.0, follows), calibrated(spec, 1.0, follows)
    x = torch.tensor([-40.0, -1.0, 0.3, 2.0, 7.0])
    for _ in range(3):
        assert torch.equal(inside(x, clip=RELU), behind(torch.relu(x)))
        assert torch.equal(inside.scale, behind.scale) and torch.equal(inside.zero_point, behind.zero_point)
