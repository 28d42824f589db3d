"""narrow-first-weights: layers that read the model's inputs have narrow weights."""

from __future__ import annotations

import pytest
import torch

from fxquant.errors import ConfigError, PassError
from fxquant.graph.manager import PassManager
from fxquant.graph.program import Program, input_spec
from fxquant.passes import AssignSpecs, NarrowFirstWeights
from fxquant.spec import QuantSpec
from tests.helpers import Builder, assert_rewrites, aten, run_pass

WEIGHT = QuantSpec(signed=True, symmetric=True, strict=True)


def assigned(build: Builder, weight: QuantSpec = WEIGHT) -> Program:
    program = build.program()
    PassManager([AssignSpecs(weight=weight)]).run(program)
    return program


def chain() -> Builder:
    """Two inputs, one of them behind a relu and a sum, into two first layers; then another."""
    build = Builder()
    x, y = build.input("x", 3, 8, 8), build.input("y", 3, 8, 8)
    first = build.conv("first", build.add("add", build.relu("relu", x), y), 4)
    other = build.conv("other", y, 4)
    build.output(build.conv("second", build.call("mul", aten.mul.Tensor, first, other), 4))
    return build


def bits(program: Program, layer: str) -> int:
    spec = input_spec(program.node(layer), 1)
    assert spec is not None
    return spec.bits


def test_first_layers_are_narrowed_and_no_other() -> None:
    program = assigned(chain())
    entry = run_pass(NarrowFirstWeights(), program)
    assert [bits(program, name) for name in ("first", "other", "second")] == [7, 7, 8]
    assert len(entry.edits) == 2


def test_layer_that_reads_an_input_beside_another_layer_is_first() -> None:
    build = Builder()
    x = build.input("x", 3, 8, 8)
    build.output(build.conv("second", build.call("cat", aten.cat.default, [build.conv("first", x, 3), x], 1), 4))
    program = assigned(build)
    run_pass(NarrowFirstWeights(), program)
    assert bits(program, "second") == 7


def test_transposed_convolution_is_a_layer_that_is_not_meant() -> None:
    build = Builder()
    x = build.input("x", 3, 8, 8)
    weight = build.tensor("up.weight", build.random(3, 4, 2, 2))
    up = build.call("up", aten.convolution.default, x, weight, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1)
    build.output(build.conv("second", up, 4))
    program = assigned(build)
    assert not run_pass(NarrowFirstWeights(), program).modified and bits(program, "second") == 8


def test_linear_layers_are_meant_by_name_only() -> None:
    build = Builder()
    build.output(build.linear("fc", build.input("x", 4), 3))
    program = assigned(build)
    assert not run_pass(NarrowFirstWeights(), program).modified
    run_pass(NarrowFirstWeights(ops=("Gemm",)), program)
    assert bits(program, "fc") == 7


@pytest.mark.parametrize(("option", "width"), [(8, 8), (7, 6)])
def test_weights_that_are_narrow_enough_are_left_alone(option: int, width: int) -> None:
    program = assigned(chain(), QuantSpec(bits=width, signed=True, symmetric=True))
    assert not run_pass(NarrowFirstWeights(bits=option), program).modified


def test_unknown_operation_and_impossible_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="narrow-first-weights: ops: operation 'Cnov' is unknown"):
        NarrowFirstWeights(ops=("Cnov",))
    with pytest.raises(PassError, match="narrow-first-weights: bits; expected 2 to 8; got 16"):
        NarrowFirstWeights(bits=16)


def test_outputs_are_preserved_and_twice_is_once() -> None:
    program = assigned(chain())
    run_pass(NarrowFirstWeights(), program, (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)))
    assert_rewrites(run_pass(NarrowFirstWeights(), program), "", 0)
