"""Grids below 8 bits run in the integer kernels of 8: weights as INT8 codes, activations behind a Clip of codes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxquant
from benchmarks import models
from benchmarks.networks import NETWORKS, synthetic_images
from fxquant.graph.program import Program
from fxquant.lowering import lower
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.numerics.runtime import Level, RuntimeOptions
from fxquant.parity import ParityReport
from fxquant.spec import QuantSpec
from tests.lowering.programs import calibrate_on, fake_quant_of, float_program, quantized
from tests.ops.harness import run_onnx

CONFIG = Path(fxquant.__file__).parents[1] / "configs" / "int8_per_channel.toml"
BITS = range(2, 9)


def quantize(
    model: nn.Module, x: torch.Tensor, folder: Path, *, weight: int, activation: int
) -> tuple[Program, ParityReport]:
    """int8_per_channel with other bits, from end to end; compared on twice the calibrated range."""
    text = CONFIG.read_text(encoding="utf-8")
    for name, bits in (("weight", weight), ("activation", activation)):
        assert text.count(f"{name} = {{ bits = 8,") == 1
        text = text.replace(f"{name} = {{ bits = 8,", f"{name} = {{ bits = {bits},")
    (folder / "config.toml").write_text(text, encoding="utf-8")
    program = fxquant.capture(model.eval(), x)
    pipeline = fxquant.load_pipeline(folder / "config.toml")
    pipeline.prepare(program)
    fxquant.calibrate(program, [x])
    pipeline.finalize(program)
    fxquant.export_onnx(program, folder / "model.onnx")
    options = RuntimeOptions(Level.ALL, threads=1)
    report = fxquant.check_parity(program, folder / "model.onnx", [2.0 * x], options=options)
    assert report.worst_local_steps <= 1 and not report.fault, str(report)
    return program, report


def operators(report: ParityReport) -> Counter[str]:
    """Operators of the graph that onnxruntime ran."""
    return Counter(dict(report.fusion.operators))


def assert_all_integer(report: ParityReport) -> None:
    """No node in float, and no Q/DQ but those of the graph's inputs and outputs."""
    assert not report.fusion.unfused, [f"{kernel.node}: {kernel.reason}" for kernel in report.fusion.unfused]
    assert report.fusion.leftover == 0, operators(report)


class Kinds(nn.Module):
    """What a CNN of torchvision's needs: relu, relu6, hardtanh, residual add, max pool, global pool, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.join = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 1)
        self.last, self.linear = nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        with torch.no_grad():
            for layer in (self.body, self.last):  # their activations must clip
                layer.weight.mul_(20.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(self.join(F.relu6(self.body(x))) + x)
        x = F.hardtanh(self.last(x), -0.5, 1.5)
        found: torch.Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return found


class Mixed(nn.Module):
    """The other integer kernels: concat, sigmoid and mul (squeeze and excite), average pool, leaky relu, resize."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.squeeze = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(16, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([F.leaky_relu(self.left(x), 0.1), F.relu(self.right(x))], 1)
        y = y * torch.sigmoid(self.squeeze(F.adaptive_avg_pool2d(y, 1)))
        return F.interpolate(F.avg_pool2d(y, 2), scale_factor=2.0)


