"""convolve-batch-norm: fires, declines with the reason, keeps the outputs, twice is once, golden diff."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxquant.errors import PassError
from fxquant.graph.program import Program
from fxquant.passes import ConvolveBatchNorm, FoldBatchNorm, FreezeBatchNorm
from tests.helpers import assert_rewrites, run_pass
from tests.passes.harness import ROUNDING, batch_norm_nodes, captured, difference, output, randomize, reasons

GENERATOR = torch.Generator().manual_seed(3)
SIGNAL, IMAGE, VOLUME = (torch.randn(2, 4, *[5] * axes, generator=GENERATOR) for axes in (1, 2, 3))


class Dense(nn.Module):
    """DenseNet's layer: concatenation, batch norm, relu, convolution; the batch norm twice if asked."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.bn, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 3, padding=1)
        self.calls = calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([x, self.first(x)], 1)
        for _ in range(self.calls):
            y = torch.relu(self.bn(y))
        found: torch.Tensor = self.last(y)
        return found


def _behind_relu(layer: nn.Module, norm: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.ReLU(), norm, nn.Sigmoid())


FIRES = {
    "concatenation": (Dense(), IMAGE),
    "rank 3": (_behind_relu(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)), SIGNAL),
    "rank 5, affine=False": (_behind_relu(nn.Conv3d(4, 4, 1), nn.BatchNorm3d(4, affine=False)), VOLUME),
}


@pytest.mark.parametrize("case", FIRES)
def test_batch_norm_becomes_a_depthwise_convolution(case: str) -> None:
    model, x = FIRES[case]
    expected, program = output(randomize(model), x), captured(model, x)
    assert reasons(run_pass(ConvolveBatchNorm(), program)) == [] and batch_norm_nodes(program) == []
    assert difference(program, expected, x) < ROUNDING
    assert not [key for key in program.module.state_dict() if "running" in key]


def _frozen() -> Program:
    program = captured(Dense(), IMAGE)
    run_pass(FreezeBatchNorm(), program)
    return program


DECLINES = {
    "called twice": (
        lambda: captured(Dense(2), IMAGE),
        "its module is called twice, or has two names; relu before it has no integer kernel",
    ),
    "function": (_frozen, "it is a function"),
    "input": (lambda: captured(nn.Sequential(nn.BatchNorm2d(4)), IMAGE), "input_1 before it has no integer kernel"),
    "rank 2": (lambda: captured(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), SIGNAL[:, 0]), "_0 has 2 axes"),
    "no statistics": (
        lambda: captured(_behind_relu(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), IMAGE),
        "it keeps no running statistics",
    ),
}


@pytest.mark.parametrize("case", DECLINES)
def test_batch_norm_stays_with_the_reason(case: str) -> None:
    make, reason = DECLINES[case]
    program = make()
    before, entry = str(program), run_pass(ConvolveBatchNorm(), program)
    assert "; ".join(found.partition(" stays a batch norm: ")[2] for found in reasons(entry)) == reason
    assert not entry.edits and str(program) == before


def test_batch_norm_in_training_mode_stays() -> None:
    program = captured(Dense(), IMAGE)
    program.module.train()
    assert reasons(run_pass(ConvolveBatchNorm(), program)) == ["bn stays a batch norm: it is in training mode"]
    with pytest.raises(PassError, match="training mode"):
        run_pass(FoldBatchNorm(), program)


def test_twice_is_once() -> None:
    program = captured(Dense(), IMAGE)
    assert run_pass(ConvolveBatchNorm(), program).edits
    again = run_pass(ConvolveBatchNorm(), program)
    assert not again.edits and not again.misses


def test_golden_diff() -> None:
    expected = """
        - bn = BatchNorm2d[bn](cat, eps=1e-05, momentum=0.1) : float32[s0, 8, 5, 5]  @bn
        + bn_weight = get bn.weight : float32[8, 1, 1, 1]
        + bn_bias = get bn.bias : float32[8]
        + bn = aten.convolution(cat, bn_weight, bias=bn_bias, groups=8) : float32[s0, 8, 5, 5]  @bn
    """
    assert_rewrites(run_pass(ConvolveBatchNorm(), captured(Dense(), IMAGE)), expected, edits=9)
