"""One fault planted in the ONNX file: it is attributed to exactly its node."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from fxquant.graph.program import Program
from fxquant.parity import Verdict
from tests.parity.files import (
    Edit,
    change_code,
    change_grid,
    compare,
    export,
    low_relu_program,
    node_of,
    plant,
    remove_node,
    residual_program,
    set_attribute,
    square_tokens_program,
    store_transposed,
    swap_weight_axis,
    tokens_program,
)


def planted(program: Program, folder: Path, edit: Edit) -> Path:
    return plant(export(program, folder), edit)


@pytest.mark.parametrize(
    ("edit", "node", "what"),
    [
        (change_code("conv2_weight.codes", 1), "conv2d_1", "codes"),
        (change_code("conv1_bias.codes", -1), "conv2d", "codes"),
        (change_code("fc_weight.codes", 3), "linear", "codes"),
        (change_grid("conv2_weight_fq", 1, lambda scale: scale * np.float32(1.01)), "conv2d_1", "scale"),
        (change_grid("conv1_bias_fq", 1, lambda scale: scale * np.float32(1.001)), "conv2d", "scale"),
        (change_grid("fc_bias_fq", 1, lambda scale: scale * np.float32(2)), "linear", "scale"),
        (change_grid("conv2d_1_fq", 2, lambda zero: zero + 3), "conv2d_1", "zero point"),
        (change_grid("x_fq", 2, lambda zero: zero - 1), "x", "zero point"),
        (change_grid("relu_1_fq", 1, lambda scale: scale * np.float32(0.5)), "relu_1", "scale"),
        (set_attribute("conv2_weight_fq", "axis", 1), "conv2d_1", "axis"),
    ],
)
def test_stored_fault_is_its_node_alone_when_planted_in_residual(
    tmp_path: Path, edit: Edit, node: str, what: str
) -> None:
    program = residual_program()
    report = compare(program, planted(program, tmp_path, edit))
    assert report.fault == (node,)
    assert {item.what for item in report.stored} == {what}
    assert not report.exact
    assert report.verdict.startswith(f"FAULT at {node}: ")


@pytest.mark.parametrize(
    ("edit", "node", "what"),
    [
        (change_code("query_weight.codes", 1), "linear", "codes"),
        (change_code("head_bias.codes", 5), "linear_2", "codes"),
        (swap_weight_axis("key_weight_fq"), "linear_1", "axis"),
        (change_grid("softmax_fq", 2, lambda zero: zero + 1), "softmax", "zero point"),
    ],
)
def test_stored_fault_is_its_node_alone_when_planted_in_tokens(
    tmp_path: Path, edit: Edit, node: str, what: str
) -> None:
    program = tokens_program()
    report = compare(program, planted(program, tmp_path, edit))
    assert report.fault == (node,)
    assert {item.what for item in report.stored} == {what}


@pytest.mark.parametrize(("steps", "fault"), [(0, ()), (1, ("linear",))])
def test_transposed_weight_is_the_same_weight(tmp_path: Path, steps: int, fault: tuple[str, ...]) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        store_transposed("linear", "fc_weight")(graph)
        change_code("fc_weight.codes", steps)(graph)

    program = residual_program()
    report = compare(program, planted(program, tmp_path, edit))
    assert report.fault == fault
    assert report.exact is not bool(fault)


@pytest.mark.parametrize(
    ("edit", "node"),
    [
        (change_code("conv1_weight.codes", 120), "conv2d"),
        (change_code("conv2_weight.codes", -120), "conv2d_1"),
        (change_code("fc_weight.codes", 120), "linear"),
        (change_grid("conv1_weight_fq", 1, lambda scale: scale * np.float32(1.5)), "conv2d"),
    ],
)
def test_changed_layer_is_found_locally_when_the_static_check_is_off(tmp_path: Path, edit: Edit, node: str) -> None:
    program = residual_program()
    report = compare(program, planted(program, tmp_path, edit), check_stored=False)
    assert report.stored == ()
    assert report.fault == (node,)
    (row,) = [row for row in report.rows if row.verdict is Verdict.DIFFERS]
    assert node in row.nodes and row.worst_local_steps > 1


def test_everything_behind_is_inherited_when_one_node_differs(tmp_path: Path) -> None:
    program = residual_program()
    report = compare(program, planted(program, tmp_path, change_code("conv1_weight.codes", 120)), check_stored=False)
    verdicts = {row.value: (row.verdict, row.origin) for row in report.rows}
    assert verdicts["x"] == (Verdict.EXACT, "")
    assert verdicts["relu"] == (Verdict.DIFFERS, "")
    assert verdicts["conv2d_1"] == verdicts["linear"] == verdicts["output"] == (Verdict.INHERITED, "relu")


def test_missing_relu_is_named_when_removed_from_the_file(tmp_path: Path) -> None:
    program = low_relu_program()
    report = compare(program, planted(program, tmp_path, remove_node("relu")))
    assert report.stored == ()
    assert report.fault == ("relu",)


@pytest.mark.parametrize(
    ("edit", "node"),
    [
        (set_attribute("softmax", "axis", 1), "softmax"),
        (set_attribute("transpose", "perm", [0, 1, 2]), "transpose"),
    ],
)
def test_operation_on_another_axis_is_named(tmp_path: Path, edit: Edit, node: str) -> None:
    program = square_tokens_program()
    report = compare(program, planted(program, tmp_path, edit))
    assert report.stored == ()
    assert report.fault == (node,)


def test_float_node_is_named_when_its_attribute_changes(tmp_path: Path) -> None:
    program = tokens_program()
    report = compare(program, planted(program, tmp_path, set_attribute("layer_norm", "epsilon", 0.5)))
    assert report.fault == ("layer_norm",)


def test_convolution_is_named_when_its_padding_moves(tmp_path: Path) -> None:
    program = residual_program()
    report = compare(program, planted(program, tmp_path, set_attribute("conv2d", "pads", [0, 0, 2, 2])))
    assert report.fault == ("conv2d",)


def test_other_operation_is_named_when_the_operator_changes(tmp_path: Path) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        node_of(graph, "add").op_type = "Mul"

    program = residual_program()
    assert compare(program, planted(program, tmp_path, edit)).fault == ("add",)


def test_missing_quantizer_is_named_when_removed_from_the_file(tmp_path: Path) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        remove_node("conv2d_1_fq")(graph)
        remove_node("conv2d_1.quantize")(graph)

    program = residual_program()
    report = compare(program, planted(program, tmp_path, edit))
    assert report.fault[0] == "conv2d_1"
    assert [item.what for item in report.stored] == ["missing"]
    assert next(row for row in report.rows if row.value == "conv2d_1").verdict is Verdict.STORED
