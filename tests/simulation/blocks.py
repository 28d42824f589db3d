"""A net whose layers' weights are quantized in blocks, but for its depthwise convolution's, through the real passes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import fxquant
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Program
from tests.simulation.programs import CONFIG, noise

BLOCK = 8
BLOCKED = ("c1", "c2", "q", "fc")  # its layers with blocks; "depthwise" has none


class Blocks(nn.Module):
    """Convolutions with and without bias, a depthwise one, a linear at rank 3 without bias, and one at rank 2."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.q, self.fc = nn.Linear(16, 16, bias=False), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.c2(torch.relu(self.c1(x))))
        tokens = self.q(x.flatten(2).transpose(1, 2))
        found: torch.Tensor = self.fc(tokens[:, 0])
        return found


def images(batch: int = 4, seed: int = 0) -> torch.Tensor:
    """Normal noise of shape [batch, 16, 6, 6]."""
    return noise(batch, 16, 6, 6, seed=seed)


def pipeline_in_blocks(folder: Path, *, bits: int = 8) -> Pipeline:
    """int8_per_channel with weights in blocks where they fill."""
    step = '[[prepare]]\npass = "select-per-channel"\n'
    text = CONFIG.read_text(encoding="utf-8")
    assert text.count(step) == 1 and text.count("weight = { bits = 8,") == 1
    text = text.replace(step, f'{step}\n[[prepare]]\npass = "select-per-block"\nblock = {BLOCK}\n')
    (folder / "blocks.toml").write_text(text.replace("weight = { bits = 8,", f"weight = {{ bits = {bits},"), "utf-8")
    return fxquant.load_pipeline(folder / "blocks.toml")


def blocks_program(folder: Path, *, bits: int = 8) -> Program:
    """A calibrated and finalized Blocks."""
    torch.manual_seed(0)
    program = fxquant.capture(Blocks().eval(), (images(),))
    pipeline = pipeline_in_blocks(folder, bits=bits)
    pipeline.prepare(program)
    fxquant.calibrate(program, [images(8)], progress=False)
    pipeline.finalize(program)
    return program
