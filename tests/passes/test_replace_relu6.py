"""replace-relu6: fires where equalization needs it, declines with the reason, measures what it changes, golden diff."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxquant
from fxquant.errors import PassError
from fxquant.graph.manager import PassManager
from fxquant.graph.pass_data import PassData
from fxquant.graph.program import Program
from fxquant.graph.trace import PassEntry
from fxquant.passes import CrossLayerEqualization, ReplaceRelu6
from fxquant.passes.equalization import range_ratio
from fxquant.passes.output_change import Comparison, OutputChange
from tests.helpers import Builder, assert_golden, assert_rewrites, run_pass
from tests.passes.harness import Chain, captured, output, reasons
from tests.passes.rescaling_nets import assert_no_code_differs, behind_folding, measured

aten = torch.ops.aten
IMAGE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
UNMEASURED = ReplaceRelu6(measure=False)


def run(item: ReplaceRelu6, program: Program, batches: list[torch.Tensor]) -> PassEntry:
    (entry,) = PassManager([item]).run(program, data=PassData(batches)).entries
    return entry


def targets(program: Program) -> list[Any]:
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return [target for target in calls if target is not aten.convolution.default]


class Clamped(nn.Module):
    """A clip by function."""

    def __init__(self, low: float | None, high: float | None) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(x, self.low, self.high)


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.Hardtanh(0.0, 4.0), Clamped(0.0, 2.5)])
def test_clip_between_layers_is_replaced(act: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 1), act, nn.Conv2d(6, 5, 1)).eval()
    expected = output(nn.Sequential(model[0], nn.ReLU(), model[2]), IMAGE)
    program = captured(model, IMAGE)
    assert run_pass(UNMEASURED, program).edits
    assert targets(program) == [aten.relu.default]
    with torch.no_grad():
        torch.testing.assert_close(program.module(IMAGE), expected, rtol=0, atol=0)
    (text,) = measured(program)
    assert text.startswith("1 of 1 clips made relus (") and "change" not in text
    assert not run_pass(UNMEASURED, program).edits
    run_pass(CrossLayerEqualization(), program, check_inputs=IMAGE)
    assert range_ratio(program) < 1.001


class Beside(nn.Module):
    """A relu6 between layers, one behind an addition, one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.inner, self.outer, self.end = nn.ReLU6(), nn.ReLU6(), nn.ReLU6()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(self.inner(self.conv1(x)))
        found: torch.Tensor = self.end(self.conv3(self.outer(x + y)))
        return found


def test_only_what_equalization_needs_is_replaced_unless_everywhere() -> None:
    program = captured(Beside(), IMAGE)
    entry = run_pass(UNMEASURED, program)
    assert program.node("inner").target is aten.relu.default
    assert program.node("outer").target is program.node("end").target is aten.hardtanh.default
    kept = "kept: it stands between no two layers that could be equalized"
    assert reasons(entry) == [f"outer {kept}", f"end {kept}"]
    entry = run_pass(ReplaceRelu6(everywhere=True, measure=False), program)
    assert reasons(entry) == [] and aten.hardtanh.default not in targets(program)


@pytest.mark.parametrize("act", [nn.Hardtanh(), nn.Hardtanh(0.5, 6.0), Clamped(None, 6.0), nn.ReLU(), nn.Sigmoid()])
def test_other_functions_are_left_alone(act: nn.Module) -> None:
    program = captured(nn.Sequential(nn.Conv2d(4, 6, 1), act, nn.Conv2d(6, 5, 1)), IMAGE)
    entry = run_pass(ReplaceRelu6(everywhere=True, measure=False), program)
    assert not entry.edits and reasons(entry) == [] and measured(program) == []


def test_change_of_the_outputs_is_measured_and_noted() -> None:
    model = Chain(conv1=nn.Conv2d(1, 1, 1), act=nn.ReLU6(), conv2=nn.Conv2d(1, 1, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.ndim == 4 else 0.0)
    batches = [torch.full((1, 1, 2, 2), value) for value in (6.0, 4.0, 6.5)]
    program = captured(model, torch.zeros(2, 1, 2, 2))
    run(ReplaceRelu6(), program, batches)
    expected = 10 * math.log10((36 + 16 + 36) / 0.25)
    change = f"outputs change by {100 * 0.5 / 6:.2g} % of the largest magnitude, {expected:.1f} dB"
    assert measured(program) == [f"1 of 1 clips made relus (act): {change}"]
    again = captured(model, torch.zeros(2, 1, 2, 2))
    run(ReplaceRelu6(), again, batches[:2])
    assert measured(again) == ["1 of 1 clips made relus (act): outputs do not change"]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.floats(0.5, 8.0))
