"""Nets for the tests of cross-layer equalization and absorbing biases: random ones with branches and dead channels, and
the loops that say what equalization is to give; pipelines with these passes, and the comparison with onnxruntime.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxquant
from fxquant.graph.passes import Pass
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import NoteKind, Program
from fxquant.numerics.runtime import RuntimeOptions
from fxquant.passes import FoldBatchNorm

IMAGE = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1))
SIZE = 9  # height and width of the random nets' images


@dataclass(frozen=True)
class Step:
    """One layer of a random net, and what follows it."""

    layer: str  # conv, depthwise, grouped, transposed
    follow: str  # a key of FOLLOWS
    branch: str  # "", "residual", "concat", "twice"
    dead: str  # "", "outputs", "inputs"
    bias: bool
    spread: float  # log2 of how far channels' weights lie apart


FOLLOWS = {
    "relu": lambda channels: nn.ReLU(),
    "leaky": lambda channels: nn.LeakyReLU(0.2),
    "prelu": lambda channels: nn.PReLU(channels),
    "identity": lambda channels: nn.Identity(),
    "dropout": lambda channels: nn.Dropout(0.3),
    "relu6": lambda channels: nn.ReLU6(),
    "sigmoid": lambda channels: nn.Sigmoid(),
    "hardswish": lambda channels: nn.Hardswish(),
    "pad": lambda channels: nn.ZeroPad2d((0, 1, 1, 0)),
    "max pool": lambda channels: nn.MaxPool2d(3, 1, 1),
    "average pool": lambda channels: nn.AvgPool2d(3, 1, 1),
}
STEPS = st.builds(
    Step,
    layer=st.sampled_from(["conv", "depthwise", "grouped", "transposed"]),
    follow=st.sampled_from(sorted(FOLLOWS)),
    branch=st.sampled_from(["", "", "", "residual", "concat", "twice"]),
    dead=st.sampled_from(["", "", "outputs", "inputs"]),
    bias=st.booleans(),
    spread=st.sampled_from([0.0, 4.0, 10.0]),
)


class RandomNet(nn.Module):
    """Layers of 4 channels (8 behind a concatenation, brought back by the next), then a classifier of the flattened."""

    def __init__(self, steps: list[Step], head: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.steps, self.head = steps, head
        self.layers, self.follows = nn.ModuleList(), nn.ModuleList()
        channels = 4
        for step in steps:
            layer = _layer(step, channels)
            with torch.no_grad():
                _spread(layer, step)
            self.layers.append(layer)
            self.follows.append(FOLLOWS[step.follow](4))
            channels = 8 if step.branch == "concat" else 4
        self.last = nn.Conv2d(channels, 4, 1)
        self.fc = nn.Linear(4 * 4 if head == "flatten" else 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step, layer, follow in zip(self.steps, self.layers, self.follows, strict=True):
            y = follow(layer(x))
            if step.branch == "residual":
                y = y + F.adaptive_avg_pool2d(x, 1).mean(1, keepdim=True)
            elif step.branch == "concat":
                y = torch.cat([y, y.abs()], 1)
            elif step.branch == "twice":
                y = y + follow(layer(x) * 0.5)
            x = y
        x = F.adaptive_avg_pool2d(torch.relu(self.last(x)), 2 if self.head == "flatten" else 1).flatten(1)
        found: torch.Tensor = self.fc(x)
        return found


def _layer(step: Step, channels: int) -> nn.Conv2d | nn.ConvTranspose2d:
    if step.layer == "transposed":
        return nn.ConvTranspose2d(channels, 4, 2, groups=2, bias=step.bias)
    groups = {"depthwise": 4, "grouped": 2}.get(step.layer, 1)
    return nn.Conv2d(channels, 4, 3, padding=1, groups=groups, bias=step.bias)


def _spread(layer: nn.Conv2d | nn.ConvTranspose2d, step: Step) -> None:
    """Move the channels apart, and kill one of them."""
    factors = torch.exp2(torch.rand(layer.weight.shape[0]) * step.spread - step.spread / 2)
    layer.weight.mul_(factors.view(-1, 1, 1, 1))
    if step.dead:
        layer.weight.select(0 if step.dead == "outputs" else 1, 0).zero_()


NETS = st.builds(
    RandomNet,
    steps=st.lists(STEPS, min_size=1, max_size=5),
    head=st.sampled_from(["flatten", "pool"]),
    seed=st.integers(0, 999),
)


def equalised_by_loops(weights: list[np.ndarray], biases: list[np.ndarray], sweeps: int) -> None:
    """DFQ's equation 11 on a chain of plain convolutions (out, in, k, k), channel by channel, in place, float64."""
    for _ in range(sweeps):
        for first, second, bias in zip(weights, weights[1:], biases, strict=False):
            for channel in range(first.shape[0]):
                r1 = max(abs(float(value)) for value in first[channel].flat)
                r2 = max(abs(float(value)) for value in second[:, channel].flat)
                if r1 > 0 and r2 > 0:
                    s = r1 / (r1 * r2) ** 0.5
                    first[channel] /= s
                    bias[channel] /= s
                    second[:, channel] *= s


def triple_by_loops(weights: list[np.ndarray], biases: list[np.ndarray]) -> None:
    """The same of a depthwise convolution between two plain ones, in one step: every range becomes (r1 r2 r3)^(1/3)."""
    one, depthwise, three = weights
    for channel in range(one.shape[0]):
        r1, r2 = abs(one[channel]).max(), abs(depthwise[channel]).max()
        r3 = abs(three[:, channel]).max()
        if min(r1, r2, r3) > 0:
            c = (r1 * r2 * r3) ** (1 / 3)
            s12, s23 = r1 / c, c / r3
            one[channel] /= s12
            biases[0][channel] /= s12
            depthwise[channel] *= s12 / s23
            biases[1][channel] /= s23
            three[:, channel] *= s23


def behind_folding(*items: Pass) -> Pipeline:
    """int8_per_tensor with these passes behind fold-batch-norm."""
    pipeline = fxquant.load_pipeline("int8_per_tensor")
    passes = list(pipeline.prepare_passes)
    place = next(index for index, item in enumerate(passes) if isinstance(item, FoldBatchNorm)) + 1
    passes[place:place] = items
    return pipeline.changed(prepare=passes)


def assert_no_code_differs(program: Program, path: Path, data: list[torch.Tensor]) -> None:
    """Export a finalized program; onnxruntime gives the codes that it gives."""
    fxquant.export_onnx(program, path)
    options = RuntimeOptions(threads=1)
    report = fxquant.check_parity(program, path, data, options=options, simulation="exact", progress=False)
    assert all(row.overall.compared > 0 and row.overall.differing == 0 for row in report.rows) and not report.fault


def measured(program: Program) -> list[str]:
    """What passes noted of what they measured."""
    return [note.text for note in program.notes if note.kind is NoteKind.OPTIMIZATION]


def conv(outputs: int = 6, inputs: int = 4, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **options)


class Net(nn.Module):
    """Modules under names of their own; subclasses say how they are connected."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def spread(model: nn.Module, log2: float = 8.0, seed: int = 0) -> nn.Module:
    """Move the output channels of every layer apart."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.ConvTranspose2d)):
            rows = torch.rand(module.weight.shape[0], generator=generator)
            with torch.no_grad():
                module.weight.mul_(torch.exp2((rows - 0.5) * log2).view(-1, *[1] * (module.weight.ndim - 1)))
    return model.eval()
