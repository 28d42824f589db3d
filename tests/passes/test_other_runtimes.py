"""What the quantizing passes do for runtimes other than onnxruntime: options, and what the target decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import fx

from fxquant.errors import ConfigError
from fxquant.graph.manager import PassManager
from fxquant.graph.program import Program, input_spec, output_spec
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.passes import (
    AbsorbActivation,
    AssignSpecs,
    FixOutputScales,
    InsertFakeQuant,
    SelectPerChannel,
    ShareEncodings,
)
from fxquant.passes.share_encodings import owner_of
from fxquant.passes.values import wanted_specs
from fxquant.spec import Granularity, Limits, QuantSpec, SpecOverride, Target
from tests.helpers import Builder, assert_rewrites, aten, run_pass
from tests.passes.harness import reasons

S8 = QuantSpec(signed=True)
JOIN = ShareEncodings(concat=True)


def prepared(build: Builder, *passes: Any, target: Target = Target.XNNPACK) -> Program:
    program = build.program()
    program.target = target
    PassManager(list(passes)).run(program)
    return program


def transposed(build: Builder, name: str, x: fx.Node, channels: int) -> fx.Node:
    weight = build.tensor(f"{name}.weight", build.random(x.meta["type"].shape[1], channels, 2, 2))
    geometry = ([2, 2], [0, 0], [1, 1], True, [0, 0], 1)
    return build.call(name, aten.convolution.default, x, weight, None, *geometry, path=name)


def decoder() -> Builder:
    build = Builder()
    up = build.relu("relu", transposed(build, "up", build.input("x", 3, 4, 4), 4))
    build.output(build.conv("last", build.call("tanh", aten.tanh.default, up), 2))
    return build


# --- assign-specs: integer_ops ---------------------------------------------------------------------------------------


def test_operations_that_the_target_has_kernels_for_are_quantized() -> None:
    program = prepared(decoder(), AssignSpecs(integer_ops=("ConvTranspose", "tanh")))
    up, tanh = program.node("up"), program.node("tanh")
    assert input_spec(up, 1) == AssignSpecs().weight and input_spec(up, 0) is not None
    assert output_spec(up) is not None and output_spec(tanh) is not None and input_spec(tanh, 0) is not None
    assert "float_reason" not in up.meta and "float_reason" not in tanh.meta


def test_they_stay_in_float_by_default() -> None:
    program = prepared(decoder(), AssignSpecs())
    assert output_spec(program.node("up")) is None and input_spec(program.node("tanh"), 0) is None
    assert program.node("up").meta["float_reason"] and program.node("tanh").meta["float_reason"]


def test_plain_convolutions_are_not_meant_by_the_name_of_transposed_ones() -> None:
    program = prepared(decoder(), AssignSpecs(), SelectPerChannel(ops=("ConvTranspose",)))
    spec = input_spec(program.node("last"), 1)
    assert spec is not None and spec.granularity == Granularity()


def test_relu_behind_such_an_operation_is_absorbed() -> None:
    program = prepared(decoder(), AssignSpecs(activation=S8, integer_ops=("ConvTranspose",)), AbsorbActivation())
    spec = output_spec(program.node("relu")) or next(iter(wanted_specs(program.node("relu"))))
    assert output_spec(program.node("up")) is None and spec.limits == Limits(0.0, None, -128)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AssignSpecs(integer_ops=("ConvTransposed",)),
        lambda: SelectPerChannel(ops=("ConvTransposed",)),
        lambda: ShareEncodings(ops=("ConvTransposed",)),
    ],
)
def test_unknown_operation_is_refused_with_the_nearest_name(make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match="operation 'ConvTransposed' is unknown. Did you mean 'ConvTranspose'"):
        make()


# --- select-per-channel: change --------------------------------------------------------------------------------------


def test_weights_change_their_spec_where_they_become_per_channel() -> None:
    build = Builder()
    hidden = build.conv("conv", build.input("x", 3, 4, 4), 4)
    build.output(build.linear("fc", hidden, 2))
    unsigned = QuantSpec()
    change = SpecOverride(signed=True, symmetric=True, strict=True)
    program = prepared(build, AssignSpecs(weight=unsigned), SelectPerChannel(ops=("Conv",), change=change))
    signed = QuantSpec(signed=True, symmetric=True, strict=True, granularity=Granularity(0))
    assert input_spec(program.node("conv"), 1) == signed and input_spec(program.node("fc"), 1) == unsigned
    assert not run_pass(SelectPerChannel(ops=("Conv",), change=change), program).modified


def test_transposed_convolution_is_per_channel_on_axis_1() -> None:
    program = prepared(decoder(), AssignSpecs(integer_ops=("ConvTranspose",)), SelectPerChannel())
    spec = input_spec(program.node("up"), 1)
    assert spec is not None and spec.granularity == Granularity(1)


# --- share-encodings: concatenations of other targets, averages -------------------------------------------------------


def concatenation() -> Builder:
    """relu(a) with b, then that with the pooled relu and a third convolution."""
    build = Builder()
    x = build.input("x", 4, 8, 8)
    first = build.relu("relu", build.conv("a", x, 4))
    inner = build.call("inner", aten.cat.default, [first, build.conv("b", x, 4)], 1)
    pooled = build.call("pool", aten.max_pool2d.default, first, [1, 1], [1, 1])
    outer = build.call("outer", aten.cat.default, [inner, pooled, build.conv("c", x, 4)], 1)
    build.output(build.conv("last", outer, 4))
    return build


def test_all_that_is_joined_shares_one_grid_without_limits() -> None:
    program = prepared(concatenation(), AssignSpecs(activation=S8), AbsorbActivation(), JOIN)
    owners = {node.name: owner_of(node) for node in program.graph.nodes}
    assert {owners[name] for name in ("relu", "inner", "b", "pool", "outer", "c")} == {"outer"}
    assert {spec for name in owners for spec in wanted_specs(program.node(name)) if name in ("relu", "pool", "c")} == {
        S8
    }
    PassManager([InsertFakeQuant()]).run(program)
    shared = [node for node, _ in program.fake_quant_nodes() if node.target == "fake_quants.outer"]
    assert len(shared) == 6 and [node.name for node in shared if not node.kwargs] == ["outer_fq"]
    module = program.module.get_submodule("fake_quants.outer")
    assert isinstance(module, FakeQuant) and module.spec == S8


def test_relu_keeps_its_limits_on_onnxruntime() -> None:
    program = prepared(concatenation(), AssignSpecs(), AbsorbActivation(), JOIN, target=Target.ONNXRUNTIME_X64)
    spec = output_spec(program.node("relu"))
    assert spec is not None and spec.limits == Limits(0.0, None, 0) and owner_of(program.node("relu")) == "relu"


def test_fixed_range_and_constant_keep_their_grids_in_a_concatenation() -> None:
    build = Builder()
    gate = build.call("gate", aten.sigmoid.default, build.conv("a", build.input("x", 4, 8, 8), 4))
    token = build.tensor("token", build.random(1, 4, 8, 8))
    build.output(build.call("cat", aten.cat.default, [gate, token], 0))
    program = prepared(build, AssignSpecs(activation=S8), FixOutputScales())
    entry = run_pass(JOIN, program)
    assert owner_of(program.node("gate")) == "gate" and owner_of(program.node("token")) == "token"
    assert reasons(entry)[-1] == "token keeps its grid: it is a constant, whose grid follows it"
    spec = output_spec(program.node("gate"))
    assert spec is not None and spec.fixed is not None and spec.limits == Limits(0.0, 1.0)


def test_average_shares_its_input_s_grid_on_request() -> None:
    def average() -> Builder:
        build = Builder()
        x = build.relu("relu", build.conv("conv", build.input("x", 3, 8, 8), 4))
        build.output(build.conv("last", build.call("avg", aten.avg_pool2d.default, x, [2, 2]), 4))
        return build

    program = prepared(average(), AssignSpecs(activation=S8), AbsorbActivation(), ShareEncodings(ops=("avg_pool",)))
    assert (
        owner_of(program.node("avg")) == "relu"
        and wanted_specs(program.node("avg")).keys() == wanted_specs(program.node("relu")).keys()
    )
    free = prepared(average(), AssignSpecs(activation=S8), AbsorbActivation(), ShareEncodings())
    assert owner_of(free.node("avg")) == "avg"


def test_joining_twice_is_once() -> None:
    program = prepared(concatenation(), AssignSpecs(activation=S8), AbsorbActivation(), JOIN)
    assert_rewrites(run_pass(JOIN, program), "", 0)


# --- absorb-activation behind a concatenation -------------------------------------------------------------------------


@pytest.mark.parametrize("target", [Target.QNN_HTP, Target.ONNXRUNTIME_X64])
def test_relu_behind_a_concatenation_is_absorbed_by_onnxruntime_alone(target: Target) -> None:
    build = Builder()
    x = build.input("x", 4, 8, 8)
    joined = build.call("cat", aten.cat.default, [build.conv("a", x, 4), x], 1)
    build.output(build.conv("last", build.relu("relu", joined), 4))
    program = prepared(build, AssignSpecs(), target=target)
    entry = run_pass(AbsorbActivation(), program)
    absorbed = target is Target.ONNXRUNTIME_X64
    assert (output_spec(program.node("cat")) is None) is absorbed
    wanted = (
        [] if absorbed else ["relu not absorbed: cat is a concatenation, whose output is on the grid of its inputs"]
    )
    assert reasons(entry) == wanted
