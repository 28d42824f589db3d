"""freeze-observers: fires, declines with the reason, keeps calibrated outputs, twice is once, golden diff."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fxquant.graph.program import Program, Stage
from fxquant.numerics.fake_quant import Mode
from fxquant.passes import FreezeObservers
from fxquant.sim import QuantSim
from fxquant.spec import QuantSpec, SpecOverride
from tests.helpers import Builder, assert_rewrites, quantized_program, run_pass
from tests.passes.harness import difference, reasons

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def modes(program: Program) -> dict[str, Mode]:
    """Mode of every FakeQuant node."""
    return {node.name: module.mode for node, module in program.fake_quant_nodes()}


def observing() -> Program:
    """The quantized program as insert-fake-quant leaves it: everything observes, and nothing has a grid."""
    program = quantized_program()
    program.stage = Stage.INSERTED
    for _, module in program.fake_quant_nodes():
        module.mode = Mode.OBSERVE
        module.scale.fill_(float("nan"))
    return program


def test_calibrated_program_is_frozen_and_computes_what_it_computed() -> None:
    program = quantized_program()
    before = program.module(IMAGE).detach()
    entry = run_pass(FreezeObservers(), program)
    assert set(modes(program).values()) == {Mode.FROZEN} and reasons(entry) == []
    assert difference(program, before, IMAGE) == 0.0
    assert program.stage is Stage.CALIBRATED


def test_weight_grid_is_computed_once_more_and_then_stays() -> None:
    program = quantized_program()
    weight = program.module.get_parameter("conv.weight")
    with torch.no_grad():
        weight.mul_(3.0)
    run_pass(FreezeObservers(), program)
    quant = program.fake_quant(program.node("conv_weight_fq"))
    assert quant is not None
    frozen = quant.scale.clone()
    torch.testing.assert_close(frozen, weight.detach().abs().amax((1, 2, 3)) / 127, rtol=1e-6, atol=0.0)
    with torch.no_grad():
        weight.mul_(2.0)
    program.module(IMAGE)
    assert torch.equal(quant.scale, frozen)


def test_observed_ranges_become_grids() -> None:
    program = observing()
    program.module(IMAGE)
    entry = run_pass(FreezeObservers(), program)
    assert reasons(entry) == [] and set(modes(program).values()) == {Mode.FROZEN}
    quant = program.fake_quant(program.node("x_fq"))
    assert quant is not None
    low, high = float(IMAGE.min()), float(IMAGE.max())
    assert float(quant.scale) == pytest.approx((high - low) / 255, rel=1e-6)
    assert program.stage is Stage.INSERTED


def test_what_saw_no_data_is_declined_with_the_reason_and_goes_on_observing() -> None:
    program = observing()
    entry = run_pass(FreezeObservers(), program)
    assert reasons(entry) == [
        "x_fq not frozen: x has no range: it saw no data",
        "conv_fq not frozen: conv has no range: it saw no data",
    ]
    assert modes(program) == {"x_fq": Mode.OBSERVE, "conv_weight_fq": Mode.FROZEN, "conv_fq": Mode.OBSERVE}


def test_fixed_range_needs_no_data() -> None:
    build = Builder()
    x = build.fake_quant(build.input("x", 4), QuantSpec(fixed=(0.0, 1.0)))
    build.output(build.relu("relu", x))
    program = build.program(stage=Stage.INSERTED)
    quant = program.fake_quant(program.node("x_fq"))
    assert quant is not None
    quant.mode = Mode.OBSERVE
    quant.scale.fill_(float("nan"))
    run_pass(FreezeObservers(), program)
    assert quant.mode is Mode.FROZEN and float(quant.scale) == pytest.approx(1 / 255)


def test_quantizer_that_is_off_stays_off() -> None:
    program = quantized_program()
    quant = program.fake_quant(program.node("conv_fq"))
    assert quant is not None
    quant.mode = Mode.OFF
    run_pass(FreezeObservers(), program)
    assert quant.mode is Mode.OFF


def test_shared_quantizer_is_settled_where_its_owner_calls_it() -> None:
    build = Builder()
    x = build.input("x", 4)
    first = build.fake_quant(x, QuantSpec())
    pooled = build.call("relu", torch.ops.aten.relu.default, first)
    shared = build.graph.create_node("call_module", "fake_quants.x", (pooled,), {"observe": False}, name="relu_fq")
    shared.meta["type"] = pooled.meta["type"]
    build.output(shared)
    program = build.program(stage=Stage.CALIBRATED)
    entry = run_pass(FreezeObservers(), program)
    assert [str(edit) for edit in entry.edits] == ["mode fake_quants.x: frozen"]


def test_freezing_twice_is_freezing_once() -> None:
    program = observing()
    first, second = run_pass(FreezeObservers(), program), run_pass(FreezeObservers(), program)
    assert first.edits and second.edits == () and reasons(first) == reasons(second)


def test_golden_diff() -> None:
    build = Builder()
    build.output(build.relu("relu", build.fake_quant(build.input("x", 4), QuantSpec(), -1.0, 1.55)))
    entry = run_pass(FreezeObservers(), build.program(stage=Stage.CALIBRATED))
    kind = "FakeQuant(x) : float32[s0, 4]  {u8 asymmetric per-tensor"
    expected = f"""
        - x_fq = {kind}, mode=fake, scale=0.01 zp=100}}
        + x_fq = {kind}, mode=frozen, scale=0.01 zp=100}}
    """
    assert_rewrites(entry, expected, edits=1)


@settings(max_examples=15)
@given(st.floats(0.1, 8.0), st.integers(2, 8), st.integers(0, 1000))
def test_random_calibrated_programs_compute_what_they_computed(high: float, bits: int, seed: int) -> None:
    build = Builder(seed)
    conv = build.conv("conv", build.fake_quant(build.input("x", 3, 8, 8), QuantSpec(bits=bits), -high, high), 4)
    build.output(build.fake_quant(build.relu("relu", conv), QuantSpec(bits=bits), 0.0, high))
    program = build.program(stage=Stage.CALIBRATED)
    before = program.module(IMAGE).detach()
    run_pass(FreezeObservers(), program)
    assert difference(program, before, IMAGE) == 0.0


class ZeroInit(nn.Module):
    """A residual block whose last gamma is 0, as zero-initialised residuals begin."""

    def __init__(self, gamma: float = 0.0) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Linear(8, 4)
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        nn.init.constant_(self.norm.weight, gamma)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.stem(x))
        return torch.as_tensor(self.fc(functional.relu(x + self.norm(self.conv(x))).mean((2, 3))))


IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 1, 2, 3] * 2)


def zero_init(training: str = "lsq", gamma: float = 0.0) -> QuantSim:
    torch.manual_seed(0)
    weight = SpecOverride(training=training)
    sim = QuantSim(ZeroInit(gamma).eval(), IMAGES, "int8_per_channel_qat", weight=weight)
    sim.compute_encodings([IMAGES], progress=False)
    return sim


def weight_quantizer(sim: QuantSim) -> Any:
    return sim.program.fake_quant(sim.program.node("conv_weight_folded_fq"))


def epoch(sim: QuantSim, lr: float, steps: int = 12) -> list[float]:
    optimizer, losses = torch.optim.Adam(sim.model.parameters(), lr), []
    sim.model.train()
    for _ in range(steps):
        loss = functional.cross_entropy(sim.model(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def is_exported_exactly(sim: QuantSim, folder: Path) -> bool:
    sim.export(folder)
    found = sim.check_parity(folder / "model.onnx", [(IMAGES,)])
    print(str(found).splitlines()[0])
    return found.exact and len(found.rows) > 0


@pytest.mark.parametrize("training", ["lsq", "min-max", "log2"])
def test_learned_range_of_a_weight_begins_at_what_training_computes(training: str) -> None:
    sim = zero_init(training)
    norm, weight = sim.model.get_submodule("norm"), sim.model.get_parameter("conv.weight").detach()
    ratio = norm.get_submodule("ratio").train()(norm.weight, norm.running_var)
    wanted = (weight * ratio.view(-1, 1, 1, 1)).abs().amax((1, 2, 3)) / 127
    torch.testing.assert_close(weight_quantizer(sim).encoding.scale, wanted, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize(("training", "lr"), [("lsq", 1e-4), ("lsq", 1e-3), ("static", 1e-3)])
def test_frozen_half_way_behind_a_gamma_of_0_it_trains_on_and_exports(
    training: str, lr: float, epochs: int, mode: str, tmp_path: Path
) -> None:
    sim = zero_init(training)
    losses = [loss for _ in range(epochs) for loss in epoch(sim, lr)]
    sim.model.train(mode == "train")
    sim.freeze_encodings()
    assert is_exported_exactly(sim, tmp_path)
    losses += [loss for _ in range(2) for loss in epoch(sim, lr)]
    assert losses[-1] < losses[0]
    assert is_exported_exactly(sim, tmp_path)


def test_weights_behind_a_gamma_of_0_are_still_trained_when_encodings_were_frozen() -> None:
    """A grid of the deployed weight, which is 0, would clip all of it."""
    sim = zero_init("static")
    sim.freeze_encodings()
    with torch.no_grad():
        sim.model.get_parameter("norm.weight").fill_(0.02)
    epoch(sim, 0.0, steps=1)
    grad = sim.model.get_parameter("conv.weight").grad
    assert grad is not None and float((grad != 0).float().mean()) > 0.9


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_scale_that_collapsed_is_frozen_with_the_floor_that_its_bias_needs(mode: str, tmp_path: Path) -> None:
    sim = zero_init(gamma=1.0)
    epoch(sim, 1e-3)
    with torch.no_grad():
        weight_quantizer(sim).range.scale.fill_(-1.0)
    sim.model.train(mode == "train")
    finalized = sim.snapshot().module.get_submodule("fake_quants.conv_weight_folded")
    sim.freeze_encodings()
    assert torch.equal(weight_quantizer(sim).scale, finalized.get_buffer("scale"))
    assert is_exported_exactly(sim, tmp_path)
    epoch(sim, 1e-4)
    assert is_exported_exactly(sim, tmp_path)


@pytest.mark.parametrize("training", ["lsq", "static"])
def test_gammas_that_collapse_leave_a_program_that_is_frozen_and_exported(training: str, tmp_path: Path) -> None:
    sim = zero_init(training, gamma=1.0)
    with torch.no_grad():
        sim.model.get_parameter("norm.weight").fill_(1e-7)
    epoch(sim, 1e-3)
    sim.freeze_encodings()
    epoch(sim, 1e-3)
    assert is_exported_exactly(sim, tmp_path)
