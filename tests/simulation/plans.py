"""Small networks for the plan, quantized, exported and compared; and whether the plan is what onnxruntime ran."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxquant
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.ops.kernels import KERNEL_BITS
from fxquant.ops.table import TABLE
from fxquant.parity import ParityReport, check_parity
from fxquant.parity.optimised import Fusion, KernelKind
from fxquant.simulation.facts import Facts
from fxquant.simulation.plan import IslandKind, Plan, read_plan

Forward = Callable[[Any, torch.Tensor], object]  # of a Net, whose layers torch leaves untyped
Edit = Callable[[Program], None]
SHAPE = (3, 6, 10)


class Net(nn.Module):
    """Layers that a network's function may use: c1 (3 to 8 channels), c2, c3 (8 to 8), features to 5 and 8 features."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c3, self.up = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 8, 2, 2)
        self.fc, self.q, self.norm = nn.Linear(8, 5), nn.Linear(8, 8), nn.LayerNorm(8)
        self.slope = nn.Parameter(torch.randn(8, 1, 1))
        self.function = function

    def forward(self, x: torch.Tensor) -> object:
        return self.function(self, x)


@dataclass(frozen=True)
class Run:
    """A calibrated program, its plan, and what parity found of it."""

    program: Program
    plan: Plan
    report: ParityReport


def run(function: Forward, edit: Edit | None = None, simulation: str = "integer") -> Run:
    """Quantize a network at 8 bits per channel, edit its FakeQuants, and compare the simulation with onnxruntime."""
    torch.manual_seed(0)
    program = fxquant.capture(Net(function).eval(), (torch.randn(2, *SHAPE),))
    pipeline = fxquant.load_pipeline("int8_per_channel")
    pipeline.prepare(program)
    batches = [1.5 * torch.randn(2, *SHAPE)]
    fxquant.calibrate(program, batches, progress=False)
    pipeline.finalize(program)
    if edit is not None:
        edit(program)
    with tempfile.TemporaryDirectory() as folder:
        path = fxquant.export_onnx(program, Path(folder) / "net.onnx")
        report = check_parity(program, path, batches, simulation=simulation, progress=False)
    return Run(program, read_plan(program), report)


def disagreements(program: Program, plan: Plan, fusion: Fusion) -> list[str]:
    """The nodes that onnxruntime ran otherwise than the plan says."""
    facts, found = Facts(program, TABLE), []
    for kernel in fusion.nodes:
        expected, ran = _expected(facts, plan, kernel.node), kernel.kind
        if ran is KernelKind.PARTLY and "Clip" in kernel.kernels:  # of a narrow grid's codes
            ran = KernelKind.FLOAT
        if ran not in expected:
            wanted = " or ".join(sorted(kind.name for kind in expected))
            found.append(f"{kernel.node}: {wanted} planned, {ran.name} ran")
    return found


def _expected(facts: Facts, plan: Plan, name: str) -> set[KernelKind]:
    site, node = plan.site_of(name), facts.program.node(name)
    if site is not None:
        return {KernelKind.INTEGER} if site.operation is node else {KernelKind.ABSORBED, KernelKind.INTEGER}
    readers = [plan.islands[user] for user in node.users if user in plan.islands]
    grid = facts.grid_of(node)
    if grid is not None:  # its codes are moved; in float, if they are wide or read as floats
        is_moved = readers and all(island.kind is IslandKind.MOVED for island in readers)
        may_be_float = grid.spec.bits > KERNEL_BITS or not is_moved
        return {KernelKind.ABSORBED, KernelKind.INTEGER} | ({KernelKind.FLOAT} if may_be_float else set())
    return {KernelKind.ABSORBED, KernelKind.FLOAT}


def quantizer(program: Program, name: str) -> FakeQuant:
    """The FakeQuant of the value called `name`."""
    module = program.fake_quant(program.node(f"{name}_fq"))
    assert module is not None
    return module
