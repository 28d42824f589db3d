"""freeze-observers: fires, declines with the reason, keeps calibrated outputs, twice is once, golden diff."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.graph.program import Program, Stage
from fxquant.numerics.fake_quant import Mode
from fxquant.passes import FreezeObservers
from fxquant.spec import QuantSpec
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
