"""Channels' axis of a value, and the loss that is summed along it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fxquant.analysis.value_meter import channel_axis
from fxquant.capture import capture
from fxquant.graph.channels import channel_axis_of
from fxquant.graph.pass_data import float_twin
from fxquant.graph.program import Program
from fxquant.passes.adaround import layer_unit
from fxquant.passes.blocks import block_of_path
from fxquant.passes.quantized_layers import quantized_layers
from fxquant.passes.rounding_run import settle
from fxquant.reconstruction import Samples, Settings, Unit, collect, reconstruct
from fxquant.reconstruction.samples import segment_of
from fxquant.reconstruction.units import weight_of
from tests.reconstruction.layers import calibrated, correlated


class Residual(nn.Module):
    """Two layers with an activation between them, and the input added."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(x + self.second(torch.relu(self.first(x))))


class ChannelsLast(nn.Module):
    """ConvNeXt's block: linear layers between two permutations, the input added in front of what they give."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(channels), nn.Linear(channels, 2 * channels)
        self.second = nn.Linear(2 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.nn.functional.gelu(self.first(self.norm(x.permute(0, 2, 3, 1)))))
        return torch.as_tensor(x + y.permute(0, 3, 1, 2))


class InBlock(nn.Module):
    """A block in a module of its own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.block(x))


@dataclass(frozen=True)
class Case:
    """A model, the shape of a sample of its inputs, and the axis of the channels of its output."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    axis: int


LAYERS = {
    "Conv1d": Case(lambda: nn.Sequential(nn.Conv1d(3, 4, 5, padding=2)), (3, 60), 1),
    "Conv2d": Case(lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), (3, 12, 9), 1),
    "Linear on two axes": Case(lambda: nn.Sequential(nn.Linear(6, 4)), (6,), 1),
    "Linear on three axes": Case(lambda: nn.Sequential(nn.Linear(6, 4)), (30, 6), 2),
    "Linear on four axes": Case(lambda: nn.Sequential(nn.Linear(6, 4)), (5, 7, 6), 3),
}
BLOCKS = {
    "Conv1d": Case(lambda: Residual(nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(6, 4, 1)), (4, 50), 1),
    "Conv2d": Case(lambda: Residual(nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)), (4, 9, 7), 1),
    "Linear on three axes": Case(lambda: Residual(nn.Linear(4, 6), nn.Linear(6, 4)), (30, 4), 2),
    "Linear on four axes": Case(lambda: Residual(nn.Linear(4, 6), nn.Linear(6, 4)), (5, 7, 4), 3),
    "Linear between permutations": Case(lambda: ChannelsLast(4), (4, 9, 7), 1),
}


def first_loss(program: Program, unit: Unit, samples: Samples) -> float:
    """The loss of the first step, without the regulariser, on all samples."""
    settings = Settings(iterations=1, batch_size=samples.count, regularization=0.0)
    return reconstruct(program, unit, samples, settings, progress=False).curve[0][1]


def plain_loss(program: Program, unit: Unit, samples: Samples, axis: int) -> float:
    """Sum over channels, mean over samples and positions; at the first step weights are as in float."""
    weights = {node: weight_of(program, node) for node in unit.weights}
    (output,) = segment_of(program, unit, samples).run({**samples.inputs, **weights}).values()
    return float((output - samples.targets).double().square().sum(axis).mean())


@pytest.mark.parametrize("positions", [None, 20], ids=["all positions", "20 positions"])
@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_loss_of_a_layer_is_summed_over_channels_and_averaged_over_all_else(case: Case, positions: int | None) -> None:
    torch.manual_seed(0)
    batches = [correlated(12, *case.shape, seed=seed) for seed in range(2)]
    program = calibrated(case.model(), batches)
    reference = float_twin(program)
    unit = layer_unit(program, next(quantized_layers(program)), positions)
    settle(program)
    samples = collect(program, reference, unit, batches, 64)
    assert isinstance(samples, Samples) and (samples.each == 20) == (
        positions is not None and case.axis == 1 < len(case.shape)
    )
    expected = plain_loss(program, unit, samples, case.axis)
    assert expected > 0 and first_loss(program, unit, samples) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("case", BLOCKS.values(), ids=BLOCKS)
def test_loss_of_a_block_is_summed_over_channels_and_averaged_over_all_else(case: Case) -> None:
    torch.manual_seed(0)
    batches = [correlated(12, *case.shape, seed=seed) for seed in range(2)]
    program = calibrated(InBlock(case.model()), batches)
    reference = float_twin(program)
    unit = block_of_path(program, "block", list(quantized_layers(program)))
    assert isinstance(unit, Unit) and unit.channel_axis == case.axis
    settle(program)
    samples = collect(program, reference, unit, batches, 64)
    assert isinstance(samples, Samples)
    expected = plain_loss(program, unit, samples, case.axis)
    assert expected > 0 and first_loss(program, unit, samples) == pytest.approx(expected, rel=1e-3)


def axis_behind(function: Callable[[torch.Tensor], torch.Tensor], layer: nn.Module, shape: tuple[int, ...]) -> int:
    """The axis that is found for what a function makes of a layer's output."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(self.layer(x))

    program = capture(Net().eval(), (torch.randn(2, *shape),))
    (output,) = [node for node in program.graph.nodes if node.op == "output"]
    return channel_axis_of(program, output.all_input_nodes[0])


def test_axes_are_followed_through_what_keeps_and_what_permutes_them() -> None:
    conv, wide = nn.Conv1d(3, 4, 3), (3, 40)
    assert axis_behind(lambda y: y * 2 + y.sigmoid(), conv, wide) == 1
    assert axis_behind(lambda y: y.transpose(1, 2), conv, wide) == 2
    assert axis_behind(lambda y: y.transpose(-1, -2).relu().transpose(1, 2), conv, wide) == 1
    assert axis_behind(lambda y: torch.max_pool1d(y, 2), conv, wide) == 1
    image = nn.Conv2d(3, 4, 3), (3, 9, 8)
    assert axis_behind(lambda y: y.permute(2, 3, 0, 1), *image) == 3
    assert axis_behind(lambda y: y.permute(1, 2, 3, 0).permute(3, 1, 2, 0), *image) == 3
    assert axis_behind(lambda y: torch.nn.functional.gelu(y), nn.Linear(5, 4), (6, 7, 5)) == 3


def test_values_behind_no_layer_are_told_by_their_rank() -> None:
    assert axis_behind(lambda y: y, nn.ReLU(), (3, 9, 8)) == 1
    assert axis_behind(lambda y: y, nn.ReLU(), (9, 8)) == 2
    assert axis_behind(lambda y: y.reshape(2, -1, 6, 3), nn.Linear(4, 6), (3, 4)) == 1
    assert axis_behind(lambda y: y.reshape(2, -1, 6), nn.Conv2d(3, 4, 1), (3, 6, 6)) == 2


def test_reports_take_an_activations_channels_from_the_same_place() -> None:
    program = calibrated(InBlock(Residual(nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(6, 4, 1))), [correlated(8, 4, 50)])
    found = {}
    for node, module in program.fake_quant_nodes():
        value = node.args[0]
        if isinstance(value, torch.fx.Node) and not module.follows:
            found[value.name] = channel_axis(program, value, module)
    assert found["block_relu"] == 1
