"""Range estimators: what they say of inputs at the edge, what always holds, and what they keep."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.numerics.estimators import DistributionEstimator, Estimator, make_estimator
from fxquant.numerics.estimators import distribution as distribution_module
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.spec import ESTIMATORS, Granularity, QuantSpec

SEARCHING = ("percentile", "mse", "tf-enhanced", "entropy")
BY_ERROR = ("mse", "tf-enhanced")


def range_of(estimator: str | QuantSpec, *parts: torch.Tensor) -> tuple[float, float]:
    """The range after the parts, one encoding."""
    found = make_estimator(QuantSpec(estimator=estimator) if isinstance(estimator, str) else estimator)
    for part in parts:
        found.observe(part)
    low, high = found.range()
    assert low.dtype == high.dtype == torch.float32 and low.shape == ()
    return float(low), float(high)


def normal(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_empty_tensor_says_nothing(estimator: str) -> None:
    found = make_estimator(QuantSpec(estimator=estimator))
    found.observe(torch.empty(0, 3))
    assert not found.has_range and found.range()[0] == math.inf
    found.observe(torch.tensor([-1.0, 2.0]))
    found.observe(torch.empty(0, 3))
    assert (float(found.low), float(found.high)) == (-1.0, 2.0)


@pytest.mark.parametrize("value", [5.0, -0.3, 0.0, 1e38, -3.4e38, 1e-40, 1e-30])
@pytest.mark.parametrize("count", [1, 5000])
@pytest.mark.parametrize("estimator", SEARCHING)
def test_a_constant_or_single_element_gets_the_range_from_zero_to_it(estimator: str, count: int, value: float) -> None:
    low, high = range_of(estimator, torch.full((count,), value))
    value = float(torch.tensor(value))
    assert (low, high) == (min(value, 0.0), max(value, 0.0))


@pytest.mark.parametrize("estimator", SEARCHING)
@pytest.mark.parametrize("factor", [1e-45, 1e-38, 1e-25, 1e30, 6e37])
def test_huge_and_denormal_numbers_give_ranges_within_their_extremes(estimator: str, factor: float) -> None:
    x = normal(2000) * factor
    low, high = range_of(estimator, x, x)
    assert float(x.min()) <= low <= 0.0 <= high <= float(x.max())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_values_that_are_not_finite_show_in_the_extremes_and_spoil_no_counts(estimator: str, bad: float) -> None:
    found = make_estimator(QuantSpec(estimator=estimator))
    found.observe(normal(100))
    found.observe(torch.tensor([1.0, bad, 1e30]))
    found.observe(normal(100))
    assert not all(math.isfinite(float(end)) for end in found.range())
    if isinstance(found, DistributionEstimator):
        assert int(found.counts.sum()) == 100
    found.reset()
    found.observe(normal(100))
    assert all(math.isfinite(float(end)) for end in found.range())


@pytest.mark.parametrize("estimator", SEARCHING)
def test_what_was_observed_before_a_reset_does_not_count(estimator: str) -> None:
    found = make_estimator(QuantSpec(4, estimator=estimator))
    found.observe(normal(4000) * 20)
    found.reset()
    found.observe(normal(3000))
    assert isinstance(found, DistributionEstimator) and int(found.counts.sum()) == 3000
    assert tuple(map(float, found.range())) == range_of(QuantSpec(4, estimator=estimator), normal(3000))


@pytest.mark.parametrize("estimator", SEARCHING)
def test_a_first_tensor_of_zeros_is_kept_as_the_histogram_grows(estimator: str) -> None:
    found = make_estimator(QuantSpec(estimator=estimator))
    for part in (torch.zeros(300), normal(500), normal(500) * 1e6):
        found.observe(part)
    assert isinstance(found, DistributionEstimator) and int(found.counts.sum()) == 1300


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("estimator", SEARCHING)
def test_the_range_of_denormal_numbers_is_the_observed_one(estimator: str, bits: int) -> None:
    x = torch.tensor([-1e-41, 1e-40] * 200)
    spec = QuantSpec(bits, estimator=estimator)
    assert range_of(spec, x) == (float(x.min()), float(x.max()))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("lowest", [-0.001, -0.1, -0.3])
def test_tf_enhanced_never_costs_more_than_the_observed_range(lowest: float, bits: int) -> None:
    """[-0.1, 1] at 2 bits: with offset and step rounded as AIMET's candidates are, none of them is that range."""
    x = torch.linspace(lowest, 1.0, 3000)
    costs = {}
    for name in ("tf-enhanced(1000)", "min-max"):
        module = FakeQuant(QuantSpec(bits, estimator=name))
        module(x)
        module.compute_encoding()
        module.mode = Mode.FAKE
        error = (module(x) - x).double()
        clipped = error.abs() > 0.51 * module.scale
        costs[name] = float((error.square() * torch.where(clipped, 1000.0, 1.0)).sum())
    assert costs["tf-enhanced(1000)"] <= costs["min-max"] * 1.001  # bins are not values


