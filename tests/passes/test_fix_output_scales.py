"""fix-output-scales: sigmoid, softmax and tanh are on grids with a power of two as scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.errors import ConfigError
from fxquant.graph.manager import PassManager
from fxquant.graph.program import Program, output_spec
from fxquant.numerics.grids import grid_for_range
from fxquant.passes import AssignSpecs, FixOutputScales
from fxquant.spec import QuantSpec
from tests.helpers import Builder, assert_rewrites, aten, run_pass
from tests.passes.harness import reasons

TARGETS = {"sigmoid": aten.sigmoid.default, "tanh": aten.tanh.default}


def between_layers(kind: str, activation: QuantSpec) -> Program:
    build = Builder()
    middle = build.call(kind, TARGETS[kind], build.conv("first", build.input("x", 3, 8, 8), 4))
    build.output(build.conv("last", middle, 4))
    program = build.program()
    PassManager([AssignSpecs(activation=activation, integer_ops=("Tanh",))]).run(program)
    return program


@given(bits=st.integers(2, 16), signed=st.booleans(), kind=st.sampled_from(sorted(TARGETS)))
def test_scale_is_a_power_of_two_and_zero_is_where_it_belongs(bits: int, signed: bool, kind: str) -> None:
    program = between_layers(kind, QuantSpec(bits=bits, signed=signed))
    run_pass(FixOutputScales(), program)
    spec = output_spec(program.node(kind))
    assert spec is not None and program.node("last").meta["input_specs"][0] == spec
    scale, zero_point = grid_for_range(torch.tensor(-9.0), torch.tensor(9.0), spec)
    codes = 2.0**bits
    assert scale == (1 if kind == "sigmoid" else 2) / codes
    assert zero_point == (spec.qmin if kind == "sigmoid" else spec.qmin + codes / 2)


def test_softmax_is_meant_too() -> None:
    build = Builder()
    x = build.input("x", 4, 6)
    build.output(build.linear("last", build.call("soft", aten.softmax.int, build.linear("first", x, 6), -1), 6))
    program = build.program()
    PassManager([AssignSpecs()]).run(program)
    run_pass(FixOutputScales(), program)
    spec = output_spec(program.node("soft"))
    assert spec is not None and spec.fixed == (0.0, 255 / 256)


def test_symmetric_spec_is_declined_with_the_reason() -> None:
    program = between_layers("sigmoid", QuantSpec(signed=True, symmetric=True))
    entry = run_pass(FixOutputScales(), program)
    assert not entry.modified and reasons(entry) == ["sigmoid keeps its estimated range: its spec is symmetric"]


def test_only_named_operations_are_changed() -> None:
    assert not run_pass(FixOutputScales(ops=("Tanh",)), between_layers("sigmoid", QuantSpec())).modified
    with pytest.raises(ConfigError, match="fix-output-scales: ops: operation 'Sigmoids' is unknown"):
        FixOutputScales(ops=("Sigmoids",))


def test_outputs_are_preserved_and_twice_is_once() -> None:
    program = between_layers("sigmoid", QuantSpec())
    entry = run_pass(FixOutputScales(), program, torch.randn(2, 3, 8, 8))
    assert {edit.subject for edit in entry.edits} == {"sigmoid", "last"}
    assert_rewrites(run_pass(FixOutputScales(), program), "", 0)
