"""Coverage: each float value has its spec, its encoding and its rule, or a reason for float that is true."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxquant
from fxquant.errors import PassError
from fxquant.graph.coverage import NO_RULE, CoverageReport, CoverageRow, ValueKind
from fxquant.graph.islands import Island, islands
from fxquant.graph.manager import PassManager
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Program, Stage, value_type
from fxquant.numerics.fake_quant import Mode
from fxquant.ops.base import Role
from fxquant.ops.table import TABLE
from fxquant.passes import ApplyPlacement, AssignSpecs
from fxquant.placement import Rule
from fxquant.placement.sections import ModelInput, ParamSettings
from fxquant.spec import Granularity, SpecOverride
from tests.helpers import assert_golden, quantized_program
from tests.passes.pipelines import IMAGE, residual

FOUR_BITS = SpecOverride(bits=4)


class Transformer(nn.Module):
    """Masked attention between layer norms, a GELU, and a positional embedding: float islands of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.position = nn.Parameter(torch.randn(1, 6, 16))
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.position
        y = self.norm1(x)
        scores = self.q(y) @ self.k(y).transpose(-2, -1) * 0.25 + mask
        x = x + self.out(torch.softmax(scores, -1) @ self.v(y))
        found: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return found


TOKENS = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
MASK = torch.zeros(2, 6, 6).masked_fill(torch.arange(6) > torch.arange(6)[:, None], -1e9)


def pipeline_with(*rules: Rule) -> Pipeline:
    """int8_per_channel with these placement rules."""
    found = fxquant.load_pipeline("int8_per_channel")
    passes = [replace(item, rules=rules) if isinstance(item, AssignSpecs) else item for item in found.prepare_passes]
    return Pipeline(PassManager(passes), found.finalize_passes)


def prepared(*rules: Rule, calibrate: bool = False) -> Program:
    """The residual net of the passes' tests, prepared under these rules."""
    program = fxquant.capture(residual(), IMAGE)
    pipeline_with(*rules).prepare(program)
    if calibrate:
        fxquant.calibrate(program, [IMAGE], progress=False)
    return program


def transformer(*rules: Rule) -> Program:
    """The transformer, prepared under these rules."""
    program = fxquant.capture(Transformer().eval(), (TOKENS, MASK))
    pipeline_with(*rules).prepare(program)
    return program


def row(report: CoverageReport, value: str) -> CoverageRow:
    """The only row of a value."""
    (found,) = [item for item in report.rows if item.value == value]
    return found


def test_table_of_a_residual_net_is_golden() -> None:
    rules = (
        Rule(module="conv2", weight=FOUR_BITS, output=SpecOverride(fixed=(-1.0, 1.0))),
        Rule(node="x", output=SpecOverride(estimator="mse")),
        Rule(op="Gemm", quantize=False),
    )
    assert_golden(f"{prepared(*rules).coverage()}\n", "coverage_residual.txt")


def test_report_speaks_at_every_stage() -> None:
    pipeline = pipeline_with()
    program = fxquant.capture(residual(), IMAGE)
    captured = program.coverage()
    assert captured.stage is Stage.CAPTURED and captured.quantized == () and captured.float_islands is None
    assert {item.reason for item in captured.rows} == {"specs are not assigned yet (stage captured)"}

    names = [item.name for item in pipeline.prepare_passes]
    passes = list(pipeline.prepare_passes)
    PassManager(passes[: names.index("insert-fake-quant")]).run(program)
    assigned = program.coverage()
    PassManager(passes[names.index("insert-fake-quant") :]).run(program)
    inserted = program.coverage()
    fxquant.calibrate(program, [IMAGE], progress=False)
    calibrated = program.coverage()
    pipeline.finalize(program)
    finalized = program.coverage()

    assert row(assigned, "conv1_bias").reason == "quantized once 'conv1' reads quantized input and weight"
    for before, after in ((assigned, inserted), (inserted, calibrated), (calibrated, finalized)):
        known = {item.value: item for item in after.rows}
        for item in before.quantized:
            if item.kind is not ValueKind.BIAS:
                assert (item.spec, item.rule, item.shares) == (
                    known[item.value].spec,
                    known[item.value].rule,
                    known[item.value].shares,
                )
        assert [item.value for item in before.rows] == [item.value for item in after.rows]
    assert all(item.grid is None for item in inserted.rows)
    assert all((item.grid is not None) is item.is_quantized for item in calibrated.rows)
    assert row(calibrated, "x").mode == "fake" and row(finalized, "x").mode == "frozen"


