"""reconstruct: beats rounding to nearest, finds the best rounding of tiny layers, is reproducible, touches nothing."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from fxquant.errors import FxquantError
from fxquant.graph.pipeline import load_pipeline
from fxquant.reconstruction import Settings, Unit, collect, learn, reconstruct
from fxquant.reconstruction.samples import Samples
from fxquant.spec import SpecOverride
from tests.reconstruction.layers import Bench, bench, correlated

FAST = Settings(iterations=250)


def convolution(seed: int = 0, **options: int) -> Bench:
    """A 3x3 convolution with a relu behind it, on correlated inputs."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(8, 12, 3, **options), nn.ReLU(), nn.Conv2d(12, 4, 1))
    return bench(model, [correlated(32, 8, 6, 6, seed=index) for index in range(2)])


@pytest.mark.parametrize("seed", range(3))
def test_learned_rounding_beats_nearest_by_a_third(seed: int) -> None:
    case = convolution(seed)
    found = reconstruct(case.program, case.unit, case.samples, FAST)
    assert found.is_better and found.learned_error < 0.67 * found.nearest_error
    assert found.changed > 0 and found.samples == 64


@pytest.mark.parametrize(
    "model",
    [
        nn.Conv1d(6, 8, 3, padding=1),
        nn.Conv2d(6, 8, 3, stride=2, groups=2),
        nn.Conv3d(6, 4, 2),
        nn.ConvTranspose2d(6, 8, 2, stride=2),
        nn.Linear(6, 24),
    ],
    ids=lambda model: type(model).__name__,
)
def test_every_kind_of_layer_is_learned(model: nn.Module) -> None:
    rank = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, nn.ConvTranspose2d: 2, nn.Linear: 0}[type(model)]
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    pipeline = load_pipeline("qnn_htp").override(weight=SpecOverride(bits=4))  # onnxruntime transposes in float
    case = bench(nn.Sequential(model), [correlated(48, 6, *([6] * rank))], pipeline=pipeline)
    found = reconstruct(case.program, case.unit, case.samples, FAST)
    assert found.is_better, str(found)


def test_rounding_of_tiny_layers_is_the_best_of_all_or_nearly() -> None:
    settings = Settings(iterations=600, regularization=1e-4)
    ranks = []
    for seed in range(6):
        torch.manual_seed(seed)
        case = bench(nn.Sequential(nn.Linear(8, 1, bias=False)), [correlated(64, 8, seed=seed)])
        found, errors = reconstruct(case.program, case.unit, case.samples, settings), exhaustive(case)
        assert min(errors) <= found.learned_error * (1 + 1e-5) and len(errors) == 256
        ranks.append(sum(error < found.learned_error * (1 - 1e-5) for error in errors))
    assert max(ranks) <= 8 and ranks.count(0) >= 3, ranks


def exhaustive(case: Bench) -> list[float]:
    """Errors of all 2^n roundings of a linear layer without bias and activation, in float64."""
    (node,) = case.unit.weights
    module = case.program.fake_quant(node)
    source = node.args[0]
    assert module is not None and isinstance(source, torch.fx.Node)
    scale, zero = (part.double() for part in module.grid_for(2))
    floor = torch.floor(case.program.tensor(source).detach() / scale.float()).double()
    (x,), target = case.samples.inputs.values(), case.samples.targets.double()
    found = []
    for ups in itertools.product((0.0, 1.0), repeat=floor.numel()):
        codes = torch.clamp(floor + torch.tensor(ups).double(), module.spec.qmin - zero, module.spec.qmax - zero)
        output = x.double() @ (codes * scale).t()
        found.append(float((output - target).square().sum() / target.square().sum()))
    return found


def test_loss_falls_and_weights_end_hard() -> None:
    case = convolution()
    found = reconstruct(case.program, case.unit, case.samples, replace(FAST, early_stop=False))
    assert found.iterations == 250 and found.curve[0][0] == 0 and found.curve[-1][0] == 249
    assert found.curve[-1][1] < 0.1 * found.curve[0][1]


