"""apply-placement: neighbourhoods, supergroups, symmetry, constraints, exceptions, rules, and what it tells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from fxquant.errors import ConfigError, PassError
from fxquant.graph.manager import PassManager
from fxquant.graph.program import Program, output_spec
from fxquant.graph.trace import PassEntry
from fxquant.passes import ApplyPlacement, InsertFakeQuant, ShareEncodings
from fxquant.placement import Rule
from fxquant.placement.sections import (
    Defaults,
    EncodingConstraints,
    KernelType,
    ModelInput,
    ModelOutput,
    OpSettings,
    OpType,
    ParamSettings,
    Sections,
    Supergroup,
    SupportedKernel,
)
from fxquant.spec import QuantSpec, SpecOverride
from tests.helpers import Builder, run_pass
from tests.placement.nets import on_off

aten = torch.ops.aten
ON = Defaults(ops=OpSettings(is_output_quantized=True), params=ParamSettings(is_quantized=True, is_symmetric=True))
CONV_RELU = (Supergroup(("Conv", "Relu")),)


def chain(*kinds: str) -> Program:
    """An image through these operations, each called by its kind."""
    build = Builder()
    value = build.input("x", 4, 8, 8)
    for kind in kinds:
        value = step(build, kind, value)
    build.output(value)
    return build.program()


def step(build: Builder, kind: str, x: fx.Node) -> fx.Node:
    calls: dict[str, Any] = {
        "relu": lambda: build.relu("relu", x),
        "relu6": lambda: build.call("relu6", aten.hardtanh.default, x, 0.0, 6.0),
        "conv": lambda: build.conv("conv", x, 4),
        "depthwise": lambda: build.conv("depthwise", x, 4, groups=4),
        "norm": lambda: build.batch_norm("norm", x),
        "pool": lambda: build.call("pool", aten.max_pool2d.default, x, [2, 2]),
        "pad": lambda: build.call("pad", aten.constant_pad_nd.default, x, [1, 1, 1, 1]),
        "ones": lambda: build.call("ones", aten.constant_pad_nd.default, x, [1, 1, 1, 1], 1.0),
        "tanh": lambda: build.call("tanh", aten.tanh.default, x),
        "sigmoid": lambda: build.call("sigmoid", aten.sigmoid.default, x),
        "half": lambda: build.call("half", aten.mul.Tensor, x, 0.5),
        "shift": lambda: build.add("shift", x, build.tensor("table", build.random(8))),
    }
    found: fx.Node = calls[kind]()
    return found


def placed(program: Program, **options: Any) -> PassEntry:
    """Run the pass with these options, then what makes FakeQuants of its specs; the pass's entry in the trace."""
    trace = PassManager([ApplyPlacement(**options), ShareEncodings(concat=True), InsertFakeQuant()]).run(program)
    return trace.entries[0]


def turned_on(program: Program) -> list[str]:
    return [name for name, state in on_off(program).items() if state == "on"]


def spec_of(program: Program, value: str) -> str:
    return next(
        str(module.spec) for node, module in program.fake_quant_nodes() if node.all_input_nodes[0].name == value
    )


def test_pass_fires_once_and_only_annotates() -> None:
    program = chain("conv", "relu")
    entry = run_pass(ApplyPlacement(defaults=ON, supergroups=CONV_RELU), program, torch.randn(2, 4, 8, 8))
    assert program.node("relu").meta["rule"] == "defaults.ops.is_output_quantized"
    assert program.node("conv").meta["float_reason"] == "supergroups[0]: Conv + Relu"
    assert program.node("conv").meta["input_rules"] == {1: "defaults.params.is_quantized"}
    assert len(entry.edits) == 5  # a reason, an output spec with its rule, a weight spec with its rule
    with pytest.raises(PassError, match="cannot run"):
        run_pass(ApplyPlacement(defaults=ON), program)


