"""The counting, the attribution rules, and the seam for other simulations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fxquant.graph.program import Program
from fxquant.parity import Verdict, check_parity
from fxquant.parity.compare import Tally, compare_codes, compare_values
from fxquant.parity.onnx_file import OnnxFile
from fxquant.parity.segments import SegmentReader
from fxquant.parity.simulation import FloatSimulation, RuntimeCodes, Step
from tests.lowering.programs import image
from tests.parity.files import ONE_THREAD, export, residual_program, tokens_program


def test_codes_are_counted_when_some_differ() -> None:
    ours, theirs = np.array([[1, 2], [3, 250]]), np.array([[1, 3], [3, 253]], dtype=np.uint8)
    found = compare_codes(ours, theirs, 255, 7)
    assert (found.compared, found.differing, found.worst, found.fraction) == (4, 2, 3, 0.5)
    assert found.first == "batch 7 at [0, 1]: 2, onnxruntime has 3"


def test_code_outside_the_grid_counts_as_the_whole_grid() -> None:
    assert compare_codes(np.array([-(2**31)]), np.array([5]), 255, 0).worst == 255


def test_other_shapes_differ_everywhere() -> None:
    found = compare_codes(np.zeros((2, 3)), np.zeros((3, 2)), 255, 0)
    assert (found.compared, found.differing, found.worst) == (6, 6, 255)
    assert compare_values(np.zeros((2, 3)), np.zeros((3, 2)), 0).worst == float("inf")


def test_values_are_compared_bit_for_bit_and_nan_equals_nan() -> None:
    ours = np.array([1.0, np.nan, np.inf, 2.0], dtype=np.float32)
    assert compare_values(ours, ours.copy(), 0).differing == 0
    found = compare_values(ours, np.array([1.0, np.nan, np.inf, 2.5], dtype=np.float32), 0)
    assert (found.differing, found.worst, found.largest) == (1, 0.5, 2.5)
    assert compare_values(ours, np.array([1.0, 0.0, np.inf, 2.0], dtype=np.float32), 0).worst == float("inf")


def test_empty_tensors_are_equal() -> None:
    empty = np.zeros((0, 3))
    assert compare_codes(empty, empty, 255, 0).fraction == compare_values(empty, empty, 0).fraction == 0


def test_tally_adds_batches_and_keeps_the_first_difference() -> None:
    tally = Tally()
    tally.add(compare_codes(np.array([1, 2]), np.array([1, 2]), 255, 0))
    tally.add(compare_codes(np.array([1, 2]), np.array([4, 2]), 255, 1))
    tally.add(compare_codes(np.array([1, 2]), np.array([2, 3]), 255, 2))
    total = tally.difference
    assert (total.compared, total.differing, total.worst) == (6, 3, 3)
    assert total.first.startswith("batch 1")


def test_segments_end_at_quantizers_and_outputs() -> None:
    found = {segment.value: segment for segment in SegmentReader(tokens_program()).segments()}
    names = {value: [node.name for node in segment.nodes] for value, segment in found.items()}
    assert names["x"] == [] and names["linear"] == ["linear"] and names["output"] == ["linear_2"]
    assert [source.name for source in found["matmul_1"].sources] == ["x_fq", "softmax_fq"]


def test_extracted_part_stops_at_known_tensors(tmp_path: Path) -> None:
    import onnx

    file = OnnxFile(export(residual_program(), tmp_path))
    data, inputs = file.extract({"relu.codes", "x.codes"}, ["conv2d_1"])
    part = onnx.load_from_string(data)
    assert inputs == ["relu.codes"]
    assert {node.name for node in part.graph.node} == {"relu_fq", "conv2_weight_fq", "conv2_bias_fq", "conv2d_1"}


class OneWrongKernel(FloatSimulation):
    """The float simulation, but for one node that rounds its codes up by a number of steps."""

    def __init__(self, quantizer: str, steps: int) -> None:
        self._quantizer = quantizer
        self._steps = steps

    def run(self, program: Program, inputs: Mapping[str, Any], teacher: Mapping[str, RuntimeCodes]) -> Iterator[Step]:
        for step in super().run(program, inputs, teacher):
            is_wrong = step.node.name == self._quantizer and not step.is_output
            yield Step(step.node, torch.clamp(step.value + self._steps, max=255), False) if is_wrong else step


@pytest.mark.parametrize(("steps", "verdict"), [(1, Verdict.ROUNDING), (2, Verdict.DIFFERS)])
def test_another_simulation_is_compared_when_given(tmp_path: Path, steps: int, verdict: Verdict) -> None:
    program = residual_program()
    wrong = OneWrongKernel("conv2d_1_fq", steps)
    report = check_parity(
        program, export(program, tmp_path), [image(4)], options=ONE_THREAD, simulation=wrong, progress=False
    )
    verdicts = {row.value: row.verdict for row in report.rows}
    assert verdicts.pop("conv2d_1") is verdict
    assert set(verdicts.values()) == {Verdict.EXACT}
    assert report.fault == (("conv2d_1",) if steps > 1 else ())
