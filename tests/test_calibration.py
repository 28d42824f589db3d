"""calibrate: what it takes, what it refuses, and what it leaves behind."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import CalibrationError, FxquantError
from fxquant.graph.batches import placeholder_values
from fxquant.graph.program import Program, Stage
from fxquant.numerics.fake_quant import FakeQuant, Mode
from tests.passes.pipelines import IMAGE, residual


def prepared(model: nn.Module | None = None, inputs: object = IMAGE) -> Program:
    program = fxquant.capture(residual() if model is None else model, inputs)
    fxquant.load_pipeline("int8_per_channel").prepare(program)
    return program


def quantizer(program: Program, value: str) -> FakeQuant:
    module = program.module.get_submodule(f"fake_quants.{value}")
    assert isinstance(module, FakeQuant)
    return module


def generated() -> Iterator[torch.Tensor]:
    yield IMAGE
    yield IMAGE * 2


@pytest.mark.parametrize(
    "batches", [[IMAGE, IMAGE * 2], ((IMAGE,), [IMAGE * 2]), generated(), [{"x": IMAGE}, {"x": IMAGE * 2}]]
)
def test_ranges_cover_all_batches_of_any_iterable(batches: Iterable[fxquant.graph.batches.Batch]) -> None:
    program = prepared()
    fxquant.calibrate(program, batches, progress=False)
    found = quantizer(program, "x")
    assert program.stage is Stage.CALIBRATED
    assert float(found.encoding.max) == pytest.approx(float(2 * IMAGE.max()), abs=float(found.scale))
    assert {module.mode for _, module in program.fake_quant_nodes()} == {Mode.FAKE}


def test_max_batches_stops_early() -> None:
    program = prepared()
    fxquant.calibrate(program, [IMAGE, IMAGE * 100], max_batches=1)
    assert float(quantizer(program, "x").encoding.max) < 10


def test_calibrating_again_starts_afresh() -> None:
    program = prepared()
    fxquant.calibrate(program, [IMAGE * 100])
    fxquant.calibrate(program, [IMAGE])
    assert float(quantizer(program, "x").encoding.max) < 10


def test_relu6_range_is_capped() -> None:
    program = prepared(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU6()))
    fxquant.calibrate(program, [IMAGE * 1000])
    assert quantizer(program, "_1").scale <= torch.tensor(6.0 / 255)
    assert int(quantizer(program, "_1").zero_point) == 0


def test_no_batches_are_refused_and_modes_come_back() -> None:
    program = prepared()
    with pytest.raises(CalibrationError, match="at least one batch"):
        fxquant.calibrate(program, [])
    assert program.stage is Stage.INSERTED
    assert {module.mode for _, module in program.fake_quant_nodes()} == {Mode.OBSERVE}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_with_value_and_batch(bad: float) -> None:
    broken = IMAGE.clone()
    broken[0, 0, 0, 0] = bad
    with pytest.raises(CalibrationError, match=r"value 'x' is not finite in batch 1"):
        fxquant.calibrate(prepared(), [IMAGE, broken])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    program = prepared(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    with torch.no_grad():
        program.module.get_parameter("0.weight")[1, 2] = bad
    with pytest.raises(CalibrationError, match=r"'0\.weight' .*no NaN or Inf; got 1 of 16"):
        fxquant.calibrate(program, [torch.randn(2, 4)])


def spoiled(name: str, value: float) -> Program:
    """A net with a layer norm and a batch norm that stays, one of its numbers replaced."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.LayerNorm(8))
    program = prepared(model)
    owner, _, attribute = name.rpartition(".")
    with torch.no_grad():
        getattr(program.module.get_submodule(owner), attribute)[0] = value
    return program


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("3.weight", math.nan),
        ("3.bias", math.nan),
        ("0.weight", math.inf),
        ("0.running_var", math.nan),
        ("0.running_var", -1.0),
    ],
)
def test_broken_float_parameters_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(CalibrationError, match=f"'{name}'"):
        fxquant.calibrate(spoiled(name, value), [IMAGE])


def test_bare_tensor_is_refused_as_batches() -> None:
    with pytest.raises(CalibrationError, match=r"Put it in a list: \[batch\]"):
        fxquant.calibrate(prepared(), IMAGE)


def test_labels_in_a_batch_are_refused_with_batch_and_remedy() -> None:
    with pytest.raises(CalibrationError, match=r"batch 1: .*leave labels out"):
        fxquant.calibrate(prepared(), [IMAGE, (IMAGE, torch.zeros(2))])


def test_wrong_stage_is_refused_with_the_remedy() -> None:
    with pytest.raises(CalibrationError, match="prepare passes first"):
        fxquant.calibrate(fxquant.capture(residual(), IMAGE), [IMAGE])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.randn(2, 3, 8, 8), r"axis 1"),
        (IMAGE.double(), "float64"),
        ((IMAGE, IMAGE), "arguments"),
        ({"images": IMAGE}, "arguments"),
        ("digits", "tensor"),
    ],
)
def test_batch_that_does_not_fit_is_refused_with_what_was_expected(batch: object, message: str) -> None:
    with pytest.raises(FxquantError, match=message):
        fxquant.calibrate(prepared(), [batch])  # type: ignore[list-item]


def test_training_flags_survive_calibration() -> None:
    program = prepared(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.25)))
    program.module.train()
    fxquant.calibrate(program, [IMAGE])
    assert all(module.training for module in program.module.modules())


def test_placeholder_values_follow_the_graph() -> None:
    assert list(placeholder_values(prepared(), {"x": IMAGE})) == ["x"]


def test_moving_average_follows_the_latest_batches() -> None:
    from fxquant.numerics.estimators import MovingAverage
    from fxquant.spec import QuantSpec

    estimator = MovingAverage(QuantSpec(estimator="moving-average"), (), 0.1)
    estimator.observe(torch.tensor([-1.0, 1.0]))
    estimator.observe(torch.tensor([-2.0, 3.0]))
    assert (float(estimator.low), float(estimator.high)) == (pytest.approx(-1.1), pytest.approx(1.2))


def test_scale_that_a_bias_needed_is_given_back_when_the_bias_shrinks() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(64, 16)
    with torch.no_grad():
        model[0].weight[3] *= 1e-4
    sim = fxquant.QuantSim(model.eval(), x)
    sim.compute_encodings([x], progress=False)
    before = sim.program.fake_quant(sim.program.node("_0_weight_fq"))
    assert before is not None
    scale, bias = before.scale.clone(), sim.model.get_parameter("0.bias")
    kept = bias.detach().clone()
    with torch.no_grad():
        bias[3] = 50.0
    sim.model.eval()
    assert float(before.scale[3]) > 100 * float(scale[3])
    with torch.no_grad():
        bias.copy_(kept)
    sim.model.eval()
    assert torch.equal(before.scale, scale)