def test_rows_are_all_float_values_and_say_what_the_quantizers_say() -> None:
    program = prepared(calibrate=True)
    report = program.coverage()
    for node, module in program.fake_quant_nodes():
        found, encoding = row(report, str(node.args[0])), module.encoding
        assert found.spec == module.spec and found.grid is not None and found.mode == module.mode.value
        assert (found.grid.scale_low, found.grid.scale_high) == (
            float(encoding.scale.min()),
            float(encoding.scale.max()),
        )
        assert (found.grid.min, found.grid.max) == (float(encoding.min.min()), float(encoding.max.max()))
        assert found.grid.scales == encoding.scale.numel()
    types = {node.name: value_type(node) for node in program.graph.nodes if not node.name.endswith("_fq")}
    assert [item.value for item in report.rows] == [name for name, kind in types.items() if kind and kind.is_float]
    assert row(report, "pool").shares == "relu" and row(report, "relu").shares == ""
    kinds = {name: row(report, name).kind.value for name in ("x", "fc_weight", "fc_bias", "fc")}
    assert kinds == {"x": "input", "fc_weight": "weight", "fc_bias": "bias", "fc": "activation"}


def test_summary_counts_values_operations_and_islands() -> None:
    report = prepared(Rule(op="Conv", quantize=False)).coverage()
    assert report.summary == (
        "9 values quantized (7 activations, 1 weight, 1 bias), 6 operations run on integers, 3 in float islands "
        "(2 islands: conv1..relu, conv2)"
    )
    assert prepared().coverage().summary.endswith("9 operations run on integers, 0 in float islands")


def test_rule_of_each_side_is_recorded_and_survives_file_and_copy(tmp_path: Path) -> None:
    program = prepared(Rule(op="Conv", weight=FOUR_BITS), Rule(node="conv2", output=FOUR_BITS))
    report = program.coverage()
    assert row(report, "conv1_weight").rule == "op 'Conv' (rules[0])"
    assert row(report, "conv2").rule == "node 'conv2' (rules[1])"
    assert row(report, "x").rule == "defaults" and row(report, "fc_weight").rule == "defaults"
    program.save(tmp_path / "a.fxq")
    assert fxquant.load_program(tmp_path / "a.fxq").coverage() == report == program.copy().coverage()


def test_report_is_plain_json() -> None:
    report = prepared(Rule(op="Gemm", quantize=False), calibrate=True).coverage()
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["summary"] == report.summary and plain["float_islands"][0]["nodes"] == ["fc"]
    found = {item["value"]: item for item in plain["values"]}
    assert found["fc_bias"]["quantized"] is False and "excluded by rule op 'Gemm'" in found["fc_bias"]["reason"]
    assert found["x"]["encoding"]["scales"] == 1 and found["x"]["spec"] == "u8 asymmetric per-tensor"


def test_quantizer_that_is_off_is_float_with_that_reason() -> None:
    program = prepared(calibrate=True)
    module = program.fake_quant(program.node("conv2_fq"))
    assert module is not None
    module.mode = Mode.OFF
    found = row(program.coverage(), "conv2")
    assert not found.is_quantized and found.reason == "its quantizer is switched off (mode off)"


def test_program_without_recorded_rules_is_covered_too() -> None:
    report = quantized_program().coverage()
    assert row(report, "x").rule == NO_RULE and row(report, "conv_bias").rule == "its layer's input and weight"
    assert row(report, "sigmoid").reason == "read in float by the program's output"


