"""A residual net with two batch norms on one convolution, ready to be trained in the ways that tests ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fxquant
from fxquant.graph.program import Program
from fxquant.sim import QuantSim, write_pair
from fxquant.spec import SpecOverride

LIVE, FOLDED = "int8_per_channel_qat", "int8_per_channel"
WAYS = [(LIVE, None), (LIVE, "lsq+"), (FOLDED, None), (FOLDED, "min-max")]


class Block(nn.Module):
    """A convolution used twice, each time with a batch norm of its own, around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels, eps=1e-3), nn.BatchNorm2d(channels)
        self.last = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv(x)))
        return torch.relu(self.last(self.bn2(self.conv(y))) + x)


class Net(nn.Module):
    """Stem, block, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.block, self.fc = Block(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.fc(self.block(torch.relu(self.bn(self.stem(x)))).mean((2, 3)))
        return found


def batches(count: int = 3) -> list[torch.Tensor]:
    """Normal noise."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(count)]


def float_net(seed: int = 0) -> Net:
    """In eval mode, with batch norms that have seen data."""
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for batch in batches():
            model(batch)
    return model.eval()


def simulated(preset: str = LIVE, training: str | None = None) -> QuantSim:
    """The net, calibrated; all ranges that can be learned as `training` says."""
    change = None if training is None else SpecOverride(training=training)
    weight = None if training == "moving-average(0.01)" else change
    sim = QuantSim(float_net(), batches()[0], preset, activation=change, weight=weight)
    sim.compute_encodings(batches(), progress=False)
    return sim


def loss_of(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Cross entropy against made-up labels."""
    return nn.functional.cross_entropy(call(x).float(), torch.arange(len(x)) % 5)


def gradients(
    module: nn.Module, x: torch.Tensor, call: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Of the loss, by the name of the parameter; `call` computes what `module` does."""
    module.zero_grad()
    loss_of(module if call is None else call, x).backward()  # type: ignore[no-untyped-call]
    return {name: one.grad.clone() for name, one in module.named_parameters() if one.grad is not None}


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """Plain steps, a batch each."""
    for batch in batches(steps):
        optimizer.zero_grad()
        loss_of(module, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def assert_ends_where_it_trained(sim: QuantSim, program: Program, folder: Path) -> None:
    """eval() in `exact` computes what the finalized program does, and that onnxruntime's codes."""
    program.simulate = "exact"
    found = program.module.eval()(batches()[0])
    final = program.copy()
    sim.pipeline.finalize(final)
    assert torch.equal(found, final.module(batches()[0]))
    report = fxquant.check_parity(final, write_pair(final, folder), batches())
    assert str(report).startswith("exact: 0 of "), str(report)
