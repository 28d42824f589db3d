"""calibrate with quantizers that are frozen or off, through quantizers, and with estimators that search."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import CalibrationError
from fxquant.graph.program import NoteKind, Program, Stage
from fxquant.numerics.estimators import DistributionEstimator
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.spec import SpecOverride
from tests.passes.pipelines import IMAGE, residual

SEARCHING = ("percentile", "mse", "tf-enhanced", "entropy")


def prepared(model: nn.Module | None = None, estimator: str = "min-max") -> Program:
    program = fxquant.capture(residual() if model is None else model, IMAGE)
    override = SpecOverride(estimator=estimator)
    fxquant.load_pipeline("int8_per_channel").override(activation=override, weight=override).prepare(program)
    return program


def activations(program: Program) -> list[FakeQuant]:
    return [module for _, module in program.fake_quant_nodes() if not module.follows]


def weights(program: Program) -> list[FakeQuant]:
    return [module for _, module in program.fake_quant_nodes() if module.follows]


def grids(program: Program) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(module.scale.clone(), module.zero_point.clone()) for _, module in program.fake_quant_nodes()]


@pytest.mark.parametrize("estimator", SEARCHING)
def test_searching_estimators_calibrate_finalize_and_save(estimator: str, tmp_path: Path) -> None:
    program = prepared(estimator=estimator)
    fxquant.calibrate(program, [IMAGE, IMAGE * 2])
    program.save(tmp_path / "program.fxq")
    again = fxquant.load_program(tmp_path / "program.fxq")
    assert torch.equal(again.module(IMAGE), program.module(IMAGE))
    for old, new in zip(activations(program), activations(again), strict=True):
        assert isinstance(old.estimator, DistributionEstimator) and isinstance(new.estimator, DistributionEstimator)
        assert torch.equal(old.estimator.counts, new.estimator.counts) and int(new.estimator.counts.sum()) > 0
        new.compute_encoding()
        assert torch.equal(old.scale, new.scale)
    fxquant.load_pipeline("int8_per_channel").finalize(program)
    assert program.stage is Stage.FINALIZED


@pytest.mark.parametrize("estimator", SEARCHING)
def test_calibrating_again_forgets_the_batches_of_before(estimator: str) -> None:
    program, fresh = prepared(estimator=estimator), prepared(estimator=estimator)
    fxquant.calibrate(program, [IMAGE * 10])
    fxquant.calibrate(program, [IMAGE])
    fxquant.calibrate(fresh, [IMAGE])
    for found, wanted in zip(grids(program), grids(fresh), strict=True):
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("estimator", ["min-max", *SEARCHING])
def test_values_that_are_not_finite_are_refused_and_grids_stay(estimator: str, through: bool, bad: float) -> None:
    broken = IMAGE.clone()
    broken[0, 0, 0, 0] = bad
    program = prepared(estimator=estimator)
    fxquant.calibrate(program, [IMAGE])
    before = grids(program)
    with pytest.raises(CalibrationError, match=r"value 'x' is not finite in batch 1"):
        fxquant.calibrate(program, [IMAGE * 3, broken], through_quantizers=through)
    for (scale, zero_point), (old_scale, old_zero_point) in zip(grids(program), before, strict=True):
        assert torch.equal(scale, old_scale) and torch.equal(zero_point, old_zero_point)
    assert {module.mode for _, module in program.fake_quant_nodes()} == {Mode.FAKE}


def test_downstream_observers_see_float_by_default_and_quantized_inputs_on_request() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    plain, through = prepared(model), prepared(model)
    fxquant.calibrate(plain, [IMAGE])
    fxquant.calibrate(through, [IMAGE], through_quantizers=True)
    first, *_, last = zip(activations(plain), activations(through), strict=True)
    assert torch.equal(first[0].scale, first[1].scale)
    assert not torch.equal(last[0].scale, last[1].scale)
    with torch.no_grad():
        assert float(last[0].estimator.high) == pytest.approx(float(model(IMAGE).max()), abs=1e-5)
        simulated = through.module(IMAGE)
    assert float(last[1].estimator.high) == pytest.approx(float(simulated.max()), abs=2 * float(last[1].scale))


def test_through_quantizers_gives_the_grids_that_it_simulates_where_one_batch_is_seen() -> None:
    """The last quantizer of a chain sees, bit for bit, what the calibrated program gives it (biases apart)."""
    program = prepared(nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False)))
    fxquant.calibrate(program, [IMAGE], through_quantizers=True)
    last = activations(program)[-1]
    seen = (last.estimator.low.clone(), last.estimator.high.clone())
    last.mode = Mode.OBSERVE
    last.estimator.reset()
    with torch.no_grad():
        program.module(IMAGE)
    assert torch.equal(last.estimator.low, seen[0]) and torch.equal(last.estimator.high, seen[1])


@pytest.mark.parametrize("through", [False, True])
def test_frozen_quantizers_and_those_off_keep_grid_and_mode(through: bool) -> None:
    program = prepared()
    fxquant.calibrate(program, [IMAGE])
    frozen, off = activations(program)[0], activations(program)[1]
    frozen_weight, off_weight = weights(program)[:2]
    for module in (frozen, frozen_weight):
        module.mode = Mode.FROZEN
        module.scale.fill_(0.5)
    for module in (off, off_weight):
        module.mode = Mode.OFF
        module.scale.fill_(float("nan"))
    fxquant.calibrate(program, [IMAGE * 10], through_quantizers=through)
    for module in (frozen, frozen_weight):
        assert module.mode is Mode.FROZEN and bool((module.scale == 0.5).all())
    for module in (off, off_weight):
        assert module.mode is Mode.OFF and bool(module.scale.isnan().all())
    rest = {id(module) for _, module in program.fake_quant_nodes()} - {
        id(m) for m in (frozen, off, frozen_weight, off_weight)
    }
    assert {module.mode for _, module in program.fake_quant_nodes() if id(module) in rest} == {Mode.FAKE}
    fxquant.load_pipeline("int8_per_channel").finalize(program)
    assert off.mode is Mode.OFF and off_weight.mode is Mode.OFF
    assert bool((frozen_weight.scale == 0.5).all())


def test_frozen_quantizers_pass_floats_on_in_plain_calibration_only() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1))
    for through in (False, True):
        program = prepared(model)
        fxquant.calibrate(program, [IMAGE])
        activations(program)[0].mode = Mode.FROZEN
        activations(program)[0].scale.fill_(1e-3)  # clips nearly all
        fxquant.calibrate(program, [IMAGE], through_quantizers=through)
        seen = float(activations(program)[-1].estimator.high)
        with torch.no_grad():
            assert (seen < 0.5 * float(model(IMAGE).max())) is through


def test_bias_that_exceeds_a_frozen_weight_scale_is_noted() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        model[0].bias.fill_(1e6)
    program = prepared(model)
    fxquant.calibrate(program, [IMAGE])
    weight = weights(program)[0]
    weight.mode = Mode.FROZEN
    weight.scale.fill_(1e-6)
    fxquant.calibrate(program, [IMAGE])
    assert bool((weight.scale == 1e-6).all())
    assert any(note.kind is NoteKind.BIAS and "frozen" in note.text for note in program.notes)
