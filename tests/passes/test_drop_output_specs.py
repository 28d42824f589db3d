"""drop-output-specs: values are quantized where products and their like read them."""

from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from fxquant.errors import ConfigError
from fxquant.graph.manager import PassManager
from fxquant.graph.program import Program, input_spec, output_spec
from fxquant.passes import AssignSpecs, DropOutputSpecs
from fxquant.passes.values import wanted_specs
from tests.helpers import Builder, assert_rewrites, aten, run_pass
from tests.passes.harness import difference, output, reasons
from tests.passes.pipelines import IMAGE, before, residual

PRODUCTS = ("Conv", "Gemm", "MatMul")
TENSORRT = DropOutputSpecs(readers=PRODUCTS, residual=True)


def assigned(build: Builder) -> Program:
    program = build.program()
    PassManager([AssignSpecs()]).run(program)
    return program


def wanted(program: Program) -> set[str]:
    """Names of the activations that are wanted quantized."""
    return {node.name for node in program.graph.nodes if node.op != "get_attr" and wanted_specs(node)}


def two_layers(build: Builder) -> tuple[fx.Node, fx.Node, fx.Node]:
    x = build.input("x", 4, 8, 8)
    return x, build.conv("left", x, 4), build.conv("right", x, 4)


def test_no_output_is_wanted_and_readers_keep_their_wishes() -> None:
    build = Builder()
    x = build.input("x", 3, 8, 8)
    build.output(build.conv("last", build.relu("relu", build.conv("first", x, 4)), 4))
    program = assigned(build)
    entry = run_pass(DropOutputSpecs(), program)
    assert entry.modified and wanted(program) == {"x", "relu"}  # cases 1 and 4: not "first", not "last"
    assert all(output_spec(node) is None for node in program.graph.nodes)
    assert input_spec(program.node("last"), 0) is not None and input_spec(program.node("last"), 1) is not None


def test_other_operations_run_in_float_when_readers_are_named() -> None:
    build = Builder()
    x, left, right = two_layers(build)
    build.output(build.call("mul", aten.mul.Tensor, left, right))
    program = assigned(build)
    run_pass(DropOutputSpecs(readers=PRODUCTS), program)
    assert wanted(program) == {"x"}
    assert program.node("mul").meta["float_reason"].endswith("is not one of the operations that read codes")


def test_identity_is_the_residual_of_a_layer() -> None:
    build = Builder()
    x = build.input("x", 4, 8, 8)
    build.output(build.conv("last", build.add("add", build.conv("conv", x, 4), x), 4))
    program = assigned(build)
    run_pass(TENSORRT, program)
    add = program.node("add")
    assert input_spec(add, 0) is None and input_spec(add, 1) is not None
    assert wanted(program) == {"x", "add"}


def test_second_layer_is_the_residual_of_two() -> None:
    build = Builder()
    _, left, right = two_layers(build)
    build.output(build.add("add", left, right))
    program = assigned(build)
    run_pass(TENSORRT, program)
    assert wanted(program) == {"x", "right"}


@pytest.mark.parametrize("way", ["relu between", "second reader"])
def test_sum_is_float_when_no_addend_is_straight_from_a_layer(way: str) -> None:
    build = Builder()
    x, left, _ = two_layers(build)
    middle = build.relu("relu", left)
    total = build.add("add", middle, x) if way == "relu between" else build.add("add", left, x)
    build.output(total, middle)
    program = assigned(build)
    run_pass(TENSORRT, program)
    assert input_spec(program.node("add"), 0) is None and input_spec(program.node("add"), 1) is None
    assert program.node("add").meta["float_reason"].startswith("no addend comes straight from a layer")


def test_constant_is_no_residual() -> None:
    build = Builder()
    x = build.input("x", 4, 8, 8)
    build.output(build.add("add", build.conv("conv", x, 4), build.tensor("position", build.random(1, 4, 8, 8))))
    program = assigned(build)
    run_pass(TENSORRT, program)
    assert wanted(program) == {"x"} and "input_specs" not in program.node("add").meta


