"""What the report promises of tensors and nodes, by plan, by the graph that ran and by the kernels' certificates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import fxquant
from fxquant.graph.program import Program
from fxquant.numerics.runtime import Level
from fxquant.parity import ParityReport, Row, RuntimeOptions, Verdict, check_parity
from fxquant.parity.certification import Standing
from fxquant.parity.compare import Difference
from fxquant.parity.segments import Segment, SegmentReader
from fxquant.parity.simulation import SIMULATIONS, RuntimeCodes, Step
from fxquant.parity.verdicts import is_beyond
from fxquant.simulation import certification
from fxquant.simulation.certification import CertificationWarning, Platform, forget
from fxquant.simulation.plan import read_plan
from fxquant.simulation.self_test import Outcome, self_test
from tests.lowering.programs import image
from tests.parity.files import (
    branches_program,
    change_grid,
    compare,
    export,
    low_relu_program,
    overflowing_program,
    plant,
    remove_node,
    residual_program,
    shifted_program,
    tokens_program,
)


def row_of(report: ParityReport, value: str) -> Row:
    """The row of a value."""
    return next(row for row in report.rows if row.value == value)


@pytest.mark.parametrize("simulation", ["exact", "integer"])
@pytest.mark.parametrize("level", [Level.ALL, Level.EXTENDED])
@pytest.mark.parametrize("make", [residual_program, branches_program])
def test_every_node_is_certified_and_exact_when_kernels_run(
    tmp_path: Path, make: Any, level: Level, simulation: str
) -> None:
    program = make()
    report = compare(program, export(program, tmp_path), simulation=simulation, options=RuntimeOptions(level, 1))
    assert report.exact and report.certified_differing == 0
    assert {str(node.certification) for node in report.nodes} == {"certified and exact"}
    assert [node.node for node in report.nodes] == [kernel.node for kernel in report.fusion.nodes]
    total = report.codes_compared
    start = (
        f"exact: 0 of {total:,} codes differ at {len(report.code_rows)} quantized tensors ({simulation} simulation, "
    )
    assert report.verdict.startswith(start)
    promised = f"level {level.value}, 1 thread): {len(report.code_rows)} certified, 0 float islands, 0 uncertified"
    assert report.verdict.endswith(promised)


@pytest.mark.parametrize("level", [Level.BASIC, Level.DISABLED])
def test_kernels_are_uncertified_when_nothing_is_fused(tmp_path: Path, level: Level) -> None:
    program = residual_program()
    report = compare(program, export(program, tmp_path), simulation="exact", options=RuntimeOptions(level, 1))
    standings = {row.value: row.certification.standing for row in report.code_rows}
    kernels = ("relu", "conv2d_1", "relu_1", "adaptive_avg_pool2d", "linear")
    assert {value for value, standing in standings.items() if standing is Standing.UNCERTIFIED} == set(kernels)
    assert {standings[value] for value in ("x", "max_pool2d", "flatten")} == {Standing.CERTIFIED}
    assert row_of(report, "relu").certification.reason == f"onnxruntime ran it in float at level {level.value}"


def test_float_island_is_named_in_verdict_rows_nodes_and_text(tmp_path: Path) -> None:
    program = tokens_program()
    report = compare(program, export(program, tmp_path), simulation="exact")
    row = row_of(report, "layer_norm")
    assert row.certification.standing is Standing.ISLAND and row.certification.reason
    assert report.rows_that_are(Standing.ISLAND) == (row,)
    assert report.verdict.endswith("8 certified, 1 float island (layer_norm), 0 uncertified")
    nodes = {node.node: node.certification for node in report.nodes}
    assert nodes["layer_norm"].standing is Standing.ISLAND and nodes["matmul"].is_certified
    assert f"\n  layer_norm: float island ({row.certification.reason})" in str(report)


def test_product_without_a_grid_behind_it_is_certified_as_an_output(tmp_path: Path) -> None:
    program = tokens_program()
    report = compare(program, export(program, tmp_path), simulation="exact")
    (output,) = report.outputs
    assert output.certification.is_certified and output.certification.kernel == "QGemm"
    assert output.local.differing == 0


class OneIslandOff:
    """The exact simulation, but one step up everywhere at one value."""

    name = "exact"

    def __init__(self, quantizer: str) -> None:
        self._quantizer = quantizer

    def run(self, program: Program, inputs: Mapping[str, Any], teacher: Mapping[str, RuntimeCodes]) -> Iterator[Step]:
        values = dict(teacher)
        for step in SIMULATIONS["exact"].run(program, inputs, values):
            is_off = step.node.name == self._quantizer and not step.is_output
            moved = torch.where(step.value < 128, step.value + 1, step.value - 1)
            yield Step(step.node, moved, False) if is_off else step


@pytest.mark.parametrize(
    ("value", "verdict", "fault"),
    [("layer_norm", Verdict.ROUNDING, ()), ("gelu", Verdict.DIFFERS, ("gelu",)), ("x", Verdict.DIFFERS, ("x",))],
)
def test_one_step_is_rounding_at_a_float_island_and_a_fault_where_certified(
    tmp_path: Path, value: str, verdict: Verdict, fault: tuple[str, ...]
) -> None:
    program = tokens_program()
    report = compare(program, export(program, tmp_path), simulation=OneIslandOff(f"{value}_fq"))
    assert row_of(report, value).verdict is verdict and report.fault == fault


def test_what_a_float_island_passes_on_is_inherited_from_it_by_name(tmp_path: Path) -> None:
    program = tokens_program()
    path = plant(export(program, tmp_path), _scale_norm)
    report = compare(program, path, simulation="exact")
    assert row_of(report, "layer_norm").verdict is Verdict.ROUNDING
    row = row_of(report, "gelu")
    assert (row.verdict, row.origin, row.from_island) == (Verdict.INHERITED, "layer_norm", True)
    assert row.verdict_text == "inherited from float island layer_norm"
    assert "inherited from float island layer_norm" in str(report) and report.fault == ()


def _scale_norm(graph: onnx.GraphProto) -> None:
    node = next(node for node in graph.node if node.op_type == "LayerNormalization")
    weight = next(tensor for tensor in graph.initializer if tensor.name == node.input[1])
    values = onnx.numpy_helper.to_array(weight) * 1.001
    weight.CopyFrom(onnx.numpy_helper.from_array(values.astype("float32"), weight.name))


def test_node_that_onnxruntime_left_in_float_is_uncertified_with_the_reason(tmp_path: Path) -> None:
    program = residual_program()
    path = plant(export(program, tmp_path), change_grid("conv2_bias_fq", 1, lambda scale: scale * 1.5))
    report = compare(program, path, simulation="exact", check_stored=False)
    found = row_of(report, "conv2d_1").certification
    assert found.standing is Standing.UNCERTIFIED and "its bias scale is 50.0% off" in found.reason
    assert "1 uncertified (conv2d_1)" in report.verdict


def test_operation_behind_a_barrier_is_in_float_for_the_reason_of_the_plan(tmp_path: Path) -> None:
    program = overflowing_program()
    report = compare(program, export(program, tmp_path), simulation="exact")
    (kernel,) = [kernel for kernel in report.fusion.unfused if kernel.node == "mul"]
    assert "steps of its output's grid, beyond int32" in kernel.reason
    assert "barrier" not in kernel.reason and kernel.reason in str(report)
    assert row_of(report, "clamp").certification.is_certified  # in float, but each operation rounds once


def test_integer_kernel_that_the_plan_does_not_expect_is_not_certified(tmp_path: Path) -> None:
    program = overflowing_program()
    path = plant(export(program, tmp_path), remove_node("clamp.barrier"))
    report = compare(program, path, simulation="exact")
    found = row_of(report, "clamp").certification
    assert found.standing is Standing.UNCERTIFIED and found.kernel == "QLinearMul"
    assert found.reason.endswith("where the plan expects float") and "1 uncertified (clamp)" in report.verdict


def test_island_behind_an_uncertified_product_is_not_certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = shifted_program()
    path = export(program, tmp_path)
    sound = row_of(compare(program, path, simulation="exact"), "neg").certification
    assert sound.is_certified
    product = program.node("linear")
    kernel = read_plan(program).sites[product].kernel.operator
    forget()
    real = self_test

    def failing(operator: str, config: tuple[tuple[str, str], ...]) -> Outcome:
        return Outcome(512, 9, ("rank 3",)) if operator == kernel else real(operator, config)

    monkeypatch.setattr(certification, "self_test", failing)
    with pytest.warns(CertificationWarning, match=f"kernel {kernel} is uncertified: 9 of 512 codes"):
        report = compare(program, path, simulation="exact")
    forget()
    found = row_of(report, "neg").certification
    assert found.standing is Standing.UNCERTIFIED and found.kernel == kernel


def test_relu_that_is_not_absorbed_is_not_promised_an_integer_kernel(tmp_path: Path) -> None:
    program = low_relu_program()
    report = compare(program, export(program, tmp_path), simulation="exact")
    assert row_of(report, "relu").certification.kernel != "QLinearConv"
    assert row_of(report, "conv2d_1").certification.kernel == "QLinearConv"


def test_float_simulation_promises_nothing(tmp_path: Path) -> None:
    program = residual_program()
    report = compare(program, export(program, tmp_path), simulation="float")
    assert {row.certification.standing for row in report.rows} == {Standing.UNCERTIFIED}
    assert report.verdict.endswith("level ALL, 1 thread)")
    assert "certified and exact" not in str(report)


def test_simulation_is_what_the_program_simulates_when_none_is_asked(tmp_path: Path) -> None:
    program = residual_program()
    path = export(program, tmp_path)
    found = []
    for name in ("float", "exact", "integer"):
        program.simulate = name
        found.append(check_parity(program, path, [image()], progress=False).simulation)
    assert found == ["float", "exact", "integer"]


def test_kernels_are_downgraded_with_the_recommendation_when_pairs_saturate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def saturating(operator: str, config: tuple[tuple[str, str], ...]) -> Outcome:
        return Outcome(592, 48, ("full-scale pairs",)) if operator == "QLinearConv" else Outcome(512, 0, ())

    program = residual_program()
    path = export(program, tmp_path)
    forget()
    monkeypatch.setattr(certification, "self_test", saturating)
    with pytest.warns(CertificationWarning, match="kernel QLinearConv is uncertified: 48 of 592 codes"):
        report = compare(program, path, simulation="exact")
    forget()
    assert {row.value for row in report.rows_that_are(Standing.UNCERTIFIED)} == {"relu", "conv2d_1"}
    assert "quantize weights to 7 bits, or set session.x64quantprecision to 1" in str(report)
    assert "2 uncertified (relu, conv2d_1)" in report.verdict


def test_everything_is_uncertified_on_an_unlisted_platform_with_what_the_self_tests_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certification, "here", lambda: Platform("1.31.1", "aarch64 i8mm"))
    program = residual_program()
    report = compare(program, export(program, tmp_path), simulation="exact")
    assert {row.certification.standing for row in report.code_rows} == {Standing.UNCERTIFIED}
    reason = row_of(report, "relu_1").certification.reason
    assert "not on onnxruntime 1.31.1 on aarch64 i8mm (0 of 1,280 codes of QLinearAdd's self-test differ)" in reason
    assert report.exact


def test_report_carries_everything_as_json(tmp_path: Path) -> None:
    program = tokens_program()
    report = compare(program, export(program, tmp_path), simulation="exact")
    loaded = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert loaded["certification"] == {"certified": 8, "float island": 1, "uncertified": 0}
    assert loaded["certified_differing"] == 0
    rows = {row["value"]: row["certification"] for row in loaded["rows"]}
    assert rows["matmul"] == {"standing": "certified", "kernel": "QLinearMatMul", "reason": ""}
    assert rows["layer_norm"]["standing"] == "float island"
    assert [node["node"] for node in loaded["nodes"]] == [node.node for node in report.nodes]
    (output,) = loaded["outputs"]
    assert output["equal_fraction"] == 1.0 and output["worst"] == 0.0


def test_agreement_of_outputs_is_told(tmp_path: Path) -> None:
    program = tokens_program()
    path = plant(export(program, tmp_path), _scale_norm)
    report = compare(program, path, simulation="exact")
    (output,) = report.outputs
    agreement = output.agreement()
    assert agreement["equal_fraction"] == 1 - output.overall.differing / output.overall.compared < 1
    equal = output.overall.compared - output.overall.differing
    assert f"output output: {equal:,} of {output.overall.compared:,} values equal bit for bit" in str(report)


def quantized(model: nn.Module, x: torch.Tensor) -> Program:
    """A finalized program of a model, calibrated on `x`."""
    program, pipeline = fxquant.capture(model.eval(), (x,)), fxquant.load_pipeline("int8_per_channel")
    pipeline.prepare(program)
    fxquant.calibrate(program, [x], progress=False)
    pipeline.finalize(program)
    return program


def test_moves_on_one_grid_are_certified_though_an_integer_kernel_joins_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pad = nn.Conv2d(8, 8, 3, padding=(0, 1), padding_mode="circular")
    x = torch.randn(2, 3, 9, 8)
    program = quantized(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), pad), x)
    report = check_parity(program, export(program, tmp_path), [x], simulation="exact", progress=False)
    (moved,) = [row for row in report.rows if "QLinearConcat" in row.kernels]
    assert moved.certification.is_certified and report.exact
    assert not report.rows_that_are(Standing.UNCERTIFIED)


def test_rounding_of_an_output_that_is_zero_is_no_fault(tmp_path: Path) -> None:
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 24, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.convolution(x).relu().std((2, 3))

    torch.manual_seed(0)
    program = quantized(Spread(), torch.randn(2, 3, 14, 11))
    flat = torch.full((2, 3, 14, 11), 0.3)
    report = check_parity(program, export(program, tmp_path), [flat], simulation="exact", progress=False)
    assert not any(row.verdict.is_fault for row in report.rows)
    (output,) = report.outputs
    assert is_beyond(segment_of(program, output.value), Difference(1, 1, worst=1.0), output.certification, output.step)


def segment_of(program: Program, value: str) -> Segment:
    """The segment that ends in a value."""
    return next(segment for segment in SegmentReader(program).segments() if segment.value == value)
