"""Ranges that training moves: their grids, their gradients by the plain formulas, and what no optimizer may break."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fxquant.errors import CalibrationError, SpecError
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.numerics.grids import SMALLEST_SCALE, grid_for_range
from fxquant.numerics.learned_rounding import learned_fake_quantize
from fxquant.numerics.trained_ranges import LearnedRange, MovingRange, make_range
from fxquant.spec import Granularity, Limits, QuantSpec

LEARNED = ("lsq", "lsq+", "min-max", "log2")
EXACT = ("lsq", "lsq+")
NO_FLOOR = torch.tensor(0.0)


@st.composite
def specs(draw: st.DrawFn, *, limited: bool = True) -> QuantSpec:
    """Grids of 2 to 16 bits of every kind, with limits as activations have them, learned in every way."""
    signed, symmetric = draw(st.booleans()), draw(st.booleans())
    spec = QuantSpec(
        bits=draw(st.integers(2, 16)),
        signed=signed,
        symmetric=symmetric,
        strict=signed and symmetric and draw(st.booleans()),
        training=draw(st.sampled_from(LEARNED)),
    )
    known = [Limits(), Limits(low=0.0), Limits(0.0, 6.0), Limits(0.0, 1.0), Limits(-1.0, 1.0), Limits(low=-0.375)]
    known += [Limits(high=6.0), Limits(-6.0, 6.0), Limits(high=0.0)]
    if not symmetric:
        known += [Limits(0.0, 6.0, spec.qmin), Limits(0.0, None, spec.qmin)]
    return replace(spec, limits=draw(st.sampled_from(known)) if limited else Limits())


@st.composite
def starts(draw: st.DrawFn, **options: bool) -> tuple[QuantSpec, torch.Tensor, torch.Tensor]:
    """A spec and a grid as calibration gives it."""
    spec = draw(specs(**options))
    ends = st.floats(0.001953125, 16.0, width=32)
    low, high = -draw(st.just(0.0) | ends), draw(st.just(0.0) | ends)
    assume(low < high)
    return spec, *grid_for_range(torch.tensor(low), torch.tensor(high), spec)


def begun(spec: QuantSpec, scale: torch.Tensor, zero_point: torch.Tensor) -> LearnedRange:
    found = make_range(spec, tuple(scale.shape))
    assert isinstance(found, LearnedRange)
    found.start(scale, zero_point)
    return found


def ulps(one: torch.Tensor, other: torch.Tensor) -> int:
    return int((one.view(torch.int32).long() - other.view(torch.int32).long()).abs().max())


# ---- the start


@given(starts())
def test_start_gives_back_the_calibrated_grid(start: tuple[QuantSpec, torch.Tensor, torch.Tensor]) -> None:
    """Bit for bit: lsq, lsq+, and min-max with a free zero point. One ulp: min-max. log2: its logarithm in float32."""
    spec, scale, zero_point = start
    found = [part.detach() for part in begun(spec, scale, zero_point).grid(NO_FLOOR)]
    assert torch.equal(found[1].long(), zero_point)
    if spec.training in EXACT or (spec.training == "min-max" and spec.fixed_zero_point is None):
        assert torch.equal(found[0], scale), ulps(found[0], scale)
    elif spec.training == "min-max":
        assert ulps(found[0], scale) <= 1
    else:
        exponent = abs(float(scale.log2()))
        assert float((found[0].double() / scale.double() - 1).abs()) <= 2.0**-24 * (exponent + 2)


@pytest.mark.parametrize("training", LEARNED)
def test_a_fixed_range_is_left_alone(training: str) -> None:
    assert make_range(QuantSpec(fixed=(0.0, 1.0), training=training), ()) is None


def test_where_the_zero_point_is_prescribed_offsets_are_not_learned() -> None:
    names = [name for name, _ in begun_symmetric("lsq+").named_parameters()]
    assert names == ["scale"]
    relu = make_range(QuantSpec(limits=Limits(0.0, None, 0), training="min-max"), ())
    assert relu is not None and [name for name, one in relu.named_parameters() if one.requires_grad] == ["high"]


def begun_symmetric(training: str, scale: float = 0.1, shape: tuple[int, ...] = ()) -> LearnedRange:
    spec = QuantSpec(8, signed=True, symmetric=True, strict=True, training=training)
    return begun(spec, torch.full(shape, scale), torch.zeros(shape, dtype=torch.int64))


# ---- gradients


def plain_grid(
    spec: QuantSpec, parameters: dict[str, torch.Tensor], zero_point: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and unrounded zero point by the formulas of the table, nothing held."""
    if spec.training == "min-max":
        low, high = parameters["low"], parameters["high"]
    else:
        scale = parameters["log2_scale"].exp2() if spec.training == "log2" else parameters["scale"]
        low = parameters["low"] if "low" in parameters else (spec.qmin - zero_point) * scale
        high = low + spec.steps * scale
    if spec.fixed_zero_point is None:
        scale = (high - low) / spec.steps
        return scale, spec.qmin - low / scale
    below, above = spec.fixed_zero_point - spec.qmin, spec.qmax - spec.fixed_zero_point
    scale = torch.maximum(-low / below, high / above) if below and above else high / above if above else -low / below
    return scale, torch.full_like(scale, spec.fixed_zero_point)