def test_everything_is_off_without_sections() -> None:
    program = chain("conv", "relu", "pool")
    placed(program)
    assert on_off(program) == {}
    assert program.node("relu").meta["float_reason"] == "no section turns it on"
    assert program.node("pool").meta["float_reason"].startswith("it only moves what it reads")


def test_input_switch_acts_on_the_producer_and_on_all_its_readers() -> None:
    build = Builder()
    x = build.input("x", 4, 8, 8)
    relu = build.relu("relu", x)
    build.output(build.conv("conv", relu, 4), build.call("gelu", aten.gelu.default, relu))
    program = build.program()
    placed(program, op_type={"Conv": OpType(is_input_quantized=True)})
    assert on_off(program) == {"relu": "on"}
    assert program.node("relu").meta["rule"] == "op_type.Conv.is_input_quantized"
    assert [str(user.args[0]) for user in program.graph.nodes if user.name in ("conv", "gelu")] == ["relu_fq"] * 2


def test_input_switch_acts_through_what_only_moves_codes() -> None:
    program = chain("relu", "pool", "conv")
    placed(program, op_type={"Conv": OpType(is_input_quantized=True)})
    assert on_off(program) == {"relu": "on", "pool": "codes"}


def test_input_switch_false_turns_a_producer_off() -> None:
    program = chain("relu", "conv")
    placed(program, defaults=ON, op_type={"Conv": OpType(is_input_quantized=False)})
    assert turned_on(program) == ["conv_weight", "conv"]
    assert program.node("relu").meta["float_reason"] == "op_type.Conv.is_input_quantized is false"


def test_input_switch_speaks_of_constants_too() -> None:
    program = chain("shift")
    placed(program, op_type={"Add": OpType(is_input_quantized=True)})
    assert turned_on(program) == ["x", "table"]


def test_contradiction_within_a_section_names_both_places() -> None:
    op_type = {"Conv": OpType(is_output_quantized=False), "Relu": OpType(is_input_quantized=True)}
    with pytest.raises(PassError) as caught:
        placed(chain("conv", "relu"), op_type=op_type)
    assert (
        "op_type.Relu.is_input_quantized contradicts op_type.Conv.is_output_quantized at the value of node 'conv'"
        in str(caught.value)
    )


def test_contradiction_names_the_file() -> None:
    op_type = {"Conv": OpType(is_output_quantized=False), "Relu": OpType(is_input_quantized=True)}
    item = ApplyPlacement(op_type=op_type).placed("my.toml: prepare[3] apply-placement")
    with pytest.raises(PassError, match=r"\(my.toml: prepare\[3\] apply-placement\)"):
        run_pass(item, chain("conv", "relu"))


def test_sections_override_in_their_order() -> None:
    sections = Sections(
        defaults=Defaults(ops=OpSettings(is_output_quantized=True)),
        op_type={"Relu": OpType(is_output_quantized=False), "Conv": OpType(is_output_quantized=True)},
        supergroups=CONV_RELU,
        model_input=ModelInput(True),
        model_output=ModelOutput(True),
    )
    program = chain("conv", "relu")
    placed(program, **{name: getattr(sections, name) for name in vars(sections)})
    assert turned_on(program) == ["x", "relu"]
    assert program.node("conv").meta["float_reason"] == "supergroups[0]: Conv + Relu"  # op_type had it on
    assert program.node("relu").meta["rule"] == "model_output.is_output_quantized"  # op_type had it off


def test_model_output_of_moved_codes_turns_their_source_on() -> None:
    program = chain("conv", "pool")
    placed(program, model_output=ModelOutput(True))
    assert on_off(program) == {"conv": "on", "pool": "codes"}


def test_model_output_false_leaves_on_what_the_output_only_moves() -> None:
    program = chain("conv", "pool")
    placed(program, defaults=ON, model_output=ModelOutput(False))
    assert on_off(program) == {"conv_weight": "on", "conv": "on", "pool": "codes"}
    program = chain("pool", "conv")
    placed(program, defaults=ON, model_output=ModelOutput(False))
    assert turned_on(program) == ["conv_weight"]


