"""expose-global-pool: fires, declines with the reason, keeps the outputs, twice is once, golden diff."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxquant.lowering.lower import lower
from fxquant.passes import ExposeGlobalPool
from tests.helpers import assert_rewrites, run_pass
from tests.ops.harness import compare
from tests.passes.harness import ROUNDING, captured, difference, output, reasons

aten = torch.ops.aten
SIGNAL, IMAGE, VOLUME = (
    torch.randn(2, 4, *[5] * axes, generator=torch.Generator().manual_seed(axes)) for axes in (1, 2, 3)
)
POOLS = (aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)


class Mean(nn.Module):
    """`function` behind a convolution, or alone."""

    def __init__(self, function: Callable[[torch.Tensor], Any], axes: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = None if axes is None else (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](4, 4, 3)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x if self.conv is None else self.conv(x).relu())


FIRES: dict[str, tuple[Mean, torch.Tensor]] = {
    "two axes": (Mean(lambda x: x.mean((2, 3))), IMAGE),
    "negative axes, kept": (Mean(lambda x: x.mean((-1, -2), keepdim=True)), IMAGE),
    "by keyword": (Mean(lambda x: torch.mean(x, dim=[3, 2], keepdim=True)), IMAGE),
    "three axes": (Mean(lambda x: x.mean((2, 3, 4))), VOLUME),
    "three axes, kept": (Mean(lambda x: x.mean((-3, -2, -1), True)), VOLUME),
    "one axis behind a convolution": (Mean(lambda x: x.mean(-1), 1), SIGNAL),
    "one axis behind a convolution, kept": (Mean(lambda x: x.mean(2, True), 1), SIGNAL),
    "behind a convolution": (Mean(lambda x: x.mean((2, 3)), 2), IMAGE),
}

DECLINES: dict[str, tuple[Mean, torch.Tensor, str]] = {
    "channels last": (Mean(lambda x: x.mean((1, 2))), IMAGE, "its axes [1, 2] of x are not all spatial ones, [2, 3]"),
    "one of two": (Mean(lambda x: x.mean(3)), IMAGE, "its axes [3] of x are not all spatial ones, [2, 3]"),
    "tokens": (Mean(lambda x: x.mean(1)), SIGNAL, "its axes [1] of x are not all spatial ones, [2]"),
    "part of a norm": (
        Mean(lambda x: x * x.pow(2).mean(-1, keepdim=True)),
        SIGNAL,
        "pow_1 is not known to be [N, C, L] (no convolution, pooling or batch norm made it)",
    ),
    "rank 2": (Mean(lambda x: x.flatten(1).mean(1)), IMAGE, "flatten has 2 axes"),
    "another dtype": (
        Mean(lambda x: x.mean((2, 3), dtype=torch.float64)),
        IMAGE,
        "it computes in torch.float64, x is torch.float32",
    ),
}


@pytest.mark.parametrize("case", FIRES)
def test_mean_over_space_becomes_a_pool(case: str) -> None:
    model, x = FIRES[case]
    expected, program = output(model, x), captured(model, x)
    entry = run_pass(ExposeGlobalPool(), program)
    targets = [node.target for node in program.graph.nodes]
    assert reasons(entry) == [] and aten.mean.dim not in targets and POOLS[x.ndim - 3] in targets
    assert "mean" in [node.name for node in program.graph.nodes]
    assert difference(program, expected, x) < ROUNDING
    assert difference(program, output(model, x[:1]), x[:1]) < ROUNDING
    found = lower(program)
    assert "GlobalAveragePool" in [node.op_type for node in found.graph]
    compare(model, found, [x], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", DECLINES)
def test_mean_is_left_alone_with_the_reason(case: str) -> None:
    model, x, reason = DECLINES[case]
    program = captured(model, x)
    before = str(program)
    entry = run_pass(ExposeGlobalPool(), program)
    assert reasons(entry) == [f"mean is not global pooling: {reason}"]
    assert not entry.edits and str(program) == before


def test_adaptive_pool_stays() -> None:
    program = captured(nn.AdaptiveAvgPool2d(1), IMAGE)
    entry = run_pass(ExposeGlobalPool(), program)
    assert not entry.edits and not entry.misses


def test_twice_is_once() -> None:
    program = captured(*FIRES["two axes"])
    assert run_pass(ExposeGlobalPool(), program).edits
    before = str(program)
    again = run_pass(ExposeGlobalPool(), program)
    assert not again.edits and not again.misses and str(program) == before


def test_golden_diff() -> None:
    expected = """
        - mean = aten.mean.dim(x, dim=[2, 3]) : float32[s0, 4]
        + mean_pool = aten.adaptive_avg_pool2d(x, output_size=[1, 1]) : float32[s0, 4, 1, 1]
        + mean = aten.flatten.using_ints(mean_pool, start_dim=1) : float32[s0, 4]
    """
    assert_rewrites(run_pass(ExposeGlobalPool(), captured(*FIRES["two axes"])), expected, edits=3)


def test_golden_diff_when_the_axes_are_kept() -> None:
    expected = """
        - mean = aten.mean.dim(x, dim=[3, 2], keepdim=True) : float32[s0, 4, 1, 1]
        + mean = aten.adaptive_avg_pool2d(x, output_size=[1, 1]) : float32[s0, 4, 1, 1]
    """
    assert_rewrites(run_pass(ExposeGlobalPool(), captured(*FIRES["by keyword"])), expected, edits=1)