def test_measure_is_that_of_the_two_programs(seed: int, high: float) -> None:
    build = Builder(seed)
    clipped = build.call("clip", aten.hardtanh.default, build.conv("conv", build.input("x", 3, 8, 8), 4), 0.0, high)
    build.output(build.conv("last", clipped, 2, 1, padding=0), clipped)
    program = build.program()
    before, batches = program.copy(), [torch.randn(2, 3, 8, 8), torch.randn(3, 3, 8, 8)]
    comparison = Comparison(program, batches)
    run_pass(ReplaceRelu6(everywhere=True, measure=False), program)
    with torch.no_grad():
        pairs = [(before.module(batch), program.module(batch)) for batch in batches]
    noise = sum(float((a - b).double().square().sum()) for old, new in pairs for a, b in zip(old, new, strict=True))
    signal = sum(float(a.double().square().sum()) for old, _ in pairs for a in old)
    worst = max(
        max(float((old[i] - new[i]).abs().max()) for old, new in pairs)
        / max(float(old[i].abs().max()) for old, _ in pairs)
        for i in (0, 1)
    )
    found = comparison.without([program.node("clip")])
    assert comparison.without([]).sqnr_db == math.inf
    assert found.relative == pytest.approx(worst, rel=1e-4)
    assert found.sqnr_db == (pytest.approx(10 * math.log10(signal / noise), abs=1e-3) if noise else math.inf)


def test_batches_are_asked_for_unless_told_not_to_measure() -> None:
    assert ReplaceRelu6().needs_data and not UNMEASURED.needs_data
    program = captured(nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU6(), nn.Conv2d(6, 5, 1)), IMAGE)
    with pytest.raises(PassError, match="'replace-relu6' measures with batches"):
        run_pass(ReplaceRelu6(), program)
    with pytest.raises(PassError, match="expected batches to measure with; got none"):
        run(ReplaceRelu6(), program, [])
    assert aten.hardtanh.default in targets(program)


def two_clips() -> tuple[Program, list[torch.Tensor]]:
    """One value through two clips: the first, at 6, cuts nothing; the second, at 1, most."""
    model = Chain(conv1=nn.Conv2d(1, 1, 1), rare=nn.ReLU6(), conv2=nn.Conv2d(1, 1, 1), often=nn.Hardtanh(0.0, 1.0))
    model.add_module("conv3", nn.Conv2d(1, 1, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.ndim == 4 else 0.0)
    batches = [torch.full((2, 1, 2, 2), value) for value in (0.5, 2.0, 3.0)]
    return captured(model, batches[0]), batches


def test_clips_that_the_network_needs_are_kept() -> None:
    program, batches = two_clips()
    entry = run(ReplaceRelu6(least_db=20.0), program, batches)
    assert (program.node("rare").target, program.node("often").target) == (aten.relu.default, aten.hardtanh.default)
    assert reasons(entry) == ["often kept: 1 that matter less are gone, and outputs are to keep 20 dB"]
    assert measured(program) == ["1 of 2 clips made relus (rare): outputs do not change"]
    program, batches = two_clips()
    run(ReplaceRelu6(least_db=-20.0), program, batches)
    assert measured(program)[0].startswith("2 of 2 clips made relus (rare, often): outputs change by 2e+02 %")
    with pytest.raises(PassError, match="least_db=20; expected measure=True"):
        ReplaceRelu6(measure=False, least_db=20.0)


def test_change_is_worded() -> None:
    assert str(OutputChange(0.00312, 41.23)) == "outputs change by 0.31 % of the largest magnitude, 41.2 dB"
    assert str(OutputChange(0.0, math.inf)) == "outputs do not change"


def test_golden_diff() -> None:
    build = Builder()
    clip = build.call("clip", aten.hardtanh.default, build.conv("conv", build.input("x", 3, 8, 8), 4), 0.0, 6.0)
    build.output(build.conv("last", clip, 2))
    program = build.program()
    before = program.copy()
    entry = run_pass(UNMEASURED, program)
    assert_rewrites(
        entry,
        """
        - clip = aten.hardtanh(conv, min_val=0.0, max_val=6.0) : float32[s0, 4, 8, 8]  @clip
        + clip = aten.relu(conv) : float32[s0, 4, 8, 8]  @clip
        """,
        edits=2,
    )
    assert_golden(before.diff(program), "replace_relu6.diff")


def test_no_code_differs_in_onnxruntime(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 6, 3), nn.ReLU6(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU6(), nn.Conv2d(6, 5, 1)]
    pipeline = behind_folding(ReplaceRelu6(), CrossLayerEqualization())
    program = fxquant.capture(nn.Sequential(*layers).eval(), IMAGE)
    pipeline.prepare(program, batches=[IMAGE])
    fxquant.calibrate(program, [IMAGE], progress=False)
    pipeline.finalize(program)
    assert_no_code_differs(program, tmp_path / "net.onnx", [IMAGE])
