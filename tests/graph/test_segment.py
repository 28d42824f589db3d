"""Segment: some values of a program from others; and what of a program nothing reads any more."""

from __future__ import annotations

import pytest
import torch

from fxquant.calibration import calibrate
from fxquant.errors import FxquantError
from fxquant.graph.liveness import last_uses
from fxquant.graph.manager import PassManager
from fxquant.graph.pass_data import float_twin
from fxquant.graph.program import Program
from fxquant.graph.segment import Segment, in_eval_mode, values_of
from fxquant.passes import InsertFakeQuant, QuantizeBias
from tests.passes.pipelines import IMAGE, before, residual


def calibrated() -> Program:
    program = before(InsertFakeQuant, residual(), IMAGE)
    PassManager([InsertFakeQuant(), QuantizeBias()]).run(program)
    calibrate(program, [IMAGE])
    program.module.eval()
    return program


def output_name(program: Program) -> str:
    (found,) = program.graph.output_node().all_input_nodes
    return found.name


def test_values_are_those_of_the_module() -> None:
    program = calibrated()
    name = output_name(program)
    batches = [IMAGE, IMAGE.flip(0)]
    for batch, values in zip(batches, values_of(program, batches, [name]), strict=True):
        with torch.no_grad():
            assert torch.equal(values[name], program.module(batch))


def test_segment_continues_from_known_values() -> None:
    program = calibrated()
    name = output_name(program)
    (middle,) = values_of(program, [IMAGE], ["pool", name])
    segment = Segment(program, [program.node(name)], [program.node("pool")])
    assert segment.inputs == () and program.node("conv1") not in segment.nodes
    with torch.no_grad():
        again = segment.run({program.node("pool"): middle["pool"]})
        other = segment.run({program.node("pool"): middle["pool"] * 2})
    assert torch.equal(again[program.node(name)], middle[name])
    assert not torch.equal(other[program.node(name)], middle[name])


def test_a_weight_can_be_handed_in_and_gets_its_gradient() -> None:
    program = calibrated()
    name, weight = output_name(program), program.node("conv2_weight_fq")
    segment = Segment(program, [program.node(name)], [weight])
    handed = program.module.get_parameter("conv2.weight").detach().clone().requires_grad_()
    given = dict.fromkeys(segment.inputs, IMAGE)
    (found,) = segment.run({weight: handed, **given}).values()
    found.square().sum().backward()  # type: ignore[no-untyped-call]
    assert handed.grad is not None and bool(handed.grad.any())
    assert program.module.get_parameter("conv2.weight").grad is None


def test_a_missing_value_is_named() -> None:
    program = calibrated()
    with pytest.raises(FxquantError, match="value 'x'"):
        Segment(program, [program.node("conv1")]).run({})


def test_a_known_value_that_nothing_reads_may_be_missing() -> None:
    program = calibrated()
    segment = Segment(program, [program.node("conv1_weight_fq")], [program.node("fc")])
    assert [node.name for node in segment.run({})] == ["conv1_weight_fq"]


def test_wanted_values_are_kept_and_others_are_dropped() -> None:
    program = calibrated()
    nodes = [node for node in program.graph.nodes if node.op != "output"]
    dead = last_uses(nodes, {program.node("pool")})
    dropped = [value for values in dead.values() for value in values]
    assert program.node("pool") not in dropped and len(dropped) == len(set(dropped)) == len(nodes) - 1
    position = {node: index for index, node in enumerate(nodes)}
    for user, values in dead.items():
        for value in values:
            assert all(position[reader] <= position[user] for reader in value.users if reader in position)


def test_modes_are_given_back() -> None:
    program = calibrated()
    program.module.train()
    child = next(iter(program.module.fake_quants.children()))  # type: ignore[union-attr]
    child.eval()
    with pytest.raises(ValueError, match="inside"), in_eval_mode(program.module):
        assert not program.module.training
        raise ValueError("inside")
    assert program.module.training and not child.training


def test_float_twin_computes_in_float_and_leaves_the_program_alone() -> None:
    model = residual()
    program = calibrated()
    twin = float_twin(program)
    with torch.no_grad():
        assert torch.allclose(twin.module(IMAGE), model(IMAGE), atol=1e-5)
        assert not torch.allclose(program.module(IMAGE), model(IMAGE), atol=1e-5)
