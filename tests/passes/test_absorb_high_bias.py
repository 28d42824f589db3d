"""absorb-high-bias: fires, declines with the reason, changes outputs where it says so alone, twice is once, golden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxquant
from fxquant.errors import PassError
from fxquant.graph.program import Program
from fxquant.graph.statistics import ChannelStatistics, statistics_of
from fxquant.graph.trace import PassEntry
from fxquant.passes import AbsorbHighBias, CrossLayerEqualization, FoldBatchNorm
from tests.helpers import Builder, assert_golden, run_pass
from tests.passes.harness import ROUNDING, Chain, captured, difference, output, reasons
from tests.passes.rescaling_nets import assert_no_code_differs, behind_folding, measured

IMAGE = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
ROWS = torch.rand(5, 4, generator=torch.Generator().manual_seed(2))


def high(features: int, kind: type[nn.BatchNorm1d] | type[nn.BatchNorm2d] = nn.BatchNorm2d) -> Any:
    """A batch norm whose even channels are high (mean 9 or more, deviation 1), the others around 0."""
    norm = kind(features)
    with torch.no_grad():
        norm.bias.copy_(torch.arange(features) % 2 * -9.0 + 9.0 + 0.1 * torch.arange(features))
    return norm


def prepared(model: nn.Module, *inputs: torch.Tensor) -> Program:
    """Captured, its batch norms folded."""
    program = captured(model, *inputs)
    run_pass(FoldBatchNorm(), program)
    return program


EXACT: dict[str, tuple[list[nn.Module], torch.Tensor]] = {
    "convolutions": ([nn.Conv2d(4, 6, 3), high(6), nn.ReLU(), nn.Conv2d(6, 5, 3)], IMAGE),
    "the second without a bias": ([nn.Conv2d(4, 6, 3), high(6), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=False)], IMAGE),
    "grouped": ([nn.Conv2d(4, 6, 3), high(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2)], IMAGE),
    "depthwise": ([nn.Conv2d(4, 6, 3), high(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6)], IMAGE),
    "from a transposed one": ([nn.ConvTranspose2d(4, 6, 3), high(6), nn.ReLU(), nn.Conv2d(6, 5, 3)], IMAGE),
    "max pooling": ([nn.Conv2d(4, 6, 3), high(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 1)], IMAGE),
    "flattened": ([nn.Conv2d(4, 6, 3), high(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)], IMAGE),
    "linears": ([nn.Linear(4, 6), high(6, nn.BatchNorm1d), nn.ReLU(), nn.Linear(6, 5)], ROWS),
}


@pytest.mark.parametrize("case", EXACT)
def test_outputs_stay_where_no_value_is_below_what_is_absorbed(case: str) -> None:
    layers, x = EXACT[case]
    torch.manual_seed(0)
    for layer in layers:
        nn.init.uniform_(layer.weight, -0.1, 0.1) if isinstance(layer, (nn.Conv2d, nn.Linear)) else None
    model = nn.Sequential(*layers)
    expected, program = output(model, x), prepared(model, x)
    bias, known = program.module.get_parameter("0.bias").detach().clone(), statistics_of(program.node("_0"))
    assert known is not None
    entry = run_pass(AbsorbHighBias(), program)
    mean, std = known.tensors()
    shift = (mean - 3 * std).clamp(min=0)
    assert int((shift > 0).sum()) == 3 and entry.edits
    torch.testing.assert_close(bias - program.module.get_parameter("0.bias"), shift.float(), rtol=1e-6, atol=1e-6)
    assert statistics_of(program.node("_0")) == ChannelStatistics.of(mean - shift, std)
    assert difference(program, expected, x) < ROUNDING
    (text,) = measured(program)
    assert "3 of 6 channels, by up to 6." in text and "inexact" not in text
    assert not run_pass(AbsorbHighBias(), program).edits


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.floats(0.0, 4.0), st.integers(1, 4))
def test_shift_is_that_of_plain_loops(seed: int, sigmas: float, groups: int) -> None:
    build = Builder(seed)
    x = build.input("x", 3, 8, 8)
    relu = build.relu("relu", build.conv("first", x, 12))
    build.output(build.conv("second", relu, 12, padding=0, groups=(1, 2, 3, 12)[groups - 1]))
    program = build.program()
    mean, std = torch.randn(12).double() * 4, torch.rand(12).double()
    program.node("first").meta["statistics"] = ChannelStatistics.of(mean, std)
    tensors = {name: value.detach().double().clone() for name, value in program.module.state_dict().items()}
    run_pass(AbsorbHighBias(sigmas=sigmas), program)
    inside = tensors["second.weight"].shape[1]
    for channel in range(12):
        a = max(0.0, float(mean[channel] - sigmas * std[channel]))
        tensors["first.bias"][channel] -= a
        for row in range(12):
            if row // inside == channel // inside or inside == 12:
                tensors["second.bias"][row] += a * float(tensors["second.weight"][row, channel % inside].sum())
    for name, value in program.module.state_dict().items():
        torch.testing.assert_close(value.double(), tensors[name], rtol=1e-6, atol=1e-5)


class Reader(nn.Module):
    """relu(conv1(x)) read by two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(4, 6, 1), high(6), nn.Conv2d(6, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn(self.conv1(x)))
        found: torch.Tensor = self.conv2(y) + y
        return found