@given(starts(limited=False), st.integers(1, 4000))
def test_gradients_by_every_parameter_are_autograd_s_of_the_plain_formulas(
    start: tuple[QuantSpec, torch.Tensor, torch.Tensor], elements: int
) -> None:
    """Strictly inside 0 and the limits; both of scale and of zero point, with weights of their own."""
    spec, scale, zero_point = start
    assume(spec.fixed_zero_point is not None or spec.qmin < int(zero_point) < spec.qmax)
    found = begun(spec, scale, zero_point)
    grid = found.grid(NO_FLOOR, elements)
    (grid[0] * 3.0 + grid[1] * 0.01).sum().backward()
    leaves = {name: one.detach().double().requires_grad_() for name, one in found.named_parameters()}
    plain = plain_grid(spec, leaves, zero_point)
    (plain[0] * 3.0 + plain[1] * 0.01).sum().backward()
    factor = found.gradient_factor(elements)
    for name, parameter in found.named_parameters():
        expected = leaves[name].grad if leaves[name].grad is not None else torch.zeros(())
        got = parameter.grad if parameter.grad is not None else torch.zeros(())
        assert float(got) == pytest.approx(float(expected) * factor, rel=1e-5, abs=1e-7 / float(scale)), name


@pytest.mark.parametrize("training", LEARNED)
@pytest.mark.parametrize(
    ("shape", "granularity"),
    [
        ((3, 4), Granularity()),
        ((3, 4), Granularity(0)),
        ((1, 4), Granularity(0)),
        ((3, 4), Granularity(1, 2)),
        ((6,), Granularity(0)),
    ],
)
def test_gradients_of_fake_quant_are_autograd_s_of_the_plain_definition(
    training: str, shape: tuple[int, ...], granularity: Granularity
) -> None:
    """By x and by every parameter, through FakeQuant itself, per tensor, channel and block."""
    spec = QuantSpec(4, training=training, granularity=granularity)
    encodings = granularity.encoding_shape(shape)
    module = FakeQuant(spec, encodings, follows=True)
    module.set_range(torch.full(encodings, -0.7), torch.full(encodings, 1.1))
    module.engage()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).requires_grad_()
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    module(x).backward(grad)
    assert isinstance(module.range, LearnedRange)
    leaves = {name: one.detach().double().requires_grad_() for name, one in module.range.named_parameters()}
    scale, zero_point = plain_grid(spec, leaves, module.zero_point)
    zero_point = zero_point + (zero_point.round() - zero_point).detach()
    if granularity.axis is not None:
        view = [-1 if axis == granularity.axis else 1 for axis in range(len(shape))]
        spread: Callable[[torch.Tensor], torch.Tensor] = (
            (lambda t: t.repeat_interleave(2, 1)) if granularity.block else (lambda t: t.view(view))
        )
        scale, zero_point = spread(scale), spread(zero_point)
    wide = x.detach().double().requires_grad_()
    units = wide / scale
    codes = torch.clamp(units + (units.round() - units).detach() + zero_point, spec.qmin, spec.qmax)
    ((codes - zero_point) * scale).backward(grad.double())
    assert wide.grad is not None and x.grad is not None and torch.equal(x.grad, wide.grad.float())
    factor = module.range.gradient_factor(x.numel() // max(module.scale.numel(), 1))
    for name, parameter in module.range.named_parameters():
        expected = leaves[name].grad
        if name == "scale" and training == "lsq":  # whose zero point stays: as the plain formulas have it, to rounding
            assert expected is not None
        assert expected is not None and parameter.grad is not None
        assert torch.allclose(parameter.grad.double(), expected * factor, rtol=1e-4, atol=1e-4 * factor), name


def test_log2_s_gradient_is_that_of_the_closed_form() -> None:
    """TQT, eq. 8: d x_hat / d log2(t) = s ln(2) (rint(u) - u | n | p)."""
    spec = QuantSpec(4, signed=True, symmetric=True, training="log2")
    for u, slope in ((2.3, -0.3), (-1.6, -0.4), (40.0, 7.0), (-40.0, -8.0)):
        module = FakeQuant(spec, follows=True)
        module.set_range(torch.tensor(-1.0), torch.tensor(1.0))
        module.engage()
        scale = float(module.scale)
        module(torch.tensor([u * scale])).sum().backward()
        assert isinstance(module.range, LearnedRange)
        (gradient,) = (parameter.grad for parameter in module.range.parameters())
        assert gradient is not None and float(gradient) == pytest.approx(scale * math.log(2) * slope, rel=1e-4)


FACTORS = [
    (QuantSpec(8), 255),
    (QuantSpec(8, signed=True), 255),  # the same grid, other codes
    (QuantSpec(8, limits=Limits(0.0, 6.0, 0)), 255),
    (QuantSpec(8, signed=True, symmetric=True), 127),
    (QuantSpec(8, signed=True, symmetric=True, strict=True), 127),
    (QuantSpec(8, symmetric=True), 127),
    (QuantSpec(2, signed=True, symmetric=True), 1),
    (QuantSpec(4, limits=Limits(None, 0.0, 15)), 15),
]


@pytest.mark.parametrize(("spec", "positive"), FACTORS, ids=[str(entry[0]) for entry in FACTORS])
def test_gradient_factor_is_lsq_s(spec: QuantSpec, positive: int) -> None:
    """LSQ, section 2.2: 1 / sqrt(N Q_P)."""
    for training, factor in (("lsq", (600 * positive) ** -0.5), ("min-max", 1.0), ("log2", 1.0)):
        found = make_range(replace(spec, training=training), ())
        assert isinstance(found, LearnedRange) and found.gradient_factor(600) == pytest.approx(factor)


@pytest.mark.parametrize("training", LEARNED)
def test_a_batch_twice_as_large_has_the_gradient_of_its_mean(training: str) -> None:
    """So that two processes, whose gradients are averaged, have that of one."""
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))

    def gradients(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        module = FakeQuant(QuantSpec(4, training=training))
        module.set_range(torch.tensor(-1.0), torch.tensor(1.5))
        module.engage()
        for part in parts:
            (module(part).square().mean() / len(parts)).backward()
        return [one.grad for one in module.parameters() if one.grad is not None]

    for one, two in zip(gradients([x]), gradients([x[:3], x[3:]]), strict=True):
        assert torch.allclose(one, two, rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (0, 4), (1,), (3, 1, 2)])