def test_model_input_false_overrides_op_type() -> None:
    program = chain("conv")
    placed(program, op_type={"Conv": OpType(is_input_quantized=True)}, model_input=ModelInput(False))
    assert on_off(program) == {}
    assert program.node("x").meta["float_reason"] == "model_input.is_input_quantized is false"


def test_longest_supergroup_wins_and_no_operation_is_in_two() -> None:
    groups = (Supergroup(("Relu", "Conv")), Supergroup(("Conv", "Relu")), Supergroup(("Relu", "Conv", "Sigmoid")))
    program = chain("relu", "conv", "sigmoid")
    placed(program, defaults=ON, supergroups=groups)
    assert turned_on(program) == ["conv_weight", "sigmoid"]
    assert program.node("relu").meta["float_reason"] == "supergroups[2]: Relu + Conv + Sigmoid"


def test_supergroup_needs_a_single_reader() -> None:
    build = Builder()
    conv = build.conv("conv", build.input("x", 4, 8, 8), 4)
    build.output(build.relu("relu", conv), conv)
    program = build.program()
    placed(program, defaults=ON, supergroups=CONV_RELU)
    assert turned_on(program) == ["conv_weight", "conv", "relu"]


def test_supergroup_passes_over_a_batch_norm_that_could_be_folded() -> None:
    program = chain("conv", "norm", "relu")
    placed(program, defaults=ON, supergroups=CONV_RELU)
    assert turned_on(program) == ["conv_weight", "relu"]
    named = chain("conv", "norm", "relu")
    placed(named, defaults=ON, supergroups=(*CONV_RELU, Supergroup(("Conv", "BatchNormalization", "Relu"))))
    assert named.node("norm").meta["float_reason"] == "supergroups[1]: Conv + BatchNormalization + Relu"


def test_supergroup_that_names_a_folded_batch_norm_matches() -> None:
    program = chain("conv", "relu")
    placed(program, defaults=ON, supergroups=(Supergroup(("Conv", "BatchNormalization", "Relu")),))
    assert turned_on(program) == ["conv_weight", "relu"]
    assert program.node("conv").meta["float_reason"] == "supergroups[0]: Conv + BatchNormalization + Relu"
    both = chain("conv", "relu")
    placed(both, defaults=ON, supergroups=(Supergroup(("Conv", "BatchNormalization")), *CONV_RELU))
    assert both.node("conv").meta["float_reason"] == "supergroups[1]: Conv + Relu"
    assert not [note for note in both.notes if "matches nothing" in note.text]


def test_depthwise_convolution_fuses_with_its_activation() -> None:
    program = chain("depthwise", "relu6")
    placed(program, defaults=ON, supergroups=(Supergroup(("Conv", "Clip")),))
    assert turned_on(program) == ["depthwise_weight", "relu6"]
    assert spec_of(program, "relu6") == "u8 asymmetric per-tensor within [0, 6]"


def test_supergroup_through_a_pooling_breaks_its_codes() -> None:
    program = chain("relu", "pool", "conv")
    placed(program, defaults=ON, supergroups=(Supergroup(("MaxPool", "Conv")),))
    assert on_off(program) == {"relu": "on", "conv_weight": "on", "conv": "on"}


def test_matmul_add_is_one_operation_with_a_constant() -> None:
    build = Builder()
    product = build.call("product", aten.matmul.default, build.input("x", 6, 8), build.tensor("w", build.random(8, 8)))
    total = build.add("total", product, build.tensor("table", build.random(8)))
    other = build.call("other", aten.matmul.default, total, build.input("y", 8, 4))
    build.output(build.add("last", other, build.input("z", 6, 4)))
    program = build.program()
    placed(program, defaults=ON, supergroup_pass_list=("MatmulAdd",))
    assert turned_on(program) == ["w", "total", "other", "last"]
    assert program.node("product").meta["float_reason"] == "supergroup_pass_list[0]: MatMul + Add"