class Attention(nn.Module):
    """Linears of rank 3 with a relu, products of activations, softmax, transposition."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.matmul(self.query(x), self.key(x).transpose(1, 2))
        found: torch.Tensor = F.relu(self.out(torch.matmul(torch.softmax(scores, -1), self.value(x))))
        return found


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("weight", "activation"), [*((bits, bits) for bits in BITS), (4, 8), (8, 4)])
def test_every_layer_runs_on_integers_when_its_grids_are_narrow(weight: int, activation: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program, report = quantize(Kinds(), image(4, 3, 18, 18), tmp_path, weight=weight, activation=activation)
    assert_all_integer(report)
    found = operators(report)
    assert (found["QLinearConv"], found["QLinearAdd"], found["QGemm"]) == (4, 1, 1), found
    assert (found["QLinearGlobalAveragePool"], found["NhwcMaxPool"]) == (1, 1), found
    clips = 0 if activation == 8 else sum(1 for _, module in program.fake_quant_nodes() if not module.follows)
    assert found["Clip"] == clips, found


@pytest.mark.parametrize(
    ("model", "shape"), [(Mixed, (4, 3, 12, 12)), (Attention, (4, 6, 16))], ids=["mixed", "attention"]
)
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_kernels_are_those_of_8_bits_when_grids_are_narrow(
    model: type[nn.Module], shape: tuple[int, ...], bits: int, tmp_path: Path
) -> None:
    def kernels(bits: int) -> Counter[str]:
        torch.manual_seed(0)
        _, report = quantize(model(), 3.0 * image(*shape), tmp_path, weight=bits, activation=bits)
        assert_all_integer(report)
        found = operators(report)
        assert (found.pop("Clip", 0) > 0) == (bits < 8)
        found.pop("Transpose", 0)  # the layout of one that is not 8 bits wide
        return found

    assert kernels(bits) == kernels(8)


def test_convolutions_would_run_in_float_when_their_clip_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lower, "is_left_to_quantizer", lambda node, writer: False)
    torch.manual_seed(0)
    _, report = quantize(Kinds(), image(4, 3, 18, 18), tmp_path, weight=4, activation=4)
    assert operators(report)["QLinearConv"] == 2 and report.fusion.leftover > 0
    assert {kernel.node for kernel in report.fusion.unfused} == {"body", "last"}


def test_clip_is_written_when_the_grid_reaches_beyond_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program, _ = quantize(Kinds(), image(4, 3, 18, 18), tmp_path, weight=4, activation=4)
    name = next(node.name for node in program.graph.nodes if node.target is torch.ops.aten.hardtanh.default)
    module = program.module.get_submodule(f"fake_quants.{name}")
    assert isinstance(module, FakeQuant) and name not in {node.name for node in lower.lower(program).graph}
    module.scale.mul_(1.1)  # 15 steps end above the clip's bound
    assert name in {node.name for node in lower.lower(program).graph}


@pytest.mark.parametrize("activation", [8, 4])
@pytest.mark.parametrize(("network", "convolutions", "sums"), [("resnet18", 20, 8), ("mobilenet_v2", 52, 10)])
def test_every_convolution_of_a_network_is_fused_when_weights_have_4_bits(
    network: str, convolutions: int, sums: int, activation: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = models.randomise(NETWORKS[network].build(), seed=0)  # fusion does not ask for the weights' values
    _, report = quantize(model, synthetic_images(1, 64, 0), tmp_path, weight=4, activation=activation)
    assert_all_integer(report)
    found = operators(report)
    assert (found["QLinearConv"], found["QLinearAdd"], found["QGemm"]) == (convolutions, sums, 1), found


@pytest.mark.parametrize("is_read_twice", [False, True])
def test_relu_is_written_when_something_else_reads_it_too(is_read_twice: bool) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.conv(x).clamp(-0.5, 0.5)
            return y * 2.0, y

    torch.manual_seed(0)
    x = image(2, 3, 8, 8)
    program = float_program(Twice(), x)
    quantized(program, ("x", "clamp"), x, specs={"clamp": QuantSpec(4)}, calibrate=False)
    if is_read_twice:
        (out,) = (node for node in program.graph.nodes if node.op == "output")
        out.replace_input_with(program.node("clamp_fq"), program.node("clamp"))
        program.recompile()
    calibrate_on(program, x)
    fake_quant_of(program, "clamp").set_range(torch.tensor(-0.4), torch.tensor(0.4))
    model = lower.lower(program)
    assert ("clamp" in {node.name for node in model.graph}) == is_read_twice
    found = run_onnx(model, [x])[-1]
    assert np.allclose(found, program.module(x)[1].detach().numpy(), atol=1e-5)
