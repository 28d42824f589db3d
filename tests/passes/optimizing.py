"""What the tests of gptq and sequential-mse share: small nets calibrated for 4-bit weights, and their outputs' SQNR."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import fxquant
from fxquant.graph.pass_data import PassData
from fxquant.graph.passes import Pass
from fxquant.graph.program import NoteKind, Program
from fxquant.graph.trace import PassEntry
from fxquant.numerics.runtime import RuntimeOptions
from fxquant.spec import SpecOverride
from tests.helpers import run_pass


class Mixed(nn.Module):
    """Convolutions (plain, depthwise, in dilated groups, transposed), a linear on tokens, x @ a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.up = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1)
        self.tokens = nn.Linear(8, 8)
        self.last = nn.Parameter(torch.randn(8, 5) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.grouped(torch.relu(self.depthwise(x)) + x))
        x = torch.relu(self.tokens(self.up(x).flatten(2).transpose(1, 2)))
        found: torch.Tensor = x.mean(1) @ self.last
        return found


class Small(nn.Module):
    """Two convolutions and a classifier: what onnxruntime computes in integers throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(torch.relu(self.one(x)), 2)
        found: torch.Tensor = self.fc(torch.relu(self.two(x)).mean((2, 3)))
        return found


class Tokens(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.two(torch.relu(self.one(x)))
        return found


@cache
def images() -> tuple[torch.Tensor, ...]:
    """Two batches of images that are smooth, so that neighbours, hence inputs of a kernel, are correlated."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(8, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=(12, 12), mode="bilinear")
    return smooth[:4] + 0.1, smooth[4:] + 0.1


def calibrated(build: Callable[[], nn.Module] = Small, weight: SpecOverride | None = None) -> Program:
    """A net calibrated under w4a8; `weight` changes the weights' spec."""
    return _calibrated(build, weight).copy()


@cache
def _calibrated(build: Callable[[], nn.Module], weight: SpecOverride | None) -> Program:
    torch.manual_seed(0)
    pipeline = fxquant.load_pipeline("w4a8").override(weight=weight)
    program = fxquant.capture(build().eval(), images()[0])
    pipeline.prepare(program)
    fxquant.calibrate(program, images(), progress=False)
    return program


def run(item: Pass, program: Program, folder: Path | None = None) -> PassEntry:
    """Run an algorithm on the images."""
    return run_pass(item, program, data=PassData(images(), folder, progress=False))


def sqnr(program: Program, reference: Program) -> float:
    """Signal to quantization noise of the outputs, in dB."""
    noise = signal = 0.0
    with torch.no_grad():
        for batch in images():
            expected, found = reference.module(batch), program.module(batch)
            signal += float(expected.square().sum())
            noise += float((found - expected).square().sum())
    return float(10 * torch.log10(torch.tensor(signal / noise)))


def notes(program: Program) -> dict[str, str]:
    """What algorithms noted, by node."""
    return {note.place: note.text for note in program.notes if note.kind is NoteKind.OPTIMIZATION}


def codes_that_differ(program: Program, path: Path) -> tuple[int, int]:
    """Finalize, export, compare with onnxruntime: how many codes differ, of how many."""
    final = program.copy()
    fxquant.load_pipeline("w4a8").finalize(final)
    fxquant.export_onnx(final, path)
    final.simulate = "exact"
    report = fxquant.check_parity(final, path, images(), options=RuntimeOptions(threads=1), progress=False)
    assert not report.stored
    return report.codes_differing, report.codes_compared