@pytest.mark.parametrize("training", LEARNED)
def test_tensors_of_any_shape_train(training: str, shape: tuple[int, ...]) -> None:
    module = FakeQuant(QuantSpec(training=training))
    module.set_range(torch.tensor(-1.0), torch.tensor(1.5))
    module.engage()
    module(torch.full(shape, 3.0)).sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad))


# ---- what an optimizer cannot break


def assert_valid(spec: QuantSpec, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
    """A grid of finite positive scales that obeys its limits as a calibrated one does, with 0 on it."""
    assert scale.dtype == zero_point.dtype == torch.float32
    assert bool((torch.isfinite(scale) & (scale >= SMALLEST_SCALE)).all())
    assert bool(((zero_point >= spec.qmin) & (zero_point <= spec.qmax) & (zero_point == zero_point.round())).all())
    prescribed, limits = spec.fixed_zero_point, spec.limits
    if prescribed is not None:
        assert bool((zero_point == prescribed).all())
        low, high = (spec.qmin - prescribed) * scale.double(), (spec.qmax - prescribed) * scale.double()
        ends = [(limits.low is not None, low, limits.low), (limits.high is not None, high, limits.high)]
        held = [bool((abs(end) <= abs(limit) * (1 + 2**-23) + 2.0**-50).all()) for given, end, limit in ends if given]
        assert not held or any(held) or symmetric_needs_more(spec)
    elif limits.low is not None and limits.high is not None:
        assert bool((spec.steps * scale.double() <= (limits.high - limits.low) * (1 + 2**-23)).all())
    low, high = ((end - zero_point.double()) * scale.double() for end in (spec.qmin, spec.qmax))
    if limits.low is not None and prescribed is None:
        assert bool((low >= limits.low - 0.51 * scale.double()).all())
    if limits.high is not None and prescribed is None:
        assert bool((high <= limits.high + 0.51 * scale.double()).all())


def symmetric_needs_more(spec: QuantSpec) -> bool:
    """A symmetric grid covers its larger side: a limit on one side alone holds nothing."""
    return spec.symmetric and (spec.limits.low is None or spec.limits.high is None)


@given(starts(), st.integers(0, 10_000), st.sampled_from([1e-3, 0.1, 3.0, 1e6]))
def test_grids_stay_valid_whatever_an_optimizer_does(
    start: tuple[QuantSpec, torch.Tensor, torch.Tensor], seed: int, rate: float
) -> None:
    """200 random steps from the calibrated grid, of any size."""
    spec, scale, zero_point = start
    found = begun(spec, scale, zero_point)
    generator = torch.Generator().manual_seed(seed)
    for number in range(200):
        with torch.no_grad():
            for parameter in found.parameters():
                parameter += rate * float(scale) * torch.randn((), generator=generator)
        if number % 10 == 0 or number > 190:
            assert_valid(spec, *(one.detach() for one in found.grid(NO_FLOOR)))


@pytest.mark.parametrize("training", LEARNED)
def test_a_relu6_stays_fused_after_200_steps_that_widen_it(training: str) -> None:
    spec = QuantSpec(limits=Limits(0.0, 6.0, 0), training=training)
    found = begun(spec, *grid_for_range(torch.tensor(0.0), torch.tensor(4.0), spec))
    optimizer = torch.optim.SGD(found.parameters(), lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        scale, zero_point = found.grid(NO_FLOOR)
        assert 255 * float(scale.detach()) <= 6.0 + 1e-6 and float(zero_point) == 0.0
        assert torch.round(torch.tensor(6.0) / scale.detach()) >= 255
        (-100.0 * scale).backward()
        optimizer.step()
    assert 255 * float(scale.detach()) == pytest.approx(6.0)
    optimizer.zero_grad()
    found.grid(NO_FLOOR)[0].backward()
    assert any(one.grad is not None and float(one.grad) > 0 for one in found.parameters())  # it can come back


@pytest.mark.parametrize("training", LEARNED)
def test_a_loss_that_wants_more_than_a_limit_moves_nothing(training: str) -> None:
    """Exactly 0: of any other number, be it a rounding error, Adam makes a full step."""
    for bits in (4, 8):
        module = FakeQuant(QuantSpec(bits, limits=Limits(0.0, 6.0), training=training))
        module.set_range(torch.tensor(0.0), torch.tensor(6.0))
        module.engage()
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
        before = module.scale.clone()
        for step in range(5):
            optimizer.zero_grad()
            (-module(torch.tensor([7.0, 8.0 + step, 3.3]))[:2].sum()).backward()
            assert all(float(one.grad) == 0.0 for one in module.parameters() if one.grad is not None)
            optimizer.step()
        assert torch.equal(module.scale, before)


@pytest.mark.parametrize("training", ["lsq", "lsq+", "log2"])
@pytest.mark.parametrize("limit", [1.0, 6.0, 0.3])
def test_scales_at_two_limits_are_not_moved_by_what_wants_more(training: str, limit: float) -> None:
    """Nor is a lowest value, which has nowhere to go at the largest scale."""
    spec = QuantSpec(limits=Limits(-limit, limit), training=training)
    found = begun(spec, *grid_for_range(torch.tensor(-limit), torch.tensor(limit), spec))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            parameter += 0.0 if name == "low" else 1e-4
    scale, zero_point = found.grid(NO_FLOOR)
    x = torch.tensor([2.0 * limit, 3.0 * limit])
    (-learned_fake_quantize(x, scale, zero_point, spec.qmin, spec.qmax).sum()).backward()
    assert all(float(one.grad) == 0.0 for one in found.parameters() if one.grad is not None)


def test_the_scale_of_lsq_plus_is_its_parameter_wherever_the_lowest_value_is() -> None:
    found = begun(QuantSpec(training="lsq+"), torch.tensor(0.125), torch.tensor(0))
    for low, zero_point in ((0.7, 0), (0.0, 0), (-1.0, 8), (-100.0, 255)):
        with torch.no_grad():
            found.low.fill_(low)
        grid = found.grid(NO_FLOOR)
        assert [float(part.detach()) for part in grid] == [0.125, zero_point]
        found.zero_grad()
        grid[1].backward()  # what lies outside wants to be larger: 0 is as far as the lowest value can go
        assert found.low.grad is not None and (float(found.low.grad) < 0.0) is (low < 0.0)


@pytest.mark.parametrize(("training", "most"), [("lsq", 30), ("lsq+", 80), ("min-max", 80), ("log2", 36)])
def test_a_range_costs_few_operations(training: str, most: int) -> None:
    """Both ways; each is some microseconds of a step, for every value of a model."""

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    found = begun(QuantSpec(training=training), torch.tensor(0.1), torch.tensor(100))
    with Counter() as counter:
        grid = found.grid(NO_FLOOR)
        torch.autograd.backward([part for part in grid if part.requires_grad])
    assert counter.count <= most


WILD = {
    "lsq": {"scale": -0.3},
    "lsq+": {"scale": -0.3, "low": 0.7},
    "min-max": {"low": 0.5, "high": -0.2},
    "log2": {"log2_scale": -3000.0},
}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("training", LEARNED)
def test_a_scale_that_was_thrown_below_zero_comes_back(training: str, symmetric: bool) -> None:
    """The range shrinks to nothing, x_hat to 0; gradients lead back until x is covered again."""
    spec = QuantSpec(8, signed=symmetric, symmetric=symmetric, training=training)
    module = FakeQuant(spec)
    module.set_range(torch.tensor(-1.0), torch.tensor(1.5))
    module.engage()
    assert isinstance(module.range, LearnedRange)
    with torch.no_grad():
        for name, parameter in module.range.named_parameters():
            parameter.fill_(WILD[training][name])
    x = torch.linspace(-1.0, 1.5, 50)
    loss = (module(x) - x).square().sum()
    assert_valid(spec, module.scale, module.zero_point.float())
    assert float(module.scale) == pytest.approx(SMALLEST_SCALE)
    loss.backward()
    if training == "log2":  # s ln 2 is as good as no gradient there: it is finite, and points upwards
        assert module.range.log2_scale.grad <= 0
        return
    optimizer = torch.optim.Adam(module.range.parameters(), lr=0.01)
    for _ in range(400):
        optimizer.zero_grad()
        (module(x) - x).square().sum().backward()
        optimizer.step()
    assert float((module(x) - x).square().sum().detach()) < 0.01 * float(loss.detach())


@pytest.mark.parametrize("training", LEARNED)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_parameters_that_are_not_finite_are_refused_by_name(training: str, value: float) -> None:
    found = begun_symmetric(training, shape=(3,))
    name, parameter = next(iter(found.named_parameters()))
    with torch.no_grad():
        parameter[1] = value
    with pytest.raises(CalibrationError, match=rf"learned range \({training[:3]}.*'{name}'.*1 of 3.*learning rate"):
        found.grid(NO_FLOOR)


@pytest.mark.parametrize("training", LEARNED)
def test_floors_are_obeyed_and_let_gradients_lead_upwards(training: str) -> None:
    found = begun_symmetric(training, shape=(2,))
    for sign, passes in ((1.0, [True, False]), (-1.0, [True, True])):
        found.zero_grad()
        scale, _ = found.grid(torch.tensor([0.0, 0.5]))
        assert scale.tolist() == pytest.approx([0.1, 0.5])
        (sign * scale.sum()).backward()
        total = sum((one.grad.abs() for one in found.parameters() if one.grad is not None), torch.zeros(2))
        assert (total > 0).tolist() == passes


# ---- moving averages


def moving(momentum: float = 0.5, **options: object) -> FakeQuant:
    module = FakeQuant(QuantSpec(training=f"moving-average({momentum})", **options))  # type: ignore[arg-type]
    module.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    module.engage()
    assert module.mode is Mode.TRACK
    return module.train()


def test_a_moving_average_quantizes_from_the_first_step_and_moves_in_training_mode_only() -> None:
    module = moving()
    assert isinstance(module.range, MovingRange)
    before = module.scale.clone()
    module.eval()(torch.full((3,), 50.0))
    assert torch.equal(module.scale, before)
    out = module.train()(torch.tensor([-3.0, 5.0]))
    assert float(module.range.low) == pytest.approx(-2.0, abs=0.01)
    assert float(module.range.high) == pytest.approx(3.0, abs=0.01)
    assert float(out[1]) == pytest.approx(3.0, abs=0.02)  # on the grid that it moved


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_not_finite_leaves_a_moving_average_alone_and_shows(bad: float) -> None:
    module, other = moving(), moving()
    module(torch.tensor([-3.0, 5.0]))
    other(torch.tensor([-3.0, 5.0]))
    out = module(torch.tensor([bad, 900.0]))
    assert math.isnan(bad) is bool(torch.isnan(out).any())
    assert torch.equal(module.scale, other.scale) and torch.equal(module.zero_point, other.zero_point)
    module(torch.tensor([-3.0, 5.0]))
    assert bool(torch.isfinite(module.scale))


def test_an_empty_batch_leaves_a_moving_average_alone() -> None:
    module = moving()
    before = module.scale.clone()
    module(torch.empty(0, 3))
    assert torch.equal(module.scale, before)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputing_for_a_checkpoint_moves_an_average_once(use_reentrant: bool) -> None:
    module, other, x = moving(), moving(), torch.tensor([-3.0, 5.0], requires_grad=True)
    other(x).sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(module, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(module.scale, other.scale) and torch.equal(module.range.low, other.range.low)
    assert expected is not None and x.grad is not None and torch.equal(x.grad, expected)


@given(starts(), st.integers(0, 1000))
def test_moving_averages_keep_valid_grids(start: tuple[QuantSpec, torch.Tensor, torch.Tensor], seed: int) -> None:
    spec, scale, zero_point = start
    spec = replace(spec, training="moving-average(0.3)")
    module = FakeQuant(spec)
    module.scale.copy_(scale)
    module.zero_point.copy_(zero_point)
    module.engage()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        module.train()(torch.randn(4, generator=generator) * 5)
    assert_valid(spec, module.scale, module.zero_point.float())


def test_a_weight_s_range_does_not_move_by_an_average() -> None:
    with pytest.raises(SpecError, match="weight.*moving-average"):
        FakeQuant(QuantSpec(training="moving-average"), follows=True)


# ---- what is kept


@pytest.mark.parametrize("training", LEARNED)
def test_copies_and_state_dicts_keep_learned_ranges(training: str) -> None:
    module = FakeQuant(QuantSpec(training=training))
    module.set_range(torch.tensor(-1.0), torch.tensor(1.5))
    module.engage()
    twin, loaded = copy.deepcopy(module), FakeQuant(QuantSpec(training=training))
    loaded.load_state_dict(module.state_dict())
    loaded.mode = module.mode
    x = torch.linspace(-2, 2, 9)
    assert torch.equal(twin(x), module(x)) and torch.equal(loaded(x), module(x))
