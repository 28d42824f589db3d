"""Faults planted in the grids of weights that are quantized in blocks: each is found, at its layer alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import fxquant
from fxquant.graph.program import Program
from fxquant.numerics.runtime import Array
from tests.parity.files import (
    ONE_THREAD,
    Edit,
    change_code,
    change_grid,
    export,
    plant,
    swap_weight_axis,
)
from tests.simulation.blocks import blocks_program, images


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return blocks_program(tmp_path_factory.mktemp("blocks"))


def _scaled(quantizer: str, index: tuple[int, ...], factor: float) -> Edit:
    """One block's scale, times `factor`."""

    def change(scale: Array) -> Array:
        scale[index] *= np.float32(factor)
        return scale

    return change_grid(quantizer, 1, change)


def _shifted(quantizer: str, index: tuple[int, ...], steps: int) -> Edit:
    """One block's zero point, moved by `steps`."""

    def change(zero_point: Array) -> Array:
        zero_point[index] += steps
        return zero_point

    return change_grid(quantizer, 2, change)


def _turned(quantizer: str) -> Edit:
    """Blocks along the other axis of a square weight, with the same numbers."""

    def edit(graph: onnx.GraphProto) -> None:
        change_grid(quantizer, 1, np.transpose)(graph)
        zero_point = onnx.numpy_helper.from_array(np.zeros((16, 2), np.int8), "zeros.planted")
        graph.initializer.append(zero_point)
        next(node for node in graph.node if node.name == quantizer).input[2] = zero_point.name
        swap_weight_axis(quantizer)(graph)

    return edit


@pytest.mark.parametrize(
    ("edit", "node", "what", "detail"),
    [
        (_scaled("c1_weight_fq", (3, 1, 2, 2), 1.01), "c1", {"scale"}, "1 of 288 differ by up to 0.01 relative"),
        (_scaled("q_weight_fq", (1, 5), 0.5), "q", {"scale"}, "1 of 32 differ by up to 0.5 relative"),
        (_scaled("fc_weight_fq", (4, 1), 1.001), "fc", {"scale"}, "first at [9]"),
        (_shifted("c2_weight_fq", (0, 0, 0, 0), 3), "c2", {"zero point"}, "1 of 32 differ"),
        (change_code("q_weight.codes", 1), "q", {"codes"}, "1 of 256 differ"),
        (_turned("q_weight_fq"), "q", {"scale", "zero point", "axis"}, "axis 1 in blocks of 8, the program has axis 0"),
    ],
)
def test_stored_fault_is_its_layer_alone_when_planted_in_blocks(
    program: Program, tmp_path: Path, edit: Edit, node: str, what: set[str], detail: str
) -> None:
    path = plant(export(program, tmp_path), edit)
    report = fxquant.check_parity(program, path, [images(4, 3)], options=ONE_THREAD, simulation="float", progress=False)
    assert report.fault == (node,)
    found = [str(item) for item in report.stored]
    assert {item.what for item in report.stored} <= what and any(detail in text for text in found), found
    assert not report.exact
