"""Estimators find the ranges that plain loops over the same candidates and bins find (range_references)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fxquant.numerics.estimators import make_estimator, rows_of
from fxquant.numerics.estimators.distribution import DistributionEstimator
from fxquant.numerics.estimators.entropy import divergences
from fxquant.numerics.estimators.histogram import BINS
from fxquant.numerics.estimators.search import Samples
from fxquant.numerics.grids import grid_for_range
from fxquant.spec import Granularity, Limits, QuantSpec
from tests.numerics import range_references as references
from tests.numerics.range_references import Candidate, Seen

ESTIMATORS = ("percentile(99.9)", "percentile(97)", "mse", "tf-enhanced", "tf-enhanced(20)", "entropy")
KINDS = {
    "asymmetric": QuantSpec(),
    "signed-asymmetric": QuantSpec(signed=True),
    "symmetric": QuantSpec(signed=True, symmetric=True),
    "strict": QuantSpec(signed=True, symmetric=True, strict=True),
    "unsigned-symmetric": QuantSpec(symmetric=True),
    "capped": QuantSpec(limits=Limits(-1.0, 2.5)),
    "relu6": QuantSpec(limits=Limits(0.0, 6.0, zero_point=0)),
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(x: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    out.view(-1)[:2] = torch.tensor([25.0, -14.0])
    return out


DATA = {
    "outliers": with_outliers(noise(20_000, seed=1)),
    "relu": with_outliers(noise(20_000, seed=2)).relu(),
    "negative": -with_outliers(noise(20_000, seed=3)).relu(),
    "skewed": noise(20_000, seed=4).exp() - 0.2,
}


def expected(seen: Seen, spec: QuantSpec) -> Candidate:
    name, _, rest = spec.estimator.partition("(")
    number = float(rest.rstrip(")")) if rest else 3.0
    if name == "mse":
        return references.mse(seen, spec)
    if name == "entropy":
        return references.entropy(seen, spec)
    find = references.tf_enhanced if name == "tf-enhanced" else references.percentile
    return find(seen, spec, number)


def price(candidate: Candidate, seen: Seen, spec: QuantSpec) -> float:
    if spec.estimator == "entropy":
        return references.divergence(candidate, seen, spec)
    name, _, rest = spec.estimator.partition("(")
    gamma = float(rest.rstrip(")")) if rest else 3.0 if name == "tf-enhanced" else 1.0
    return references.error(candidate, seen, spec, gamma)


def require_as_found(found: Candidate, seen: Seen, spec: QuantSpec) -> None:
    """The reference's range, or another that costs the same to 9 digits."""
    wanted = references.float32(expected(seen, spec))
    if found == pytest.approx(wanted, rel=1e-6, abs=1e-12):
        return
    assert not spec.estimator.startswith("percentile"), (found, wanted)
    cost, least = price(found, seen, spec), price(wanted, seen, spec)
    assert cost == pytest.approx(least, rel=1e-9, abs=1e-9), (found, wanted)


def bins_of(estimator: DistributionEstimator, row: int) -> Seen:
    """What an estimator saw, from its buffers."""
    width = 3.0 ** int(estimator.exponent[row])
    mass = estimator.counts[row].numpy().astype(np.float64)
    points = (int(estimator.start[row]) + np.arange(BINS)) * width
    low, high = float(estimator.low.flatten()[row]), float(estimator.high.flatten()[row])
    return Seen(points, mass, low, high, width)


def observed(spec: QuantSpec, shape: tuple[int, ...], parts: list[torch.Tensor]) -> DistributionEstimator:
    estimator = make_estimator(spec, shape)
    assert isinstance(estimator, DistributionEstimator)
    for part in parts:
        estimator.observe(part)
    return estimator


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_activation_range_is_the_references(estimator: str, kind: str, bits: int) -> None:
    spec = replace(KINDS[kind], bits=bits, estimator=estimator)
    turn = (list(KINDS).index(kind) + bits.bit_length()) % 2
    for data in list(DATA.values())[turn::2]:
        found = observed(spec, (), list(data.split(7_000)))
        low, high = found.range()
        require_as_found((float(low), float(high)), bins_of(found, 0), spec)


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric", "relu6"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_activation_ranges_by_channel_are_the_references(estimator: str, kind: str) -> None:
    spec = replace(KINDS[kind], estimator=estimator, granularity=Granularity(1))
    x = torch.stack([part[:15_000] * (10.0**row) for row, part in enumerate(DATA.values())]).view(4, 10, 1500)
    found = observed(spec, (4,), list(x.movedim(0, 1).split(4)))
    low, high = found.range()
    for row in range(4):
        require_as_found((float(low[row]), float(high[row])), bins_of(found, row), spec)


@pytest.mark.parametrize("granularity", [Granularity(), Granularity(0), Granularity(1), Granularity(1, 16)])
@pytest.mark.parametrize("kind", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ranges_of_short_rows_of_a_weight_are_the_references(
    estimator: str, kind: str, granularity: Granularity
) -> None:
    spec = replace(KINDS[kind], bits=4, estimator=estimator, granularity=granularity)
    weight = with_outliers(noise(6, 32, 2, seed=5))
    weight[3], weight[4], weight[5] = 0.0, weight[4].abs(), 0.25
    low, high = make_estimator(spec, granularity.encoding_shape(weight.shape)).range_of(weight)
    for row, values in enumerate(rows_of(weight, granularity)):
        if estimator == "entropy":
            seen = bins_of(observed(replace(spec, granularity=Granularity()), (), [values]), 0)
        else:
            points = np.sort(values.double().numpy())
            seen = Seen(points, np.ones_like(points), points[0], points[-1], 0.0)
        require_as_found((float(low.flatten()[row]), float(high.flatten()[row])), seen, spec)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_long_rows_of_a_weight_are_searched_by_histogram(estimator: str) -> None:
    spec = replace(KINDS["symmetric"], estimator=estimator, granularity=Granularity(0))
    weight = with_outliers(noise(3, BINS + 1, seed=6))
    low, high = make_estimator(spec, (3,)).range_of(weight)
    alone = [observed(replace(spec, granularity=Granularity()), (), [row]) for row in weight]
    for row, found in enumerate(alone):
        require_as_found((float(low[row]), float(high[row])), bins_of(found, 0), spec)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["asymmetric", "signed-asymmetric", "symmetric"])
def test_divergence_of_sparse_bins_and_halfway_points_is_the_references(kind: str, seed: int) -> None:
    """Few occupied bins: ranges that hold a single one, with mass to both sides; points midway between two codes."""
    spec = replace(KINDS[kind], bits=4, estimator="entropy")
    rng = np.random.default_rng(seed)
    points = np.arange(-32, 33) / 8.0
    mass = np.where(rng.random(65) < 0.2, rng.integers(1, 50, 65), 0).astype(np.float64)
    mass[[0, -1]] = 5.0
    candidates = [(-a / 16, b / 16) for a, b in ((15 * k, 15 * k) for k in (1, 2, 4)) for b in (b, b / 2, b / 8)]
    low, high = (torch.tensor([[pair[end] for pair in candidates]], dtype=torch.float64) for end in (0, 1))
    ends = torch.tensor([-4.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)
    samples = Samples(torch.from_numpy(points)[None], torch.from_numpy(mass)[None], *ends, torch.tensor([1 / 16]))
    scale, zero_point = grid_for_range(low, high, spec)
    found = divergences(samples, scale.double(), zero_point, spec)[0].tolist()
    seen = Seen(points, mass, -4.0, 4.0, 1 / 8)
    wanted = [references.divergence(candidate, seen, spec) for candidate in candidates]
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9)