@pytest.mark.parametrize("regularization", [0.0, 0.01])
def test_gradient_is_the_slope_of_the_loss(regularization: float) -> None:
    case = convolution()
    every = Settings(iterations=10, batch_size=case.samples.count, regularization=regularization)
    learner = learn._Learner(case.program, case.unit, case.samples, every)
    (item,) = learner.roundings.values()
    learner._step(4.0, wants_loss=False)
    assert item.alpha.grad is not None
    slope, start = item.alpha.grad.clone(), item.alpha.clone()
    losses = []
    for way in (-1e-2, 1e-2):
        item.alpha.copy_(start + way * slope / slope.norm())
        losses.append(learner._step(4.0, wants_loss=True))
    assert losses[0] is not None and losses[1] is not None
    assert (losses[1] - losses[0]) / 2e-2 == pytest.approx(float(slope.norm()), rel=2e-2)


def test_loss_is_summed_over_channels_and_averaged_over_all_else() -> None:
    case = convolution()
    every = Settings(iterations=1, batch_size=case.samples.count, regularization=0.0)
    learner = learn._Learner(case.program, case.unit, case.samples, every)
    inputs, target = case.samples.of(slice(None))
    weights = {node: item.weight() for node, item in learner.roundings.items()}
    error = learner._output(learner.segment, inputs, weights, target) - target
    assert len({*error.shape[1:]}) == 2  # channels are none of the other sizes
    loss = reconstruct(case.program, case.unit, case.samples, every, progress=False).curve[0][1]
    assert loss == pytest.approx(float(error.detach().square().sum(1).mean()), rel=1e-4)


def test_early_stop_ends_with_the_same_codes() -> None:
    case = convolution()
    early, full = (
        reconstruct(case.program, case.unit, case.samples, replace(FAST, iterations=600, early_stop=stops))
        for stops in (True, False)
    )
    assert early.iterations < full.iterations == 600
    (name,) = early.codes
    assert int((early.codes[name] != full.codes[name]).sum()) == 0


def test_same_seed_gives_the_same_codes_whatever_was_drawn_before_and_another_seed_others() -> None:
    case = convolution()
    first = reconstruct(case.program, case.unit, case.samples, FAST)
    torch.rand(17)
    again = reconstruct(case.program, case.unit, case.samples, FAST)
    (name,) = first.codes
    assert torch.equal(first.codes[name], again.codes[name]) and first.curve == again.curve
    other = reconstruct(case.program, case.unit, case.samples, replace(FAST, seed=1))
    assert other.curve != first.curve
    renamed = reconstruct(case.program, replace(case.unit, name="other"), case.samples, FAST)
    assert renamed.curve != first.curve


def test_program_and_samples_are_left_as_they_are() -> None:
    case = convolution()
    case.program.module.train()
    before = case.program.fingerprint(), case.samples.targets.clone()
    state = torch.random.get_rng_state()
    reconstruct(case.program, case.unit, case.samples, replace(FAST, iterations=10, drop=0.5))
    assert case.program.fingerprint() == before[0] and torch.equal(case.samples.targets, before[1])
    assert all(parameter.grad is None for parameter in case.program.module.parameters())
    assert case.program.module.training and torch.equal(state, torch.random.get_rng_state())


def test_errors_are_those_of_the_program_with_these_codes() -> None:
    case = convolution()
    found = reconstruct(case.program, case.unit, case.samples, FAST)
    (node,) = case.unit.weights
    module = case.program.fake_quant(node)
    source = node.args[0]
    assert module is not None and isinstance(source, torch.fx.Node)
    assert output_error(case) == pytest.approx(found.nearest_error, rel=1e-5)
    with torch.no_grad():
        case.program.tensor(source).copy_(module.real(found.codes[node.name]))
    assert output_error(case) == pytest.approx(found.learned_error, rel=1e-5)