def test_bias_in_float_says_why() -> None:
    report = prepared(Rule(node="conv1_weight", quantize=False)).coverage()
    assert row(report, "conv1_bias").reason == "the bias of 'conv1', which reads 'conv1_weight' in float"
    assert row(report, "conv1_weight").reason == "excluded by rule node 'conv1_weight' (rules[0])"


def test_bias_whose_layer_reads_what_sections_turned_off_says_so() -> None:
    placement = fxquant.load_pipeline("aimet_default")
    weightless = ParamSettings(is_quantized=False)
    passes = [
        replace(item, model_input=ModelInput(is_input_quantized=False), params={"weight": weightless})
        if isinstance(item, ApplyPlacement)
        else item
        for item in placement.prepare_passes
    ]
    program = fxquant.capture(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval(), IMAGE)
    Pipeline(PassManager(passes), placement.finalize_passes).prepare(program)
    report = program.coverage()
    assert row(report, "_0_bias").reason.startswith("the bias of '_0', which reads ")


def test_bias_behind_a_supergroup_says_what_its_layer_reads_in_float() -> None:
    placement = fxquant.load_pipeline("aimet_default")
    passes = [
        replace(item, model_input=ModelInput(is_input_quantized=False)) if isinstance(item, ApplyPlacement) else item
        for item in placement.prepare_passes
    ]
    program = fxquant.capture(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval(), IMAGE)
    Pipeline(PassManager(passes), placement.finalize_passes).prepare(program)
    report = program.coverage()
    x = report.rows[0]
    assert x.kind is ValueKind.INPUT and row(report, "_0").reason.startswith("supergroups[")
    assert row(report, "_0_bias").reason == f"the bias of '_0', which reads '{x.value}' in float"
    assert report.float_islands is not None
    assert report.float_islands[0].reasons[0] == f"reads '{x.value}', '_0_bias' in float"


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.conv(torch.relu(self.conv(x)))
        return found


def test_bias_of_a_layer_that_is_called_twice_has_a_grid_for_each_call() -> None:
    program = fxquant.capture(Twice().eval(), IMAGE)
    pipeline_with().prepare(program)
    report = program.coverage()
    rules = [item.rule for item in report.rows if item.kind is ValueKind.BIAS]
    assert rules == ["input and weight of conv", "input and weight of conv_1"]
    assert "1 bias in 2 grids)" in report.summary


def test_input_is_explained_by_those_who_want_it_and_not_by_what_moves_it() -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.conv(x), self.conv(nn.functional.max_pool2d(x, 2))

    program = fxquant.capture(Moved().eval(), IMAGE)
    fxquant.load_pipeline("aimet_default").prepare(program)
    assert row(program.coverage(), "x").rule == "model_input.is_input_quantized"


def test_value_behind_a_float_layer_is_explained_by_its_readers() -> None:
    program = prepared(Rule(op="Conv", quantize=False), Rule(module="conv2", input=FOUR_BITS, quantize=True))
    found = row(program.coverage(), "relu")
    assert found.is_quantized and "module 'conv2' (rules[1])" in found.rule and "follows" not in found.rule