def test_padding_passes_codes_on_unless_it_adds_other_numbers_than_zero() -> None:
    program = chain("relu", "pad", "pool")
    placed(program, defaults=ON)
    assert on_off(program) == {"relu": "on", "pad": "codes", "pool": "codes"}
    assert {str(node.target) for node, _ in program.fake_quant_nodes()} == {"fake_quants.relu"}
    other = chain("relu", "ones")
    placed(other, defaults=ON)
    assert on_off(other) == {"relu": "on", "ones": "on"}


def test_product_with_a_number_is_off_until_a_rule_turns_it_on() -> None:
    program = chain("relu", "half")
    placed(program, defaults=ON, model_output=ModelOutput(True))
    assert turned_on(program) == ["relu"]
    program = chain("relu", "half")
    placed(program, defaults=ON, rules=(Rule(node="half", quantize=True),))
    assert turned_on(program) == ["relu", "half"]


def test_rules_come_last_and_node_rules_beat_module_rules() -> None:
    rules = (Rule(module="conv|relu", quantize=False), Rule(node="relu", quantize=True), Rule(node="x", quantize=False))
    program = chain("conv", "relu")
    placed(program, defaults=ON, model_input=ModelInput(True), model_output=ModelOutput(True), rules=rules)
    assert turned_on(program) == ["relu"]
    assert program.node("conv").meta["float_reason"] == "excluded by rule module 'conv|relu' (rules[0])"
    assert program.node("x").meta["float_reason"] == "excluded by rule node 'x' (rules[2])"


def test_rules_change_bits_of_values_and_weights() -> None:
    rules = (Rule(op="convolution", output=SpecOverride(bits=16), weight=SpecOverride(bits=4)),)
    program = chain("conv", "relu")
    placed(program, defaults=ON, rules=rules)
    assert spec_of(program, "conv") == "u16 asymmetric per-tensor"
    assert spec_of(program, "conv_weight") == "s4 symmetric per-tensor"


def test_input_of_a_rule_changes_what_the_producer_makes() -> None:
    program = chain("relu", "conv")
    placed(program, defaults=ON, rules=(Rule(node="conv", input=SpecOverride(bits=16)),))
    assert spec_of(program, "relu") == "u16 asymmetric per-tensor within [0, free]"


@pytest.mark.parametrize("key", [{"op": "Conv"}, {"module": "conv"}, {"node": "conv"}])
def test_rules_reach_weight_and_input_inside_a_supergroup(key: dict[str, str]) -> None:
    rule = Rule(**key, weight=SpecOverride(bits=4), input=SpecOverride(bits=6))  # type: ignore[arg-type]
    program = chain("sigmoid", "conv", "relu")
    entry = placed(program, defaults=ON, supergroups=CONV_RELU, rules=(rule,))
    assert spec_of(program, "conv_weight") == "s4 symmetric per-tensor"
    assert spec_of(program, "sigmoid") == "u6 asymmetric per-tensor within [0, 1]"  # what it was, in fewer bits
    assert spec_of(program, "relu") == "u8 asymmetric per-tensor within [0, free]"
    assert "conv" not in on_off(program)
    assert entry.misses == ()


def test_input_of_a_sum_inside_a_supergroup_reaches_both_producers() -> None:
    build = Builder()
    x = build.input("x", 4, 8, 8)
    total = build.add("total", build.conv("left", x, 4), build.conv("right", x, 4))
    build.output(build.relu("relu", total))
    program = build.program()
    groups = (Supergroup(("Add", "Relu")),)
    placed(program, defaults=ON, supergroups=groups, rules=(Rule(node="total", input=SpecOverride(bits=6)),))
    assert spec_of(program, "left") == spec_of(program, "right") == "u6 asymmetric per-tensor"


