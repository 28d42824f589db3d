"""What onnxruntime really ran, and why it did not fuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fxquant.graph.program import Program
from fxquant.numerics.runtime import Level, RuntimeOptions
from fxquant.parity.onnx_file import OnnxFile
from fxquant.parity.optimised import Fusion, KernelKind, read_fusion
from fxquant.parity.segments import SegmentReader
from fxquant.spec import QuantSpec, Target
from tests.lowering.programs import RESIDUAL_VALUES, Residual, float_program, image, quantized
from tests.parity.files import (
    ONE_THREAD,
    Edit,
    change_grid,
    export,
    low_relu_program,
    node_of,
    plant,
    residual_program,
    set_attribute,
    tokens_program,
)


def fusion_of(program: Program, path: Path, options: RuntimeOptions = ONE_THREAD) -> Fusion:
    return read_fusion(SegmentReader(program), OnnxFile(path), options)


def reason_at(fusion: Fusion, node: str) -> str:
    kernel = fusion.of(node)
    assert kernel is not None
    return kernel.reason


def test_every_node_is_integer_or_absorbed_when_all_fuses(tmp_path: Path) -> None:
    program = residual_program()
    fusion = fusion_of(program, export(program, tmp_path))
    kernels = {kernel.node: kernel.kernels for kernel in fusion.nodes}
    assert kernels["conv2d"] == ("QLinearConv",) and kernels["add"] == ("QLinearAdd",)
    assert kernels["linear"] == ("QGemm",) and kernels["relu"] == ()
    assert kernels["adaptive_avg_pool2d"] == ("QLinearGlobalAveragePool",)
    assert fusion.unfused == () and fusion.leftover == 0
    assert fusion.count(KernelKind.INTEGER) == 7 and fusion.count(KernelKind.ABSORBED) == 2
    assert dict(fusion.operators)["QLinearConv"] == 2


@pytest.mark.parametrize("level", [Level.BASIC, Level.DISABLED])
def test_nothing_is_integer_when_the_level_does_not_fuse(tmp_path: Path, level: Level) -> None:
    program = residual_program()
    fusion = fusion_of(program, export(program, tmp_path), RuntimeOptions(level, threads=1))
    assert fusion.count(KernelKind.INTEGER) == 0 and fusion.leftover > 10
    assert reason_at(fusion, "conv2d") == f"onnxruntime fuses nothing at level {level.value}"


@pytest.mark.parametrize(
    ("edit", "node", "reason"),
    [
        (
            change_grid("conv1_bias_fq", 1, lambda scale: scale * np.float32(1.1)),
            "conv2d",
            "its bias scale is 10.0% off input scale x weight scale",
        ),
        (
            change_grid("max_pool2d_fq", 1, lambda scale: scale * np.float32(1.5)),
            "max_pool2d",
            "the grids in front of it and behind it differ",
        ),
        (set_attribute("linear", "alpha", 0.5), "linear", "its alpha or beta is not 1"),
    ],
)
def test_reason_is_given_when_a_rule_is_broken(tmp_path: Path, edit: Edit, node: str, reason: str) -> None:
    program = residual_program()
    fusion = fusion_of(program, plant(export(program, tmp_path), edit))
    assert [kernel.node for kernel in fusion.unfused] == [node]
    assert reason_at(fusion, node) == reason
    assert fusion.leftover > 0


def test_reason_is_the_second_reader_when_an_output_is_read_in_float(tmp_path: Path) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        node_of(graph, "add").input[0] = "conv2d_1"

    program = residual_program()
    fusion = fusion_of(program, plant(export(program, tmp_path), edit))
    assert reason_at(fusion, "conv2d_1") == "its output has 2 readers (conv2d_1.quantize, add)"
    assert reason_at(fusion, "add") == "its input 'conv2d_1' is not quantized"


def test_reason_is_the_graph_output_when_it_is_returned_in_float(tmp_path: Path) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        graph.output.append(onnx.ValueInfoProto(name="conv2d_1"))

    program = residual_program()
    fusion = fusion_of(program, plant(export(program, tmp_path), edit))
    assert reason_at(fusion, "conv2d_1") == "its output is a graph output in float"


def test_reason_is_the_relu_when_the_grid_behind_it_reaches_lower(tmp_path: Path) -> None:
    program = low_relu_program()
    fusion = fusion_of(program, export(program, tmp_path))
    assert reason_at(fusion, "conv2d") == "Relu 'relu' cuts at 0, above the lowest value of the grid behind it"


class Clipped(nn.Module):
    """conv-relu6: the grid may reach beyond 6."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.relu6(self.conv(x))


