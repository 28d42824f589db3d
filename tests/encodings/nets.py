"""Small nets and configurations whose encodings go round: each has one thing that files or names have to get right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

import fxquant
from fxquant.graph.manager import PassManager
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Program
from fxquant.passes import SelectPerBlock
from fxquant.spec import SpecOverride, Target
from tests.capture.nets import Attention, ConvNet, Shared, TiedLanguageModel

VERSIONS = ("0.6.1", "1.0.0", "2.0.0")
Inputs = tuple[torch.Tensor, ...]


class Depthwise(nn.Module):
    """Expansion, depthwise, relu6; two branches concatenated; the same value returned under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.act = nn.ReLU6()
        self.project = nn.Conv2d(11, 4, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.act(self.depthwise(self.act(self.norm(self.expand(x)))))
        y = self.project(torch.cat([y, x], 1))
        return {"features": y, "again": y, "input": x}


class Linears(nn.Module):
    """Linears on rank 3, with a bias and without: the latter's weight is stored transposed in the integer model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(torch.relu(self.first(x)))
        return found


class Upsampling(nn.Module):
    """A transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 6, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.up(torch.relu(self.conv(x)))
        return found


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def overridden(activation: SpecOverride | None = None, weight: SpecOverride | None = None) -> Callable[[], Pipeline]:
    return lambda: fxquant.load_pipeline("int8_per_channel").override(activation, weight)


def signed() -> Pipeline:
    """int8_per_channel with signed activations, which only other runtimes than onnxruntime take."""
    found = overridden(SpecOverride(signed=True))()
    return Pipeline(found.prepare_passes, found.finalize_passes, Target.QNN_HTP)


def in_blocks() -> Pipeline:
    """int8_per_channel, whose weights are then in blocks of four."""
    found = fxquant.load_pipeline("int8_per_channel")
    passes = list(found.prepare_passes)
    place = [item.name for item in passes].index("select-per-channel") + 1
    passes.insert(place, SelectPerBlock(block=4))
    return Pipeline(PassManager(passes), found.finalize_passes, found.target)


@dataclass(frozen=True)
class Case:
    """A net, its inputs and its pipeline."""

    make: Callable[[], nn.Module]
    inputs: Inputs
    pipeline: Callable[[], Pipeline] = overridden()


MASK = torch.tensor([[False, False, False, True], [False] * 4])
CASES: dict[str, Case] = {
    "residual": Case(ConvNet, (noise(2, 3, 8, 8),)),
    "depthwise": Case(Depthwise, (noise(2, 3, 8, 8),)),
    "transformer": Case(Attention, (noise(2, 4, 8), MASK)),
    "linears": Case(Linears, (noise(2, 4, 8),)),
    "transposed": Case(Upsampling, (noise(2, 3, 8, 8),)),
    "tied": Case(TiedLanguageModel, (torch.tensor([[1, 4, 10], [0, 7, 3]]),)),
    "shared": Case(Shared, (noise(2, 4),)),
    "per-tensor": Case(ConvNet, (noise(2, 3, 8, 8),), lambda: fxquant.load_pipeline("int8_per_tensor")),
    "blocks": Case(Linears, (noise(2, 4, 8),), in_blocks),
    "4 and 16 bits": Case(
        Linears, (noise(2, 4, 8),), overridden(SpecOverride(bits=16), SpecOverride(bits=4, strict=False))
    ),
    "symmetric": Case(ConvNet, (noise(2, 3, 8, 8),), overridden(SpecOverride(symmetric=True))),
    "signed": Case(Linears, (noise(2, 4, 8),), signed),
}


@cache
def net(name: str) -> nn.Module:
    """A case's net, its weights seeded; nobody changes it."""
    torch.manual_seed(7)
    return CASES[name].make().eval()


@cache
def _prepared(name: str) -> Program:
    case = CASES[name]
    program = fxquant.capture(net(name), case.inputs)
    case.pipeline().prepare(program)
    return program


def prepared(name: str) -> Program:
    """A case's program with FakeQuants, which observe."""
    return _prepared(name).copy()


@cache
def _calibrated(name: str) -> Program:
    program = prepared(name)
    fxquant.calibrate(program, [CASES[name].inputs], progress=False)
    return program


def calibrated(name: str) -> Program:
    """A case's calibrated program."""
    return _calibrated(name).copy()


def finalized(program: Program, name: str) -> Program:
    """A finalized copy."""
    twin = program.copy()
    CASES[name].pipeline().finalize(twin)
    return twin