def test_output_inside_a_supergroup_goes_to_the_relu_that_ends_it() -> None:
    rules = (Rule(op="Conv", output=SpecOverride(bits=6)), Rule(op="Relu", output=SpecOverride(estimator="mse")))
    program = chain("conv", "relu")
    placed(program, defaults=ON, supergroups=CONV_RELU, rules=rules)
    assert spec_of(program, "relu") == "u6 asymmetric per-tensor within [0, free] by mse"
    assert program.node("relu").meta["rule"] == "op 'Conv' (rules[0]), op 'Relu' (rules[1])"
    other = chain("conv", "sigmoid")
    entry = placed(other, defaults=ON, supergroups=(Supergroup(("Conv", "Sigmoid")),), rules=rules[:1])
    assert spec_of(other, "sigmoid").startswith("u8")
    assert entry.misses[0].reason == "op 'Conv' decides nothing: in float stays 'conv' (supergroups[0]: Conv + Sigmoid)"


def test_rule_on_a_weight_that_sections_leave_in_float_is_told_so() -> None:
    program = chain("conv", "relu")
    options = {"defaults": ON, "supergroups": CONV_RELU, "params": {"weight": ParamSettings(False)}}
    rules = (Rule(node="conv", weight=SpecOverride(bits=4)),)
    entry = placed(program, model_input=ModelInput(True), rules=rules, **options)
    reason = "node 'conv' decides nothing: what it sets has no spec of its own at 'conv'"
    assert [miss.reason for miss in entry.misses] == [reason]


@pytest.mark.parametrize("kind", ["conv", "half"])
def test_rule_that_turns_a_value_on_is_why(kind: str) -> None:
    program = chain("tanh", kind, "relu")
    placed(program, defaults=ON, supergroups=CONV_RELU, rules=(Rule(node=kind, quantize=True),))
    assert program.node(kind).meta["rule"] == f"node '{kind}' (rules[0])"
    assert program.node("relu").meta["rule"] == "defaults.ops.is_output_quantized"


def test_rule_that_matches_nothing_is_refused() -> None:
    with pytest.raises(PassError, match="apply-placement: rules\\[0\\]: node 'cnov' is not in the graph"):
        placed(chain("conv"), rules=(Rule(node="cnov", quantize=False),))


@pytest.mark.parametrize(
    ("defaults", "activation", "value", "spec"),
    [
        (ON, QuantSpec(), "conv", "u8 asymmetric per-tensor"),
        (replace(ON, ops=OpSettings(None, True, True)), QuantSpec(), "conv", "u8 symmetric per-tensor"),
        (replace(ON, ops=OpSettings(None, True, True)), QuantSpec(signed=True), "conv", "s8 symmetric per-tensor"),
        (
            replace(ON, ops=OpSettings(None, True, True), strict_symmetric=True),
            QuantSpec(signed=True),
            "conv",
            "s8 strict symmetric per-tensor",
        ),
        (
            replace(ON, ops=OpSettings(None, True, True), strict_symmetric=True),
            QuantSpec(),
            "conv",
            "u8 symmetric per-tensor",
        ),
        (replace(ON, strict_symmetric=True), QuantSpec(), "conv_weight", "s8 strict symmetric per-tensor"),
        (replace(ON, params=ParamSettings(True, False)), QuantSpec(), "conv_weight", "u8 asymmetric per-tensor"),
        (
            replace(ON, ops=OpSettings(None, True, True), unsigned_symmetric=True),
            QuantSpec(signed=True),
            "conv",
            "s8 symmetric per-tensor",
        ),
        (
            replace(ON, ops=OpSettings(None, True, True), unsigned_symmetric=True),
            QuantSpec(signed=True),
            "relu",
            "u8 symmetric per-tensor within [0, free]",
        ),
    ],
)
def test_symmetry_is_what_the_sections_say(defaults: Defaults, activation: QuantSpec, value: str, spec: str) -> None:
    program = chain("conv", "relu")
    placed(program, defaults=defaults, activation=activation)
    assert spec_of(program, value) == spec


