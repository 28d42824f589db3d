"""Clips that run inside the FakeQuant behind them: same values, same gradients, same graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import Mode

PRESETS = ("int8_per_channel", "int8_per_channel_qat", "int8_per_channel_lsq_qat")


def calibrated(activation: nn.Module, preset: str = "int8_per_channel", x: torch.Tensor | None = None) -> Program:
    """conv, batch norm, activation, conv, prepared and calibrated."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation, nn.Conv2d(4, 2, 3))
    images = torch.randn(4, 3, 9, 9) if x is None else x
    program = fxquant.capture(net, images)
    fxquant.load_pipeline(preset).prepare(program)
    fxquant.calibrate(program, [images], progress=False)
    return program


def unfused(program: Program, x: torch.Tensor) -> torch.Tensor:
    """The graph, node by node as it stands."""
    out: torch.Tensor = torch.fx.Interpreter(program.module).run(x)
    return out


def is_fused(program: Program) -> bool:
    """Whether the compiled code hands a clip to a FakeQuant."""
    return "clip = (" in program.module.code


def results(run: Any, program: Program, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, and the gradients by the input and all parameters."""
    x = x.clone().requires_grad_()
    out = run(x)
    parameters = [parameter for parameter in program.module.parameters() if parameter.requires_grad]
    weights = torch.linspace(-1.0, 1.0, out.numel()).view_as(out)
    return [
        out.detach(),
        *(g for g in torch.autograd.grad(out, [x, *parameters], weights, allow_unused=True) if g is not None),
    ]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.25), nn.Hardtanh(0.0, 2.0)])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("is_training", [True, False])
def test_fused_clip_computes_what_the_graph_says(activation: nn.Module, preset: str, is_training: bool) -> None:
    program = calibrated(activation, preset)
    program.module.train(is_training)
    assert is_fused(program)
    assert any(node.op == "call_function" and "clip" not in node.kwargs for node in program.graph.nodes)
    twin, x = program.copy(), 2.0 * torch.randn(4, 3, 9, 9)  # some of it outside the calibrated ranges
    found = results(program.module, program, x)
    expected = results(lambda value: unfused(twin, value), twin, x)
    assert len(found) == len(expected) > 3
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.OBSERVE, Mode.OBSERVE_FAKE, Mode.FROZEN])
def test_fused_clip_is_applied_whatever_the_mode(mode: Mode) -> None:
    program = calibrated(nn.ReLU6())
    x = 3.0 * torch.randn(2, 3, 9, 9)
    twin = program.copy()
    for one in (program, twin):
        for _, quantizer in one.fake_quant_nodes():
            quantizer.mode = mode if not quantizer.follows else quantizer.mode
    assert torch.equal(program.module(x), unfused(twin, x))
    for (_, mine), (_, other) in zip(program.fake_quant_nodes(), twin.fake_quant_nodes(), strict=True):
        assert torch.equal(mine.estimator.low, other.estimator.low)


def test_clip_that_the_grid_does_not_make_redundant_is_applied() -> None:
    program = calibrated(nn.ReLU6())
    (quantizer,) = (
        module
        for node, module in program.fake_quant_nodes()
        if isinstance(source := node.args[0], torch.fx.Node) and "hardtanh" in str(source.target)
    )
    quantizer.scale.fill_(0.1)  # its grid now ends at 25.5
    quantizer.mode = Mode.FROZEN
    x = 30.0 * torch.randn(2, 3, 9, 9)
    found = results(program.module, program, x)
    for mine, other in zip(found, results(lambda value: unfused(program, value), program, x), strict=True):
        assert torch.equal(mine, other)


def test_clips_that_others_read_too_or_that_pass_their_bounds_run_by_themselves() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = torch.relu(self.conv(x))
            return self.conv(y), torch.softmax(y, 1)

    x = torch.randn(2, 3, 4, 4)
    program = fxquant.capture(Twice(), x)
    fxquant.load_pipeline("int8_per_channel").prepare(program)
    fxquant.calibrate(program, [x], progress=False)
    for mine, other in zip(program.module(x), unfused(program, x), strict=True):
        assert torch.equal(mine, other)

    class Clamped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.clamp(x, 0.0, 6.0)

    assert not is_fused(calibrated(Clamped()))  # a clamp's gradient passes at its bounds


def test_copies_keep_the_clip_fused_and_the_graph_whole() -> None:
    program = calibrated(nn.ReLU())
    x = torch.randn(2, 3, 9, 9)
    twin = copy.deepcopy(program.module)
    assert "clip = (" in twin.code and torch.equal(twin(x), program.module(x))
    assert [node.name for node in twin.graph.nodes] == [node.name for node in program.graph.nodes]
    assert any("relu" in str(node.target) for node in twin.graph.nodes)