class Chunks(nn.Module):
    """A value in two parts, each read by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.left, self.right = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.whole(x).chunk(2, 1)
        found: torch.Tensor = self.left(left) + self.right(right)
        return found


def test_split_of_codes_runs_on_integers_and_a_split_of_floats_follows_its_input() -> None:
    program = fxquant.capture(Chunks().eval(), IMAGE)
    pipeline_with().prepare(program)
    report = program.coverage()
    assert report.float_islands == () and report.operations is not None
    assert {"chunk", "getitem", "getitem_1"} <= set(report.operations)

    program = fxquant.capture(Chunks().eval(), IMAGE)
    pipeline_with(Rule(op="Conv", quantize=False), Rule(op="Add", quantize=False)).prepare(program)
    report = program.coverage()
    assert row(report, "getitem").reason == "follows its input 'whole', which is in float"
    assert report.float_islands is not None and [str(item) for item in report.float_islands] == ["whole..add"]

    program = fxquant.capture(Chunks().eval(), IMAGE)
    pipeline_with(Rule(module="whole", quantize=False)).prepare(program)
    (island,) = program.coverage().float_islands or ()
    assert island.nodes == ("whole", "chunk", "getitem", "getitem_1"), "the parts are quantized only then"


@pytest.mark.parametrize(("target", "in_float"), [("tensorrt", ["adaptive_avg_pool2d"]), ("openvino", [])])
def test_layers_with_a_float_bias_run_on_integers_where_kernels_take_one(target: str, in_float: list[str]) -> None:
    program = fxquant.capture(residual(), IMAGE)
    fxquant.load_pipeline(target).prepare(program)
    report = program.coverage()
    assert report.operations is not None and {"conv1", "relu", "conv2", "add", "relu_1", "fc"} <= set(report.operations)
    assert [name for island in report.float_islands or () for name in island.nodes] == in_float
    assert row(report, "conv1_bias").reason == f"the bias of 'conv1', which kernels of {target} add in float"
    assert "_fq" not in json.dumps(report.to_dict()), "no quantizer is named as a reader in float"


@pytest.mark.parametrize("target", ["tensorrt", "openvino", "qnn_htp", "xnnpack"])
def test_transposed_convolution_runs_on_integers_where_the_target_has_a_kernel(target: str) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, 2)).eval()
    for name, is_integer in ((target, True), ("int8_per_channel", False)):
        program = fxquant.capture(net, IMAGE)
        fxquant.load_pipeline(name).prepare(program)
        report = program.coverage()
        assert ("_2" in (report.operations or ())) is is_integer
        reasons = [reason for island in report.float_islands or () for reason in island.reasons]
        assert reasons == ([] if is_integer else ["convolution has no integer kernel"])


def test_layer_whose_weight_is_off_or_in_blocks_is_in_float_for_that_reason() -> None:
    program = prepared(calibrate=True)
    module = program.fake_quant(program.node("fc_weight_fq"))
    assert module is not None
    module.mode = Mode.OFF
    assert [str(item.reasons) for item in program.coverage().float_islands or ()] == [
        "(\"reads 'fc_weight_fq' in float\",)"
    ]
    blocks = SpecOverride(granularity=Granularity(1, 4))
    report = prepared(Rule(op="Gemm", weight=blocks)).coverage()
    assert report.float_islands is not None and "quantized in blocks" in report.float_islands[0].reasons[0]
    assert row(report, "fc_bias").reason.endswith("not one scale for each output channel")


# --- every reason is true -------------------------------------------------------------------------------------------


def is_in_float(report: CoverageReport, name: str) -> bool:
    """Whether no row of a value is quantized."""
    return not any(item.is_quantized for item in report.rows if item.value == name)


def false_reasons(program: Program) -> list[str]:
    """Reasons that the graph does not bear out; what no check here knows counts as false."""
    report, found = program.coverage(), []
    for item in report.in_float:
        node = program.node(item.value)
        names = re.findall(r"'([^']+)'", item.reason.split(" (")[0])
        definition = TABLE.find(node, None) if node.op == "call_function" else None
        if item.reason.endswith("has no integer kernel") and not item.reason.startswith("read"):
            holds = definition is not None and definition.role_for(node) is Role.FLOAT
        elif item.reason.startswith("read in float by"):
            users = [user for user in node.users if user.op != "output"]
            holds = [user.name for user in users][:3] == names and all(
                program.fake_quant(user) is None for user in users
            )
        elif item.reason.startswith("quantized behind"):
            holds = all(not is_in_float(report, name) and program.node(name) in node.users for name in names)
        elif item.reason.startswith("follows its input"):
            holds = [str(source) for source in node.args[:1]] == names and is_in_float(report, names[0])
        elif item.reason.startswith("the bias of"):
            holds = node in program.node(names[0]).all_input_nodes and all(
                is_in_float(report, name) for name in names[1:]
            )
        elif item.reason.startswith("excluded by rule"):
            holds = not any(program.fake_quant(user) for user in node.users)
        else:
            holds = item.reason == "mask before softmax" and definition is not None
        found += [] if holds else [f"{item.value}: {item.reason}"]
    return found


def test_each_reason_for_float_of_a_transformer_is_true() -> None:
    program = transformer()
    report = program.coverage()
    assert false_reasons(program) == [] and len(report.in_float) >= 7
    assert row(report, "norm1").is_quantized, "a float operation's result that a linear layer reads"
    assert row(report, "norm1_weight").reason == "read in float by 'norm1' (layer_norm has no integer kernel)"
    assert row(report, "mask").reason.endswith("(mask before softmax)")
    assert row(report, "position").kind is ValueKind.CONSTANT and row(report, "position").is_quantized


def test_relu_behind_a_float_operation_follows_it() -> None:
    program = fxquant.capture(nn.Sequential(nn.LayerNorm(4), nn.ReLU()).eval(), torch.randn(2, 4))
    pipeline_with().prepare(program)
    assert row(program.coverage(), "_1").reason == "follows its input '_0', which is in float"
    assert false_reasons(program) == []


def test_check_of_reasons_finds_planted_lies() -> None:
    program = transformer()
    program.node("norm1_weight").meta["float_reason"] = "read in float by 'norm2'"
    program.node("norm1_bias").meta["float_reason"] = "the moon"
    program.node("mask").meta["float_reason"] = "follows its input 'x', which is in float"
    assert [text.split(":")[0] for text in false_reasons(program)] == ["mask", "norm1_weight", "norm1_bias"]


def test_islands_are_the_connected_groups_of_float_operations() -> None:
    program = transformer()
    report = program.coverage()
    assert report.float_islands is not None and len(report.float_islands) >= 3
    in_float = {node.name for node, island in islands(program).items() if island is Island.FLOAT}
    members = [name for island in report.float_islands for name in island.nodes]
    assert sorted(members) == sorted(in_float) and all(all(island.reasons) for island in report.float_islands)
    number = {name: index for index, island in enumerate(report.float_islands) for name in island.nodes}
    for name in members:
        for user in program.node(name).users:
            assert number.get(user.name, number[name]) == number[name]


SAID = st.sampled_from(
    [{"quantize": False}, {"weight": FOUR_BITS}, {"output": FOUR_BITS}, {"input": FOUR_BITS}, {"quantize": True}]
)
ABOUT = st.sampled_from(
    [
        *({"op": name} for name in ("Conv", "Gemm", "Add", "Relu", "MaxPool", "convolution")),
        *({"module": name} for name in ("conv.", ".*", "fc")),
        *({"node": name} for name in ("x", "conv1", "conv1_weight", "relu", "pool", "add", "fc")),
    ]
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(ABOUT, SAID), max_size=4))
def test_whatever_the_rules_each_value_is_explained(drawn: list[tuple[dict[str, str], dict[str, object]]]) -> None:
    rules = tuple(Rule(**about, **said) for about, said in drawn)  # type: ignore[arg-type]
    try:
        program = prepared(*rules)
    except PassError as err:
        assert "contradicts" in str(err)
        return
    report = program.coverage()
    assert false_reasons(program) == []
    for item in report.quantized:
        assert item.spec is not None and item.rule not in ("", NO_RULE)
        by_rule = re.findall(r"rules\[(\d)\]", item.rule)
        assert (item.spec.bits == 4) <= bool(by_rule), "only rules ask for 4 bits"
    assert len({item.value for item in report.rows}) == len(report.rows)


class Joined(nn.Module):
    """Two float branches that meet in a third float operation, and a constant that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.atan2(torch.sin(x), torch.cos(y)) + self.offset
        return found


def test_branches_that_meet_are_one_island_and_constants_count_as_weights() -> None:
    inputs = (torch.randn(2, 4), torch.randn(2, 4))
    program = fxquant.capture(Joined(), inputs)
    pipeline_with().prepare(program)
    fxquant.calibrate(program, [inputs], progress=False)
    report = program.coverage()
    assert report.float_islands is not None
    assert [set(island.nodes) for island in report.float_islands] == [{"sin", "cos", "atan2"}]
    assert report.summary.startswith("3 values quantized (2 activations, 1 weight, 0 biases)")