def test_strictness_that_no_quantizer_has_is_told() -> None:
    program = chain("relu")
    placed(program, defaults=replace(ON, ops=OpSettings(None, True, True), strict_symmetric=True))
    text = "defaults.strict_symmetric: unsigned symmetric activations keep their lowest code"
    assert [note.text for note in program.notes] == [text]


def test_rows_of_an_embedding_that_are_listed_have_a_grid_of_their_own() -> None:
    build = Builder()
    ids = build.input("ids", 6, dtype=torch.int64)
    build.output(build.call("rows", aten.embedding.default, build.tensor("table.weight", build.random(9, 4)), ids))
    program = build.program()
    placed(program, defaults=ON, op_type={"Gather": OpType(is_output_quantized=True)})
    assert on_off(program) == {"table_weight": "on", "rows": "on"}
    assert {str(node.target) for node, _ in program.fake_quant_nodes()} == {
        "fake_quants.table_weight",
        "fake_quants.rows",
    }


def test_unsigned_symmetric_grid_starts_at_zero() -> None:
    program = chain("relu")
    placed(program, defaults=replace(ON, ops=OpSettings(None, True, True), unsigned_symmetric=True))
    (quant,) = (module for _, module in program.fake_quant_nodes())
    quant.set_range(torch.tensor(0.0), torch.tensor(2.55))
    assert int(quant.zero_point) == 0
    assert float(quant.scale) == pytest.approx(0.01)


def test_symmetry_of_one_type_reaches_what_its_entry_turns_on() -> None:
    program = chain("relu", "conv")
    placed(program, defaults=ON, op_type={"Conv": OpType(is_symmetric=True)})
    assert [spec_of(program, name) for name in ("relu", "conv")] == [
        "u8 asymmetric per-tensor within [0, free]",
        "u8 symmetric per-tensor",
    ]
    program = chain("sigmoid", "conv")
    placed(program, defaults=ON, op_type={"Conv": OpType(is_symmetric=True, is_input_quantized=True)})
    assert spec_of(program, "sigmoid") == "u8 symmetric per-tensor within [0, 1]"


def test_encoding_constraints_fix_or_limit_the_range() -> None:
    op_type = {
        "Tanh": OpType(encoding_constraints=EncodingConstraints(-1.0, 1.0)),
        "Sigmoid": OpType(encoding_constraints=EncodingConstraints(0.0, 1.0)),
        "Conv": OpType(encoding_constraints=EncodingConstraints(-2.0)),
    }
    program = chain("tanh", "sigmoid", "conv")
    placed(program, defaults=ON, op_type=op_type, activation=QuantSpec(estimator="mse"))
    assert spec_of(program, "tanh") == "u8 symmetric per-tensor fixed [-1, 1]"
    assert spec_of(program, "sigmoid") == "u8 asymmetric per-tensor fixed [0, 1]"
    assert spec_of(program, "conv") == "u8 asymmetric per-tensor within [-2, free] by mse"


def product() -> Program:
    """x @ transpose(sigmoid(y)), and a layer norm of it."""
    build = Builder()
    right = build.call("right", aten.sigmoid.default, build.input("y", 6, 8))
    turned = build.call("turned", aten.transpose.int, right, 1, 2)
    scores = build.call("scores", aten.matmul.default, build.input("x", 6, 8), turned)
    weight, bias = build.tensor("norm.weight", build.random(6)), build.tensor("norm.bias", build.random(6))
    build.output(build.call("norm", aten.layer_norm.default, scores, [6], weight, bias))
    return build.program()


