"""Contender: fxquant's adaround pass on a block under w4a8, batch norm folded, no early stop."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.rounding import Rounded, Task, serve
from fxquant.calibration import calibrate
from fxquant.capture import capture
from fxquant.graph.manager import PassManager
from fxquant.graph.pass_data import PassData
from fxquant.graph.pipeline import load_pipeline
from fxquant.graph.program import Program
from fxquant.passes.adaround import AdaRound
from fxquant.reconstruction import Reconstruction

NOTE = "fxquant: layers with the relu behind them, on quantized inputs; activations quantized in the end"


@dataclass(frozen=True)
class TellingAdaRound(AdaRound):
    """adaround, with the first and the last loss of each layer."""

    losses: list[tuple[float, float]] = field(default_factory=list)

    def learned(self, found: Reconstruction) -> None:
        """Keep the ends of its curve."""
        self.losses.append((found.curve[0][1], found.curve[-1][1]))


def learn(task: Task) -> Rounded:
    """Capture, prepare, calibrate and round."""
    program = capture(task.block, (task.batches[0],))
    load_pipeline("w4a8").prepare(program)
    calibrate(program, task.batches, progress=False)
    options: dict[str, Any] = {"learning_rate": 1e-3, "early_stop": False, "positions": task.positions}
    item = TellingAdaRound(iterations=task.iterations, **options)
    PassManager([item]).run(program, data=PassData(task.batches, progress=False))
    return Rounded(program.module.eval(), item.losses, off_grid(program))


def off_grid(program: Program) -> int:
    """How many numbers of quantized weights are not the real value of their code."""
    count = 0
    for node, module in program.fake_quant_nodes():
        source = node.args[0]
        if isinstance(source, torch.fx.Node) and source.op == "get_attr":
            weight = program.tensor(source).detach()
            count += int((module.real(module.codes(weight)) != weight).sum())
    return count


if __name__ == "__main__":
    sys.exit(serve(learn, NOTE))