class Tied(nn.Module):
    """The second layer's weight is that of another module, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2, self.other = (
            nn.Conv2d(4, 6, 1),
            high(6),
            nn.Conv2d(6, 6, 1),
            nn.Conv2d(6, 6, 1),
        )
        self.other.weight = self.conv2.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.conv2(torch.relu(self.bn(self.conv1(x))))
        return found


def _chain(*behind: nn.Module) -> Chain:
    parts = {f"part{index}": part for index, part in enumerate(behind)}
    return Chain(conv1=nn.Conv2d(4, 6, 1), bn=high(6), **parts)


NOT = "bias of conv1 not absorbed: "
DECLINED: dict[str, tuple[nn.Module, str]] = {
    "no statistics": (
        Chain(conv1=nn.Conv2d(4, 6, 1), act=nn.ReLU(), conv2=nn.Conv2d(6, 5, 1)),
        f"{NOT}nothing is known of its outputs (fold-batch-norm leaves statistics)",
    ),
    "relu6": (_chain(nn.ReLU6(), nn.Conv2d(6, 5, 1)), f"{NOT}part0 behind it is no relu"),
    "leaky relu": (_chain(nn.LeakyReLU(), nn.Conv2d(6, 5, 1)), f"{NOT}part0 behind it is no relu"),
    "no activation": (_chain(nn.Conv2d(6, 5, 1)), f"{NOT}part0 behind it is no relu"),
    "padding": (
        _chain(nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1)),
        f"{NOT}part1 pads with zeros: a shift (here of up to 6.4) cannot pass",
    ),
    "transposed": (
        _chain(nn.ReLU(), nn.ConvTranspose2d(6, 5, 3)),
        f"{NOT}part1 is transposed, and its borders leave out taps: a shift (here of up to 6.4) cannot pass",
    ),
    "average with padding": (
        _chain(nn.ReLU(), nn.AvgPool2d(3, 1, 1), nn.Conv2d(6, 5, 1)),
        f"{NOT}part1 averages with padding, or with a divisor of its own",
    ),
    "two readers": (Reader(), f"{NOT}relu has 2 users (conv2, add)"),
    "tied": (Tied(), f"{NOT}conv2.weight and other.weight are one tensor"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_bias_is_left_alone_with_the_reason(case: str) -> None:
    model, reason = DECLINED[case]
    program = prepared(model, IMAGE)
    entry = run_pass(AbsorbHighBias(), program)
    assert not entry.edits and measured(program) == []
    assert reason in reasons(entry), reasons(entry)


def test_nothing_is_said_of_a_layer_without_a_high_channel() -> None:
    program = prepared(nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1)), IMAGE)
    entry = run_pass(AbsorbHighBias(), program)
    assert not entry.edits and all("_0 " not in reason for reason in reasons(entry))


def test_padding_is_inexact_at_the_borders_alone_where_asked_for() -> None:
    torch.manual_seed(0)
    model = _chain(nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1))
    nn.init.uniform_(model.get_submodule("conv1").weight, -0.1, 0.1)  # type: ignore[arg-type]  # a parameter
    expected, program = output(model, IMAGE), prepared(model, IMAGE)
    run_pass(AbsorbHighBias(through_padding=True), program)
    with torch.no_grad():
        found = program.module(IMAGE)
    torch.testing.assert_close(found[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], rtol=1e-4, atol=1e-5)
    assert float((found - expected)[:, :, 0].abs().max()) > 0.5
    assert measured(program)[0].endswith("by up to 6.4; inexact at its zero padding")
    transposed = prepared(_chain(nn.ReLU(), nn.ConvTranspose2d(6, 5, 3)), IMAGE)
    assert not run_pass(AbsorbHighBias(through_padding=True), transposed).edits


def test_values_below_three_deviations_are_what_changes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.ReLU(), nn.Linear(1, 1)).eval()
    with torch.no_grad():
        for index in (0, 3):
            model[index].weight.fill_(1.0)
            model[index].bias.zero_()
        model[1].bias.fill_(4.0)
    program = prepared(model, torch.zeros(2, 1))
    run_pass(AbsorbHighBias(), program)
    x = torch.tensor([[-5.0], [-3.5], [-2.9], [0.0], [3.0]])
    with torch.no_grad():
        found = program.module(x)
    expected = torch.tensor([[1.0], [1.0], [1.1], [4.0], [7.0]])  # relu(x + 3) + 1, where relu(x + 4) is meant
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_negative_sigmas_are_refused() -> None:
    with pytest.raises(PassError, match="absorb-high-bias: sigmas; expected 0 or more; got -1"):
        AbsorbHighBias(sigmas=-1.0)


def test_golden_diff() -> None:
    build = Builder()
    norm = build.batch_norm("bn", build.conv("conv", build.input("x", 3, 8, 8), 4))
    build.output(build.conv("last", build.relu("relu", norm), 2, padding=0, bias=False))
    program = build.program()
    program.module.get_submodule("bn").bias.data.fill_(6.0)  # type: ignore[union-attr,operator]  # a batch norm's
    run_pass(FoldBatchNorm(), program)
    before = program.copy()
    entry: PassEntry = run_pass(AbsorbHighBias(), program)
    assert len(entry.edits) == 6
    assert_golden(before.diff(program) + "\n" + "\n".join(map(str, program.notes)) + "\n", "absorb_high_bias.diff")


def test_no_code_differs_in_onnxruntime(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 6, 3, padding=1), high(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1)]
    pipeline = behind_folding(CrossLayerEqualization(), AbsorbHighBias())
    program = fxquant.capture(nn.Sequential(*layers).eval(), IMAGE)
    pipeline.prepare(program)
    assert any("absorbed into" in text for text in measured(program))
    fxquant.calibrate(program, [IMAGE], progress=False)
    pipeline.finalize(program)
    assert_no_code_differs(program, tmp_path / "net.onnx", [IMAGE])