def test_percentile_is_the_outer_edge_of_its_bin_though_no_value_is_below_the_bins_centre() -> None:
    found = make_estimator(QuantSpec(estimator="percentile(50)"))
    for value in torch.linspace(1.0, 1.5, 7):
        found.reset()
        found.observe(torch.tensor([float(value)] * 900 + [2.0] * 100))
        assert isinstance(found, DistributionEstimator)
        width = 3.0 ** int(found.exponent)
        assert float(found.range()[1]) == pytest.approx((round(float(value) / width) + 0.5) * width, rel=1e-6)


def test_entropy_leaves_the_bin_of_zero_out_though_all_values_are_positive() -> None:
    x = torch.cat([torch.full((50_000,), 1e-6), normal(20_000).abs()])
    x[-1] = 30.0
    spec = QuantSpec(4, estimator="entropy")
    assert range_of(spec, x) == range_of(spec, x, torch.zeros(1)) == range_of(spec, x.where(x > 1e-6, 0.0))


def test_entropy_keeps_the_observed_range_of_no_more_values_than_steps() -> None:
    spec = QuantSpec(8, estimator="entropy")
    x = normal(spec.steps)
    x[0] = 40.0
    assert range_of(spec, x) == (float(x.min()), 40.0)
    assert range_of(spec, x, x)[1] < 40.0


@pytest.mark.parametrize("distance", [20.0, 100.0])
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(signed=True, symmetric=True)])
@pytest.mark.parametrize("estimator", BY_ERROR)
def test_two_outliers_in_a_million_are_clipped(estimator: str, spec: QuantSpec, distance: float) -> None:
    x = normal(1_000_000)
    x[[17, 800_000]] = torch.tensor([distance, -distance])
    assert range_of("min-max", x) == (-distance, distance)
    low, high = range_of(QuantSpec(signed=spec.signed, symmetric=spec.symmetric, estimator=estimator), x)
    assert -0.6 * distance < low < -3.0 and 3.0 < high < 0.6 * distance


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("estimator", BY_ERROR)
def test_more_bits_and_more_gamma_widen_the_range(estimator: str, symmetric: bool) -> None:
    x = normal(100_000)

    def width(bits: int, name: str = estimator) -> float:
        low, high = range_of(QuantSpec(bits, signed=symmetric, symmetric=symmetric, estimator=name), x)
        return high - low

    widths = [width(bits) for bits in (2, 3, 4, 6, 8, 12, 16)]
    assert widths == sorted(widths) and widths[-1] > 2 * widths[0]
    gammas = [width(4, f"tf-enhanced({gamma})") for gamma in (1, 3, 30, 3000)]
    assert gammas == sorted(gammas) and gammas[-1] > gammas[0]


def test_mean_squared_error_is_smaller_than_that_of_the_other_ranges() -> None:
    x = normal(200_000)
    x[0] = 30.0
    errors = {}
    for name in ESTIMATORS:
        module = FakeQuant(QuantSpec(6, estimator=name))
        module(x)
        module.compute_encoding()
        module.mode = Mode.FAKE
        errors[name] = float((module(x) - x).double().square().mean())
    assert min(errors, key=lambda name: errors[name]) == "mse"


draws = st.tuples(st.integers(0, 10_000), st.sampled_from([0.01, 1.0, 40.0]), st.booleans())


def drawn(draw: tuple[int, float, bool]) -> list[torch.Tensor]:
    seed, factor, one_sided = draw
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(int(n), generator=generator) * factor * k for k, n in ((1, 700), (0.1, 30), (5, 200))]
    return [part.relu() for part in parts] if one_sided else parts


@settings(max_examples=25, deadline=None)
@given(draws, st.sampled_from(SEARCHING), st.sampled_from([2, 4, 8, 16]), st.booleans())
def test_range_is_within_the_extremes_and_the_order_of_batches_is_nothing(
    draw: tuple[int, float, bool], estimator: str, bits: int, symmetric: bool
) -> None:
    parts = drawn(draw)
    spec = QuantSpec(bits, signed=symmetric, symmetric=symmetric, estimator=estimator)
    low, high = range_of(spec, *parts)
    whole = torch.cat(parts)
    assert min(float(whole.min()), 0.0) <= low <= 0.0 <= high <= max(float(whole.max()), 0.0)
    assert (low, high) == range_of(spec, *parts[::-1]) == range_of(spec, whole)


@settings(max_examples=15, deadline=None)
@given(draws, st.sampled_from(SEARCHING), st.integers(-20, 20))
def test_scaling_by_powers_of_three_scales_the_range(draw: tuple[int, float, bool], estimator: str, power: int) -> None:
    parts = [part.double() for part in drawn(draw)]
    low, high = range_of(estimator, *(part.float() for part in parts))
    wide = range_of(estimator, *((part * 3.0**power).float() for part in parts))
    reach = 3.0**power * max(high, -low)
    assert wide == pytest.approx((low * 3.0**power, high * 3.0**power), rel=1e-2, abs=1e-2 * reach)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_memory_does_not_depend_on_the_number_of_batches(estimator: str) -> None:
    found = make_estimator(QuantSpec(estimator=estimator, granularity=Granularity(1)), (4,))

    def size() -> int:
        return sum(tensor.numel() for tensor in found.buffers())

    found.observe(torch.randn(2, 4, 9))
    after_one = size()
    for _ in range(30):
        found.observe(torch.randn(2, 4, 9) * 10)
    assert size() == after_one


