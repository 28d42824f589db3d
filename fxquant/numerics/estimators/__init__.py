"""Range estimators, by the names that QuantSpec.estimator may say."""

from __future__ import annotations

from fxquant.numerics.estimators.base import Estimator, MinMax, MovingAverage, rows_of
from fxquant.numerics.estimators.distribution import (
    DistributionEstimator,
    Entropy,
    MeanSquaredError,
    Percentile,
    TfEnhanced,
)
from fxquant.spec import QuantSpec, parse_estimator

_ESTIMATORS: dict[str, type[Estimator]] = {
    "min-max": MinMax,
    "moving-average": MovingAverage,
    "percentile": Percentile,
    "mse": MeanSquaredError,
    "tf-enhanced": TfEnhanced,
    "entropy": Entropy,
}


def make_estimator(spec: QuantSpec, shape: tuple[int, ...] = ()) -> Estimator:
    """The estimator that a spec names, for encodings of `shape`."""
    name, number = parse_estimator(spec.estimator)
    return _ESTIMATORS[name](spec, shape, number)


__all__ = [
    "DistributionEstimator",
    "Entropy",
    "Estimator",
    "MeanSquaredError",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "TfEnhanced",
    "make_estimator",
    "rows_of",
]