@pytest.mark.parametrize("is_read", [True, False])
def test_pooling_and_concatenation_pass_wishes_on_when_they_are_read(is_read: bool) -> None:
    build = Builder()
    _, left, right = two_layers(build)
    pooled = build.call("pool", aten.max_pool2d.default, build.call("cat", aten.cat.default, [left, right], 1), [2, 2])
    build.output(build.conv("last", pooled, 4) if is_read else pooled)
    program = assigned(build)
    run_pass(TENSORRT, program)
    assert wanted(program) == ({"x", "left", "right", "cat", "pool"} if is_read else {"x"})


@pytest.mark.parametrize("is_read", [True, False])
def test_split_passes_a_wish_for_one_of_its_parts_on(is_read: bool) -> None:
    build = Builder()
    split = build.call("split", aten.split.Tensor, build.conv("first", build.input("x", 4, 8, 8), 4), 2, 1)
    parts = [build.call(f"part_{index}", operator.getitem, split, index) for index in (0, 1)]
    build.output(parts[0], build.conv("last", parts[1], 4) if is_read else parts[1])
    program = assigned(build)
    run_pass(TENSORRT, program)
    assert (input_spec(program.node("split"), 0) is not None) is is_read
    assert wanted(program) == ({"x", "first", "part_1"} if is_read else {"x"})


def test_unknown_reader_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="drop-output-specs: readers: operation 'Convv' is unknown.*'Conv'"):
        DropOutputSpecs(readers=("Convv",))


def test_outputs_are_preserved_and_twice_is_once() -> None:
    model = residual()
    program = before(AssignSpecs, model, IMAGE)
    PassManager([AssignSpecs()]).run(program)
    entry = run_pass(TENSORRT, program, IMAGE)
    assert difference(program, output(model, IMAGE), IMAGE) == 0.0 and reasons(entry) == []
    assert not run_pass(TENSORRT, program).modified


def test_only_the_output_of_a_lone_layer_is_edited() -> None:
    build = Builder()
    build.output(build.conv("conv", build.input("x", 3, 8, 8), 4))
    program = assigned(build)
    entry = run_pass(DropOutputSpecs(), program)
    assert len(entry.edits) == 1 and entry.edits[0].subject == "conv"
    assert_rewrites(run_pass(DropOutputSpecs(), program), "", 0)


STEPS = ("conv", "relu", "pool", "add", "mul", "cat")


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_only_products_sums_and_what_leads_to_them_want_codes(steps: list[tuple[str, int, int]]) -> None:
    build = Builder()
    values = [build.input("x", 4, 8, 8)]
    for number, (kind, first, second) in enumerate(steps):
        values.append(_step(build, f"{kind}_{number}", kind, values[first % len(values)], values[second % len(values)]))
    build.output(values[-1])
    program = assigned(build)
    run_pass(TENSORRT, program, torch.randn(2, 4, 8, 8))
    for node in program.graph.nodes:
        specs = node.meta.get("input_specs", {})
        assert output_spec(node) is None
        kind = node.name.partition("_")[0]
        if node.name.startswith("conv_") and node.op == "call_function":
            assert set(specs) == {0, 1}
        elif kind == "add" and node.op == "call_function":
            assert len(specs) <= 1
        elif kind in ("pool", "cat") and specs:
            assert wanted_specs(node)
        elif kind in ("relu", "mul"):
            assert not specs


def _step(build: Builder, name: str, kind: str, x: fx.Node, y: fx.Node) -> fx.Node:
    if kind == "conv":
        return build.conv(name, x, 4)
    if kind == "relu":
        return build.relu(name, x)
    if kind == "pool":
        return build.call(name, aten.max_pool2d.default, x, [3, 3], [1, 1], [1, 1])
    if kind == "cat":
        return build.conv(f"conv_of_{name}", build.call(name, aten.cat.default, [x, y], 1), 4)
    return build.call(name, aten.add.Tensor if kind == "add" else aten.mul.Tensor, x, y)