def test_reason_is_the_clip_when_the_grid_reaches_beyond_it(tmp_path: Path) -> None:
    program = float_program(Clipped(), image())
    clip = next(
        node.name for node in program.graph.nodes if node.name not in ("x", "conv2d") and node.op == "call_function"
    )
    program = quantized(program, ["x", clip], image(8), specs={clip: QuantSpec(8, fixed=(0.0, 7.0))})
    fusion = fusion_of(program, export(program, tmp_path))
    assert reason_at(fusion, "conv2d") == f"Clip '{clip}' cuts at 6, below the highest value of the grid behind it"


def test_config_reaches_the_session_when_it_turns_fusion_off(tmp_path: Path) -> None:
    program = residual_program()
    options = RuntimeOptions(threads=1, config=(("session.disable_quant_qdq", "1"),))
    fusion = fusion_of(program, export(program, tmp_path), options)
    assert fusion.count(KernelKind.INTEGER) == 0
    assert reason_at(fusion, "conv2d_1") == "session.disable_quant_qdq is set"


def test_reason_is_the_missing_quantizer_when_values_stay_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = quantized(float_program(Residual(), image()), ["x", "relu", "relu_1"], image(8))
    fusion = fusion_of(program, export(program, tmp_path))
    assert reason_at(fusion, "conv2d_1") == "its output is not quantized ('add' reads it in float)"
    add = fusion.of("add")
    assert add is not None and add.kind is KernelKind.ABSORBED  # by the FusedConv


def test_reason_is_the_sign_when_activations_are_signed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = QuantSpec(8, signed=True, symmetric=True)
    shares = {"max_pool2d": "relu_1", "flatten": "adaptive_avg_pool2d"}
    program = quantized(float_program(Residual(), image()), RESIDUAL_VALUES, image(8), spec=spec, shares=shares)
    program.target = Target.TENSORRT  # for onnxruntime such a program is not exported at all
    fusion = fusion_of(program, export(program, tmp_path))
    reasons = {kernel.reason for kernel in fusion.unfused}
    assert any("signed activation" in reason or "cuts at 0" in reason for reason in reasons)
    assert "no known reason" not in reasons


def test_float_islands_and_partly_integer_nodes_are_told_apart(tmp_path: Path) -> None:
    program = tokens_program()
    fusion = fusion_of(program, export(program, tmp_path))
    kinds = {kernel.node: kernel.kind for kernel in fusion.nodes}
    assert kinds["layer_norm"] is kinds["gelu"] is KernelKind.FLOAT
    assert kinds["matmul"] is kinds["softmax"] is kinds["transpose"] is KernelKind.INTEGER
    assert reason_at(fusion, "gelu") == "onnxruntime has no integer kernel for Gelu"


class Inlined(nn.Module):
    """Activations that onnxruntime has no kernels for: it computes them by the bodies of their functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.hardswish(self.first(x)))


@pytest.mark.parametrize("level", [Level.ALL, Level.EXTENDED])
def test_operation_that_is_inlined_is_a_float_island(tmp_path: Path, level: Level) -> None:
    torch.manual_seed(0)
    program = float_program(Inlined(), image())
    program = quantized(program, ["x", "conv2d", "hardswish", "conv2d_1"], image(8))
    fusion = fusion_of(program, export(program, tmp_path), RuntimeOptions(level, threads=1))
    (kernel,) = fusion.unfused
    assert (kernel.node, kernel.kernels) == ("hardswish", ("HardSigmoid", "Mul"))
    assert kernel.reason == "onnxruntime has no integer kernel for HardSwish"