@pytest.mark.parametrize(
    ("version", "bits", "right"),
    [
        (None, 16, "u16 asymmetric"),
        ("V66", 16, "u8 symmetric"),
        ("v69", 8, "u8 symmetric"),
        ("V73", 8, "u8 asymmetric"),
        ("V81", 16, "u16 symmetric"),
        ("Z1", 16, "u16 asymmetric"),
    ],
)
def test_second_factor_of_a_product_obeys_the_hardware(version: str | None, bits: int, right: str) -> None:
    program = product()
    placed(program, defaults=replace(ON, hw_version=version), activation=QuantSpec(bits=bits))
    assert spec_of(program, "right").startswith(right)
    assert spec_of(program, "scores") == f"u{bits} asymmetric per-tensor"


def test_why_names_the_sections_that_decided_the_spec() -> None:
    program = product()
    placed(program, defaults=replace(ON, hw_version="V66"), activation=QuantSpec(bits=16))
    assert program.node("right").meta["rule"] == "defaults.ops.is_output_quantized, defaults.hw_version"
    assert program.node("scores").meta["rule"] == "defaults.ops.is_output_quantized"
    program = chain("conv", "relu")
    op_type = {"Conv": OpType(is_symmetric=True), "Relu": OpType(encoding_constraints=EncodingConstraints(0.0, 6.0))}
    placed(program, defaults=ON, op_type=op_type)
    whys = [program.node(name).meta["rule"] for name in ("conv", "relu")]
    places = ["op_type.Conv.is_symmetric", "op_type.Relu.encoding_constraints"]
    assert whys == [f"defaults.ops.is_output_quantized, {place}" for place in places]


@pytest.mark.parametrize(("version", "bits", "symmetric"), [("V73", 8, False), ("V73", 16, True), (None, 16, False)])
def test_layer_norm_weight_obeys_the_hardware(version: str | None, bits: int, symmetric: bool) -> None:
    program = product()
    op_type = {"LayerNormalization": OpType(params={"weight": ParamSettings(is_symmetric=False)})}
    weight = QuantSpec(bits=bits, signed=True, symmetric=True)
    placed(program, defaults=replace(ON, hw_version=version), op_type=op_type, weight=weight)
    expected = f"s{bits} symmetric" if symmetric else f"u{bits} asymmetric"
    assert spec_of(program, "norm_weight") == f"{expected} per-tensor"


@pytest.mark.parametrize(("version", "bits"), [("V69", 8), ("V73", 16)])
def test_embedding_weight_has_the_activations_bits_from_v73_on(version: str, bits: int) -> None:
    build = Builder()
    ids = build.input("ids", 6, dtype=torch.int64)
    build.output(build.call("rows", aten.embedding.default, build.tensor("table.weight", build.random(9, 4)), ids))
    program = build.program()
    placed(program, defaults=replace(ON, hw_version=version), activation=QuantSpec(bits=16))
    assert on_off(program) == {"table_weight": "on"}  # the rows are on its grid
    assert spec_of(program, "table_weight") == f"s{bits} symmetric per-tensor"


def test_parameters_follow_defaults_then_params_then_op_type() -> None:
    params = {"weight": ParamSettings(is_quantized=False)}
    program = chain("conv")
    placed(program, defaults=ON, params=params)
    assert turned_on(program) == ["conv"]
    program = chain("conv")
    placed(program, defaults=ON, params=params, op_type={"Conv": OpType(params={"weight": ParamSettings(True, False)})})
    assert spec_of(program, "conv_weight") == "u8 asymmetric per-tensor"
    assert program.node("conv").meta["input_rules"] == {1: "op_type.Conv.params.weight.is_quantized"}


def test_bias_of_an_integer_kernel_has_no_grid_of_its_own() -> None:
    program = chain("conv")
    placed(program, defaults=ON, params={"bias": ParamSettings(is_quantized=True)})
    assert turned_on(program) == ["conv_weight", "conv"]
    text = "params.bias.is_quantized: biases have int32 codes all the same, as integer kernels add them: conv"
    assert text in [note.text for note in program.notes]
    norm = product()
    placed(norm, defaults=ON, params={"bias": ParamSettings(is_quantized=True)})
    assert "norm_bias" in turned_on(norm)


