"""decompose-silu: fires, declines with the reason, keeps the outputs, twice is once, golden diff."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxquant.passes import DecomposeSilu
from tests.helpers import assert_rewrites, run_pass
from tests.passes.harness import ROUNDING, captured, difference, output, reasons

aten = torch.ops.aten
IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(3))


def _model(*behind: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 1), *behind)


FIRES = {
    "behind a convolution": _model(nn.SiLU(inplace=True)),
    "behind a pooling": _model(nn.MaxPool2d(2), nn.SiLU()),
    "behind another": _model(nn.SiLU(), nn.SiLU()),
}


@pytest.mark.parametrize("case", FIRES)
def test_silu_becomes_a_product_with_its_sigmoid(case: str) -> None:
    expected, program = output(FIRES[case], IMAGE), captured(FIRES[case], IMAGE)
    assert reasons(run_pass(DecomposeSilu(), program)) == []
    targets = [node.target for node in program.graph.nodes]
    assert aten.silu.default not in targets and aten.mul.Tensor in targets
    assert difference(program, expected, IMAGE) < ROUNDING


@pytest.mark.parametrize(
    ("model", "source"), [(nn.SiLU(), "input_1"), (_model(nn.GroupNorm(2, 4), nn.SiLU()), "_1")], ids=["input", "norm"]
)
def test_silu_in_a_float_island_stays(model: nn.Module, source: str) -> None:
    program = captured(model, IMAGE)
    before, entry = str(program), run_pass(DecomposeSilu(), program)
    (reason,) = reasons(entry)
    assert reason.endswith(f" not decomposed: {source} before it has no integer kernel")
    assert not entry.edits and str(program) == before


def test_twice_is_once() -> None:
    program = captured(FIRES["behind another"], IMAGE)
    assert run_pass(DecomposeSilu(), program).edits
    again = run_pass(DecomposeSilu(), program)
    assert not again.edits and not again.misses


def test_golden_diff() -> None:
    expected = """
        - _1 = aten.silu(_0) : float32[s0, 4, 6, 6]  @1
        + _1_sigmoid = aten.sigmoid(_0) : float32[s0, 4, 6, 6]  @1
        + _1 = aten.mul(_0, _1_sigmoid) : float32[s0, 4, 6, 6]  @1
    """
    program = captured(FIRES["behind a convolution"], IMAGE)
    assert_rewrites(run_pass(DecomposeSilu(), program), expected, edits=2)