@pytest.mark.parametrize("estimator", SEARCHING)
def test_state_dict_deepcopy_and_pickle_keep_the_histogram(estimator: str) -> None:
    found = make_estimator(QuantSpec(estimator=estimator))
    found.observe(normal(5000))
    loaded = make_estimator(QuantSpec(estimator=estimator))
    loaded.load_state_dict(found.state_dict())
    stored = io.BytesIO()
    torch.save(found.state_dict(), stored)
    for copied in (loaded, copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert isinstance(copied, Estimator)
        assert copied.range() == found.range()
        copied.observe(normal(5000) * 4)
        assert copied.range() != found.range()
    loaded.load_state_dict(make_estimator(QuantSpec(estimator=estimator)).state_dict())
    assert not loaded.has_range


def test_a_histogram_of_another_size_is_refused() -> None:
    found = make_estimator(QuantSpec(estimator="mse"))
    state = found.state_dict() | {"counts": torch.zeros(1, 7, dtype=torch.int64)}
    with pytest.raises(RuntimeError, match="size mismatch for counts"):
        found.load_state_dict(state)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at each search by mean squared error."""
    calls: list[int] = []
    search = distribution_module.mean_squared_error_range

    def counted(samples: distribution_module.Samples, spec: QuantSpec) -> distribution_module.Ranges:
        calls.append(1)
        return search(samples, spec)

    monkeypatch.setattr(distribution_module, "mean_squared_error_range", counted)
    return calls


def weight_quantizer(weight: torch.Tensor) -> FakeQuant:
    spec = QuantSpec(4, signed=True, symmetric=True, granularity=Granularity(0), estimator="mse")
    module = FakeQuant(spec, (len(weight),), follows=True)
    module.mode = Mode.FAKE
    return module


def test_a_weight_is_searched_again_only_after_it_changed(searches: list[int]) -> None:
    weight = torch.nn.Parameter(normal(60).view(3, 20))
    module = weight_quantizer(weight)
    first = module(weight)
    assert torch.equal(module(weight), first) and len(searches) == 1
    with torch.no_grad():
        weight[0] *= 2.0
    scale = module.scale.clone()
    module(weight)
    assert len(searches) == 2 and not torch.equal(module.scale, scale)


def test_copies_search_no_more_than_needed_and_follow_their_own_weight(searches: list[int]) -> None:
    weight = normal(60).view(3, 20)
    module = weight_quantizer(weight)
    module(weight)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        before = len(searches)
        copied(weight * 2)
        assert len(searches) == before + 1
        assert torch.equal(copied.scale, module.scale * 2)
    before = len(searches)
    copy.deepcopy(module)(weight)
    assert len(searches) == before
    module.to(torch.device("cpu"))(weight)


def test_a_pickle_does_not_hold_the_weight_that_was_searched() -> None:
    weight = normal(100_000).view(2, 50_000)
    module = weight_quantizer(weight)
    module(weight)
    assert len(pickle.dumps(module)) < 10_000
    assert sum(tensor.numel() for tensor in module.state_dict().values()) < 100


def test_a_loaded_scale_is_overwritten_by_the_weights_own_and_a_frozen_one_stays(searches: list[int]) -> None:
    weight = normal(60).view(3, 20)
    module, other = weight_quantizer(weight), weight_quantizer(weight)
    module(weight), other(weight * 3)
    own, foreign = module.scale.clone(), other.scale.clone()
    module.load_state_dict(other.state_dict())
    assert torch.equal(module.scale, foreign)
    module(weight)
    assert torch.equal(module.scale, own) and len(searches) == 2
    module.load_state_dict(other.state_dict())
    module.mode = Mode.FROZEN
    module(weight)
    assert torch.equal(module.scale, foreign)


def test_a_weights_estimator_keeps_no_histogram() -> None:
    module = weight_quantizer(normal(60).view(3, 20))
    module(normal(60).view(3, 20))
    found = module.estimator
    assert isinstance(found, DistributionEstimator) and found.counts.numel() == 0 and found.has_range


def test_a_wide_weight_is_searched_in_blocks_with_the_same_result() -> None:
    weight = normal(3000 * 40).view(3000, 40)
    spec = QuantSpec(4, signed=True, symmetric=True, granularity=Granularity(0), estimator="tf-enhanced")
    low, high = make_estimator(spec, (3000,)).range_of(weight)
    few = make_estimator(spec, (7,)).range_of(weight[1500:1507])
    assert torch.equal(low[1500:1507], few[0]) and torch.equal(high[1500:1507], few[1])