def output_error(case: Bench) -> float:
    """Squared error of the unit's output over the squared float output, by the program's own forward."""
    batches = [correlated(32, 8, 6, 6, seed=index) for index in range(2)]
    unit = Unit("", (), (), case.unit.output, 1)
    now, then = (collect(program, program, unit, batches, 64) for program in (case.program, case.reference))
    assert isinstance(now, Samples) and isinstance(then, Samples)
    return float((now.targets - then.targets).double().square().sum() / then.targets.double().square().sum())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("iterations", 0),
        ("learning_rate", 0.0),
        ("batch_size", 0),
        ("regularization", -1.0),
        ("beta_end", 0.5),
        ("beta_start", 1.0),
        ("warm_start", 1.0),
        ("drop", 1.5),
    ],
)
def test_option_beyond_its_limits_is_refused_by_name(option: str, value: float) -> None:
    with pytest.raises(FxquantError, match=f"option '{option}'"):
        Settings(**{option: value})  # type: ignore[arg-type]


def test_schedule_is_that_of_the_paper() -> None:
    settings = Settings()
    assert [settings.steps_for(bits) for bits in (4, 8)] == [15_000, 10_000]
    assert [settings.rate_for(steps) for steps in (15_000, 10_000, 1_000, 10)] == [1e-3, 1e-3, 1e-2, 0.1]
    assert settings.beta_at(199, 1000) is None
    assert settings.beta_at(200, 1000) == 20 and settings.beta_at(600, 1000) == pytest.approx(11)
    assert settings.beta_at(1000, 1000) == pytest.approx(2)


def few_samples() -> Bench:
    """A linear layer on independent inputs, where nearest is best, and too few of them to tell."""
    torch.manual_seed(0)
    return bench(nn.Sequential(nn.Linear(64, 32)), [torch.randn(20, 64)])


def test_rounding_that_fits_few_samples_alone_is_not_better() -> None:
    case = few_samples()
    trusting = reconstruct(case.program, case.unit, case.samples, FAST, progress=False)
    checked = reconstruct(case.program, case.unit, case.samples, replace(FAST, check_every=8), progress=False)
    assert trusting.is_better and trusting.check is None
    assert checked.check is not None and checked.check[1] > checked.check[0] + checked.check[2]
    assert checked.learned_error < checked.nearest_error and not checked.is_better
    assert "on samples held back" in str(checked) and "held back" not in str(trusting)


def test_samples_held_back_are_not_learned_from() -> None:
    case = convolution()
    settings = replace(FAST, iterations=60, check_every=8)
    expected = reconstruct(case.program, case.unit, case.samples, settings, progress=False)
    targets = case.samples.targets.clone()
    targets[1::8] = torch.randn_like(targets[1::8])
    other = replace(case.samples, targets=targets)
    found = reconstruct(case.program, case.unit, other, settings, progress=False)
    assert found.check != expected.check
    assert all(torch.equal(found.codes[name], codes) for name, codes in expected.codes.items())


def test_errors_are_those_of_all_samples_and_those_held_back() -> None:
    case = convolution()
    found = reconstruct(case.program, case.unit, case.samples, replace(FAST, check_every=8), progress=False)
    assert found.is_better and found.check is not None
    held = replace(
        case.samples,
        inputs={node: value[1::8] for node, value in case.samples.inputs.items()},
        targets=case.samples.targets[1::8],
    )
    settings = replace(FAST, iterations=1)
    alone = reconstruct(case.program, case.unit, held, settings, progress=False)
    assert found.check[0] == pytest.approx(alone.nearest_error, rel=1e-6)
    assert found.check[0] != found.nearest_error > found.learned_error


def test_output_of_another_shape_than_the_target_is_refused_by_unit() -> None:
    case = convolution()  # such targets broadcast: nothing but the shape tells
    samples = replace(case.samples, targets=case.samples.targets[..., :1])
    with pytest.raises(FxquantError, match=f"reconstruction of '{case.unit.name}'") as caught:
        reconstruct(case.program, case.unit, samples, FAST, progress=False)
    height = samples.targets.shape[2]
    assert caught.value.expected == f"an output of shape (32, 12, {height}, 1), as in the float program"
    assert caught.value.got == f"(32, 12, {height}, {height})"
