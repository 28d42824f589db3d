"""Certified tensors tolerate nothing: a fault in file or kernel that moves a single code is found, and is its node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from fxquant.graph.program import Program
from fxquant.numerics.codes import Grid
from fxquant.numerics.kernels import elementwise, pooling, tables
from fxquant.numerics.kernels.requantize import requantize
from fxquant.numerics.runtime import Array
from fxquant.ops import pooling as operations
from fxquant.ops.kernels import Kernel
from fxquant.ops.table import TABLE
from fxquant.parity import Verdict
from fxquant.simulation import integer
from fxquant.simulation.certification import CertificationWarning, forget
from tests.lowering.programs import fake_quant_of
from tests.parity.files import (
    Edit,
    branches_program,
    change_code,
    change_grid,
    compare,
    export,
    node_of,
    plant,
    residual_program,
    set_attribute,
    square_tokens_program,
    swap_weight_axis,
    tie_program,
)

SIMULATIONS = ("exact", "integer")
PROGRAMS: dict[str, Callable[[], Program]] = {
    "residual": residual_program,
    "tokens": square_tokens_program,
    "branches": branches_program,
}


def plus(steps: int) -> Callable[[Array], Array]:
    """Move a zero point."""
    return lambda zero_point: zero_point.astype(np.int64) + steps


def times(factor: float) -> Callable[[Array], Array]:
    """Multiply a scale."""
    return lambda scale: scale * np.float32(factor)


def next_float(scale: Array) -> Array:
    """The next float32: 1 ulp up."""
    return np.nextafter(scale, np.float32(np.inf), dtype=np.float32)


def swap_inputs(name: str) -> Edit:
    """Give a node of two inputs these in the other order."""

    def edit(graph: onnx.GraphProto) -> None:
        node = node_of(graph, name)
        node.input[0], node.input[1] = node.input[1], node.input[0]

    return edit


CHANGES_CODES = [
    ("residual", change_code("conv1_weight.codes", 1), "conv2d"),
    ("residual", change_code("conv2_weight.codes", -1), "conv2d_1"),
    ("residual", change_code("fc_weight.codes", 1), "linear"),
    ("residual", change_code("conv1_bias.codes", -1), "conv2d"),
    ("residual", change_code("conv2_bias.codes", 1), "conv2d_1"),
    ("residual", change_grid("conv2_weight_fq", 1, times(1.01)), "conv2d_1"),
    ("residual", change_grid("conv2_weight_fq", 2, plus(1)), "conv2d_1"),
    ("residual", change_grid("conv1_bias_fq", 1, times(1.5)), "conv2d"),
    ("residual", change_grid("x_fq", 2, plus(-1)), "x"),
    ("residual", change_grid("conv2d_1_fq", 2, plus(1)), "conv2d_1"),
    ("residual", change_grid("relu_1_fq", 1, times(1.001)), "relu_1"),
    ("tokens", change_code("query_weight.codes", 1), "linear"),
    ("tokens", change_code("head_weight.codes", -1), "linear_2"),
    ("tokens", change_code("head_bias.codes", 1), "linear_2"),
    ("tokens", change_grid("matmul_fq", 2, plus(1)), "matmul"),
    ("tokens", change_grid("layer_norm_fq", 2, plus(1)), "layer_norm"),
    ("tokens", change_grid("gelu_fq", 1, times(1.001)), "gelu"),
    ("branches", change_code("left_weight.codes", 1), "conv2d"),
    ("branches", change_code("last_weight.codes", -1), "conv2d_2"),
    ("branches", change_code("right_bias.codes", 1), "conv2d_1"),
    ("branches", change_grid("cat_fq", 2, plus(-1)), "cat"),
    ("branches", change_grid("mul_fq", 2, plus(1)), "mul"),
    ("branches", change_grid("hardswish_fq", 2, plus(1)), "hardswish"),
    ("branches", change_grid("avg_pool2d_fq", 1, times(1.001)), "avg_pool2d"),
]


@pytest.mark.parametrize("check_stored", [True, False])
@pytest.mark.parametrize(("name", "edit", "node"), CHANGES_CODES)
def test_fault_in_the_file_is_exactly_its_node(
    tmp_path: Path, name: str, edit: Edit, node: str, check_stored: bool
) -> None:
    program = PROGRAMS[name]()
    path = plant(export(program, tmp_path), edit)
    for simulation in SIMULATIONS:
        report = compare(program, path, simulation=simulation, check_stored=check_stored, seeds=3)
        assert report.fault == (node,)
        assert report.verdict.startswith(f"FAULT at {node}: ")
        assert bool(report.stored) is check_stored
        (row,) = [row for row in report.rows if row.verdict.is_fault]
        assert row.value == node or node in row.nodes


def test_single_codes_are_rounding_to_the_float_simulation_and_faults_to_the_exact_one(tmp_path: Path) -> None:
    program = residual_program()
    path = plant(export(program, tmp_path), change_code("conv2_bias.codes", 1))
    found = {name: compare(program, path, simulation=name, check_stored=False) for name in ("float", "exact")}
    rows = {name: next(row for row in report.rows if row.value == "conv2d_1") for name, report in found.items()}
    assert rows["float"].verdict is Verdict.ROUNDING and found["float"].fault == ()
    assert rows["exact"].verdict is Verdict.DIFFERS and rows["exact"].local.differing == 1
    assert "certified, but QLinearConv gives other codes" in rows["exact"].reason


CHANGES_NO_CODES = [
    ("residual", change_grid("conv1_bias_fq", 1, times(1.001)), "conv2d", "scale"),
    ("residual", change_grid("fc_bias_fq", 1, times(2)), "linear", "scale"),
    ("residual", set_attribute("conv2_weight_fq", "axis", 1), "conv2d_1", "axis"),
    ("tokens", swap_weight_axis("key_weight_fq"), "linear_1", "axis"),
]


@pytest.mark.parametrize(("name", "edit", "node", "what"), CHANGES_NO_CODES)
def test_constant_that_the_kernel_does_not_read_is_found_by_the_static_check_alone(
    tmp_path: Path, name: str, edit: Edit, node: str, what: str
) -> None:
    program = PROGRAMS[name]()
    path = plant(export(program, tmp_path), edit)
    checked = compare(program, path, simulation="exact")
    assert checked.fault == (node,) and {item.what for item in checked.stored} == {what}
    unchecked = compare(program, path, simulation="exact", check_stored=False)
    assert unchecked.exact and unchecked.fault == ()  # QLinearConv and QGemm ignore it: the integers are the same


@pytest.mark.parametrize(
    ("name", "edit", "node"),
    [
        ("tokens", set_attribute("transpose", "perm", [0, 1, 2]), "transpose"),
        ("tokens", set_attribute("softmax", "axis", 1), "softmax"),
        ("branches", swap_inputs("cat"), "cat"),
        ("branches", set_attribute("conv2d", "pads", [0, 0, 2, 2]), "conv2d"),
    ],
)
def test_operation_with_another_attribute_is_named(tmp_path: Path, name: str, edit: Edit, node: str) -> None:
    program = PROGRAMS[name]()
    report = compare(program, plant(export(program, tmp_path), edit), simulation="exact")
    assert report.fault == (node,)


@pytest.mark.parametrize("node", ["x", "relu", "conv2d_1"])
def test_scale_off_by_one_ulp_is_its_node(tmp_path: Path, node: str) -> None:
    program = residual_program()
    path = plant(export(program, tmp_path), change_grid(f"{node}_fq", 1, next_float))
    report = compare(program, path, simulation="exact")
    assert report.fault == (node,)
    assert [(item.what, item.worst < 2e-7) for item in report.stored] == [("scale", True)] * len(report.stored)


def test_scale_off_by_one_ulp_is_its_node_without_the_static_check_when_a_tie_breaks(tmp_path: Path) -> None:
    program = tie_program()
    path = plant(export(program, tmp_path), change_grid("conv2d_1_fq", 1, next_float))
    report = compare(program, path, simulation="exact", check_stored=False)
    assert report.fault == ("conv2d_1",) and report.codes_differing > 0
    row = next(row for row in report.rows if row.value == "conv2d_1")
    assert row.reason == "its grid in the file is not the program's"


# ------------------------------------------------------------------------------------------ wrong roundings in kernels


def half_up(real: torch.Tensor, out: Grid) -> torch.Tensor:
    """Codes of reals in steps of `out`, with halves rounded up."""
    return (torch.floor(real / out.scale + 0.5).to(torch.int64) + out.zero_point).clamp(out.qmin, out.qmax)


def truncated(codes: torch.Tensor, real: torch.Tensor, out: Grid) -> torch.Tensor:
    """The codes, but rounded down where that moves them."""
    down = (torch.floor(real / out.scale).to(torch.int64) + out.zero_point).clamp(out.qmin, out.qmax)
    return torch.minimum(codes, down)


def half_up_add(a: torch.Tensor, b: torch.Tensor, one: Grid, other: Grid, out: Grid) -> torch.Tensor:
    real = (a - one.zero_point) * one.scale + (b - other.zero_point) * other.scale
    return half_up(real, out)


def truncating_multiply(a: torch.Tensor, b: torch.Tensor, one: Grid, other: Grid, out: Grid) -> torch.Tensor:
    real = (a - one.zero_point) * one.scale * ((b - other.zero_point) * other.scale)
    return truncated(elementwise.multiply(a, b, one, other, out), real, out)


def truncating_sigmoid(x: torch.Tensor, grid: Grid, out: Grid) -> torch.Tensor:
    real = torch.sigmoid((x - grid.zero_point) * grid.scale)
    return truncated(tables.sigmoid(x, grid, out), real, out)


def mean_with_zero_point_first(node: Any, args: Any, out: Grid) -> torch.Tensor:
    x = args[0]
    mean = x.real().mean((-2, -1), keepdim=True)
    return torch.round(mean / out.scale + out.zero_point).clamp(out.qmin, out.qmax).to(torch.int64)


@pytest.mark.parametrize("simulation", SIMULATIONS)
@pytest.mark.parametrize(
    ("make", "node", "change"),
    [
        (tie_program, "add", {"codes": half_up_add}),
        (tie_program, "adaptive_avg_pool2d", {"codes": mean_with_zero_point_first}),
        (branches_program, "mul", {"codes": truncating_multiply}),
        (branches_program, "sigmoid", {"codes_for": lambda node: truncating_sigmoid}),
    ],
)
def test_kernel_with_one_wrong_rounding_is_its_node(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    simulation: str,
    make: Callable[[], Program],
    node: str,
    change: dict[str, Any],
) -> None:
    program = make()
    path = export(program, tmp_path)
    assert compare(program, path, simulation=simulation).exact
    target = program.node(node).target
    definition = TABLE.find(program.node(node))
    assert definition is not None and isinstance(definition.kernel, Kernel)
    monkeypatch.setitem(TABLE._by_target, target, replace(definition, kernel=replace(definition.kernel, **change)))
    report = compare(program, path, simulation=simulation)
    assert report.fault == (node,) and report.stored == ()
    (row,) = [row for row in report.rows if row.verdict.is_fault]
    assert row.worst_local_steps == 1 and report.certified_differing == row.local.differing


@pytest.mark.parametrize("node", ["conv2d_1", "linear"])
def test_product_with_the_zero_point_before_rounding_is_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    program = tie_program()
    path = export(program, tmp_path)
    grid = fake_quant_of(program, node).grid

    def planted(accumulator: torch.Tensor, multiplier: torch.Tensor, out: Grid) -> torch.Tensor:
        if not out.same_as(grid):
            return requantize(accumulator, multiplier, out)
        scaled = accumulator.to(torch.float32) * multiplier + out.zero_point
        return torch.round(scaled).clamp(out.qmin, out.qmax).to(torch.int64)

    monkeypatch.setattr(integer, "requantize", planted)
    report = compare(program, path, simulation="integer", seeds=20)
    assert report.fault == (node,)
    assert compare(program, path, simulation="exact").exact


def test_wrong_reference_formula_downgrades_its_kernel_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zero_point_first(x: torch.Tensor, grid: Grid, out: Grid, axes: int) -> torch.Tensor:
        mean = ((x - grid.zero_point) * grid.scale).mean((-2, -1), keepdim=True)
        return torch.round(mean / out.scale + out.zero_point).clamp(out.qmin, out.qmax).to(torch.int64)

    program = tie_program()
    path = export(program, tmp_path)
    forget()
    for module in (pooling, operations):
        monkeypatch.setattr(module, "global_average_pool", zero_point_first)
    with pytest.warns(CertificationWarning, match="kernel QLinearGlobalAveragePool is uncertified"):
        report = compare(program, path, simulation="exact")
    forget()
    row = next(row for row in report.rows if row.value == "adaptive_avg_pool2d")
    assert row.verdict is Verdict.ROUNDING and report.fault == ()
    assert not row.certification.is_certified and "self-test differ" in row.certification.reason
    assert "1 uncertified (adaptive_avg_pool2d)" in report.verdict