def test_per_channel_is_declined_where_it_cannot_be() -> None:
    program = chain("conv")
    asymmetric = replace(ON, params=ParamSettings(True, False), per_channel_quantization=True)
    entry = placed(program, defaults=asymmetric)
    assert [miss.reason for miss in entry.misses] == ["weight conv_weight stays per tensor: its spec is asymmetric"]
    entry = placed(product(), defaults=replace(ON, per_channel_quantization=True))
    assert [miss.reason for miss in entry.misses] == ["weight norm_weight stays per tensor: no channel axis"]


def test_per_channel_of_one_type_overrides_the_defaults() -> None:
    program = chain("conv")
    op_type = {"Conv": OpType(per_channel_quantization=False)}
    placed(program, defaults=replace(ON, per_channel_quantization=True), op_type=op_type)
    assert spec_of(program, "conv_weight") == "s8 symmetric per-tensor"


def test_masked_softmax_stays_in_float_whatever_the_file_says() -> None:
    build = Builder()
    scores = build.call("scores", aten.matmul.default, build.input("q", 6, 8), build.input("k", 8, 6))
    masked = build.add("masked", scores, build.input("mask", 6, 6))
    build.output(build.call("softmax", aten.softmax.int, masked, -1))
    program = build.program()
    op_type = {"Add": OpType(is_output_quantized=True)}
    placed(program, defaults=ON, op_type=op_type, model_input=ModelInput(True))
    assert sorted(turned_on(program)) == ["k", "q", "scores", "softmax"]
    assert {program.node(name).meta["float_reason"] for name in ("mask", "masked")} == {"mask before softmax"}


def test_what_matches_nothing_is_told() -> None:
    program = chain("conv", "relu")
    kernels = (SupportedKernel(KernelType(16), KernelType(8)), SupportedKernel(KernelType(16, "float")))
    placed(
        program,
        defaults=replace(ON, hw_version="v6", supported_kernels=kernels),
        params={"bias": ParamSettings(is_quantized=False)},
        op_type={"LSTM": OpType(), "Conv": OpType(params={"running_mean": ParamSettings(True)})},
        supergroups=(*CONV_RELU, Supergroup(("Add", "Relu"))),
    )
    assert [note.text for note in program.notes] == [
        "matches nothing in this program: op_type.LSTM, supergroups[1]",
        "no operation has such a parameter here: op_type.Conv.params.running_mean",
        "defaults.supported_kernels has none for 8-bit activations with 8-bit parameters",
    ]
    other = chain("relu")
    placed(other, defaults=replace(ON, hw_version="enpu"))
    assert [note.text for note in other.notes] == ["defaults.hw_version: 'enpu' has no exceptions that are known here"]


@pytest.mark.parametrize(
    ("sections", "path"),
    [
        (lambda: Sections(op_type={"Conv2d": OpType()}), "op_type.Conv2d: operator type 'Conv2d' is unknown"),
        (lambda: Sections(params={"wieght": ParamSettings()}), "params.wieght: parameter 'wieght' is unknown"),
        (lambda: Sections(supergroups=(Supergroup(("Conv", "Rleu")),)), r"supergroups\[0\].op_list\[1\]"),
    ],
)
def test_unknown_names_are_refused_in_python_too(sections: Any, path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        sections()


def test_value_that_its_reader_takes_twice_is_not_inside_a_supergroup() -> None:
    build = Builder()
    conv = build.conv("conv", build.input("x", 4, 8, 8), 4)
    build.output(build.call("add", aten.add.Tensor, conv, conv))
    program = build.program()
    run_pass(ApplyPlacement(defaults=ON, supergroups=(Supergroup(("Conv", "Add")),)), program)
    assert output_spec(conv) is not None and "supergroups" not in conv.meta["rule"]
