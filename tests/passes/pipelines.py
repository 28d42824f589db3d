"""What the tests of the quantizing passes share: small nets captured and brought to the stage that a pass runs at."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fxquant.graph.manager import PassManager
from fxquant.graph.passes import Pass
from fxquant.graph.program import Program
from fxquant.passes import (
    AbsorbActivation,
    AssignSpecs,
    FoldBatchNorm,
    InsertFakeQuant,
    SelectPerChannel,
    ShareEncodings,
)
from tests.passes.harness import captured

IMAGE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


class Residual(nn.Module):
    """relu(conv(x)), pooled, convolved again and added, then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.conv1(x)))
        x = torch.relu(self.conv2(x) + x)
        found: torch.Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return found


def residual(seed: int = 0) -> Residual:
    """A residual net with seeded weights."""
    torch.manual_seed(seed)
    return Residual().eval()


def before(kind: type[Pass], model: nn.Module, *inputs: torch.Tensor) -> Program:
    """The program of a model, run through the packaged order of quantizing passes up to, not including, `kind`."""
    order = (
        FoldBatchNorm(),
        AssignSpecs(),
        SelectPerChannel(),
        AbsorbActivation(),
        ShareEncodings(),
        InsertFakeQuant(),
    )
    names = [item.name for item in order]
    program = captured(model, *inputs)
    ahead = order[: names.index(kind.name)] if kind.name in names else order
    PassManager(list(ahead)).run(program)
    return program


def specs(program: Program) -> dict[str, str]:
    """What each value's own output is to be, as text, by value name."""
    return {node.name: str(node.meta["output_spec"]) for node in program.graph.nodes if "output_spec" in node.meta}
