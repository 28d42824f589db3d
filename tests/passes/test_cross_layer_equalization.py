"""cross-layer-equalization: fires, keeps the outputs, equalises, twice is once, golden diff;
random nets with branches and dead channels; plain loops as the reference; no code differs in onnxruntime.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import fxquant
from fxquant.errors import PassError
from fxquant.graph.program import Program
from fxquant.graph.statistics import statistics_of
from fxquant.passes import AssignSpecs, CrossLayerEqualization, FoldBatchNorm
from fxquant.passes.equalization import range_ratio, range_ratios
from tests.helpers import Builder, assert_golden, run_pass
from tests.passes.harness import captured, difference, output, randomize, reasons
from tests.passes.rescaling_nets import (
    IMAGE,
    NETS,
    SIZE,
    Net,
    RandomNet,
    assert_no_code_differs,
    behind_folding,
    conv,
    equalised_by_loops,
    measured,
    spread,
    triple_by_loops,
)

SIGNAL = torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(2))
VOLUME = torch.randn(2, 4, 5, 6, 5, generator=torch.Generator().manual_seed(3))
ROWS = torch.randn(3, 4, generator=torch.Generator().manual_seed(4))
TOKENS = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(5))
EQUAL = 1.001  # of a ratio that sweeps brought to 1
CONTRACT = 1e-4  # of the largest output


class ChannelsLast(nn.Module):
    """Moves the channels of an image to the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)


class Mean(nn.Module):
    """Averages over an image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


RELU = nn.ReLU()
PAIRS: dict[str, tuple[list[nn.Module], torch.Tensor]] = {
    "convolutions": ([conv(), RELU, conv(5, 6)], IMAGE),
    "without biases": ([conv(bias=False), RELU, conv(5, 6, bias=False)], IMAGE),
    "nothing between": ([conv(), conv(5, 6)], IMAGE),
    "convolutions of 1d": ([nn.Conv1d(4, 6, 3), RELU, nn.Conv1d(6, 5, 3)], SIGNAL),
    "convolutions of 3d": ([nn.Conv3d(4, 6, 2), RELU, nn.Conv3d(6, 5, 2)], VOLUME),
    "grouped, then plain": ([conv(6, 4, groups=2), RELU, conv(5, 6)], IMAGE),
    "plain, then grouped": ([conv(), RELU, conv(4, 6, groups=2)], IMAGE),
    "depthwise with a multiplier": ([conv(8, 4, groups=4), RELU, conv(16, 8, groups=8), RELU, conv(3, 16)], IMAGE),
    "transposed": ([nn.ConvTranspose2d(4, 6, 3), RELU, nn.ConvTranspose2d(6, 5, 2)], IMAGE),
    "transposed and grouped": (
        [nn.ConvTranspose2d(4, 6, 3, groups=2), RELU, nn.ConvTranspose2d(6, 8, 2, groups=2), RELU, conv(3, 8)],
        IMAGE,
    ),
    "strided, padded, dilated": ([conv(padding=2, dilation=2), RELU, conv(5, 6, stride=2, padding=1)], IMAGE),
    "leaky relu": ([conv(), nn.LeakyReLU(0.3), conv(5, 6)], IMAGE),
    "prelu": ([conv(), nn.PReLU(), conv(5, 6)], IMAGE),
    "prelu with a slope a channel": ([conv(), nn.PReLU(6), conv(5, 6)], IMAGE),
    "dropout": ([conv(), RELU, nn.Dropout(0.5), conv(5, 6)], IMAGE),
    "clip at 0": ([conv(), nn.Hardtanh(0.0, float("inf")), conv(5, 6)], IMAGE),
    "max pooling": ([conv(), RELU, nn.MaxPool2d(3, 2, 1, ceil_mode=True), conv(5, 6)], IMAGE),
    "average pooling that counts padding": ([conv(), RELU, nn.AvgPool2d(3, 2, 1), conv(5, 6, 1)], IMAGE),
    "zero padding": ([conv(), RELU, nn.ZeroPad2d((0, 1, 2, 0)), conv(5, 6)], IMAGE),
    "reflection": ([conv(), RELU, nn.ReflectionPad2d(1), conv(5, 6)], IMAGE),
    "upsampling": ([conv(), RELU, nn.Upsample(scale_factor=2), conv(5, 6)], IMAGE),
    "flattening": ([conv(), RELU, nn.Flatten(), nn.Linear(252, 5)], IMAGE),
    "pooling and flattening": ([conv(), RELU, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)], IMAGE),
    "mean": ([conv(), RELU, Mean(), nn.Linear(6, 5)], IMAGE),
    "channels last": ([conv(), RELU, ChannelsLast(), nn.Linear(6, 5)], IMAGE),
    "channels last and flattened": ([conv(), RELU, ChannelsLast(), nn.Flatten(), nn.Linear(252, 5)], IMAGE),
    "linears": ([nn.Linear(4, 6), RELU, nn.Linear(6, 5)], ROWS),
    "linears of tokens": ([nn.Linear(4, 6), RELU, nn.Linear(6, 5)], TOKENS),
    "three in a row": ([nn.Linear(4, 6), RELU, nn.Linear(6, 5), RELU, nn.Linear(5, 4)], ROWS),
    "depthwise between": ([conv(), RELU, conv(6, 6, groups=6, padding=1), RELU, conv(5, 6, 1)], IMAGE),
    "two depthwise between": (
        [conv(), RELU, conv(6, 6, groups=6, padding=1), RELU, conv(6, 6, groups=6, padding=1), RELU, conv(5, 6, 1)],
        IMAGE,
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_ranges_are_equalised_and_outputs_stay(case: str) -> None:
    layers, x = PAIRS[case]
    model = spread(nn.Sequential(*layers))
    expected, program = output(model, x), captured(model, x)
    pairs = len(range_ratios(program))
    assert range_ratio(program) > 2
    entry = run_pass(CrossLayerEqualization(), program, check_inputs=x)
    assert entry.edits and range_ratio(program) < EQUAL
    assert pairs == sum(hasattr(layer, "weight") for layer in layers if not isinstance(layer, nn.PReLU)) - 1
    assert len(reasons(entry)) == 1 and reasons(entry)[0].endswith("is an output of the program")
    assert difference(program, expected, x) < 1e-5


def assert_equalised(model: RandomNet) -> None:
    x = torch.randn(2, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    expected, program = output(model, x), captured(model, x)
    run_pass(CrossLayerEqualization(), program, check_inputs=x)
    assert difference(program, expected, x) < CONTRACT
    assert range_ratio(program) < 1.01
    assert not run_pass(CrossLayerEqualization(), program).edits


def test_channel_that_is_dead_behind_a_depthwise_layer_is_equalised_in_front_of_it() -> None:
    model = spread(nn.Sequential(conv(), RELU, conv(6, 6, groups=6), RELU, conv(4, 6)))
    with torch.no_grad():
        model[4].weight[:, 2] = 0.0  # type: ignore[index,union-attr,operator]
    expected, program = output(model, IMAGE), captured(model, IMAGE)
    assert range_ratio(program) > 2
    run_pass(CrossLayerEqualization(), program, check_inputs=IMAGE)
    assert range_ratio(program) < EQUAL and difference(program, expected, IMAGE) < 1e-5
    found = range_ratios(program)
    assert [ratio.dead for ratio in found.values()] == [0, 1]


@settings(deadline=None, max_examples=8)
@given(NETS)
def test_random_nets_keep_their_outputs_and_end_up_equal(model: RandomNet) -> None:
    assert_equalised(model)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(NETS)
def test_many_random_nets_keep_their_outputs_and_end_up_equal(model: RandomNet) -> None:
    assert_equalised(model)


def parameters(program: Program, *paths: str) -> list[np.ndarray[Any, Any]]:
    return [program.module.get_parameter(path).detach().double().numpy().copy() for path in paths]


@pytest.mark.parametrize("sweeps", [1, 3, 40])
def test_pairs_agree_with_plain_loops(sweeps: int) -> None:
    model = spread(nn.Sequential(conv(), RELU, conv(5, 6), RELU, conv(4, 5, 2)))
    program = captured(model, IMAGE)
    names = ("0.weight", "2.weight", "4.weight"), ("0.bias", "2.bias")
    weights, biases = (parameters(program, *paths) for paths in names)
    equalised_by_loops(weights, biases, sweeps)
    run_pass(CrossLayerEqualization(iterations=sweeps, tolerance=1e-12), program)
    for expected, found in zip(weights + biases, parameters(program, *names[0], *names[1]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=3e-7)


def test_depthwise_triple_agrees_with_plain_loops_after_one_sweep() -> None:
    model = spread(nn.Sequential(conv(), RELU, conv(6, 6, groups=6), RELU, conv(4, 6, 2)))
    program = captured(model, IMAGE)
    names = ("0.weight", "2.weight", "4.weight"), ("0.bias", "2.bias")
    weights, biases = (parameters(program, *paths) for paths in names)
    triple_by_loops(weights, biases)
    run_pass(CrossLayerEqualization(iterations=1), program)
    for expected, found in zip(weights + biases, parameters(program, *names[0], *names[1]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=3e-7)


class Block(Net):
    """A residual block: its inside may be equalised, its ends may not."""

    def forward(self, x: torch.Tensor) -> Any:
        part: Any = self
        x = torch.relu(part.stem(x))
        return torch.relu(part.conv2(torch.relu(part.conv1(x))) + x)


def test_residual_block_is_equalised_inside_only() -> None:
    parts = {name: conv(6, inputs, padding=1) for name, inputs in (("stem", 4), ("conv1", 6), ("conv2", 6))}
    program = captured(spread(Block(**parts)), IMAGE)
    entry = run_pass(CrossLayerEqualization(), program, check_inputs=IMAGE)
    assert list(range_ratios(program)) == ["conv1 -> conv2"]
    assert sorted(edit.subject for edit in entry.edits) == ["conv1.bias", "conv1.weight", "conv2.weight"]
    assert reasons(entry) == [
        "stem ends its chain: relu has 2 users (conv1, add)",
        "conv2 ends its chain: add (aten.add.Tensor) is not positive-homogeneous in each channel",
    ]


@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("path", ["0.weight", "2.weight"])
def test_dead_and_infinite_channels_are_left_alone(path: str, fill: float) -> None:
    program = captured(spread(nn.Sequential(conv(), RELU, conv(5, 6))), IMAGE)
    weight = program.module.get_parameter(path)
    weight.data.select(0 if path == "0.weight" else 1, 2).fill_(fill)
    before = dict(program.module.state_dict())
    before = {name: value.clone() for name, value in before.items()}
    run_pass(CrossLayerEqualization(), program)
    after = program.module.state_dict()
    assert torch.equal(after["0.bias"][2], before["0.bias"][2])
    torch.testing.assert_close(after["0.weight"][2], before["0.weight"][2], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(after["2.weight"][:, 2], before["2.weight"][:, 2], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(after["0.bias"][3], before["0.bias"][3])
    assert range_ratio(program) < EQUAL
    assert measured(program)[0].endswith("; 1 dead")


def test_statistics_go_with_the_channels() -> None:
    model = randomize(nn.Sequential(conv(), nn.BatchNorm2d(6), RELU, conv(5, 6)))
    program = captured(model, IMAGE)
    run_pass(FoldBatchNorm(), program)
    known, bias = statistics_of(program.node("_0")), program.module.get_parameter("0.bias").detach().double()
    run_pass(CrossLayerEqualization(), program)
    found = statistics_of(program.node("_0"))
    assert known is not None and found is not None
    factors = program.module.get_parameter("0.bias").detach().double() / bias
    for old, new in zip(known.tensors(), found.tensors(), strict=True):
        torch.testing.assert_close(new, old * factors, rtol=1e-5, atol=0)


def test_flattened_channel_has_the_range_of_all_its_features() -> None:
    model = nn.Sequential(conv(2, 1, 1, bias=False), RELU, nn.Flatten(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([2.0, 3.0]).view(2, 1, 1, 1))
        model[3].weight.copy_(torch.tensor([[1.0, -8.0, 0.5, 3.0], [0.1, 4.0, -12.0, 2.0]]))
    program = captured(model, torch.ones(2, 1, 1, 2))
    assert range_ratio(program) == pytest.approx(4.0)  # 8 / 2; 12 / 3
    run_pass(CrossLayerEqualization(), program)
    found = program.module.get_parameter("0.weight").detach().flatten()
    torch.testing.assert_close(found, torch.tensor([4.0, 6.0]))
    columns = program.module.get_parameter("3.weight").detach().abs().amax(0)
    torch.testing.assert_close(columns, torch.tensor([0.5, 4.0, 6.0, 1.5]))


def test_asymmetric_ranges_are_those_of_widest_minus_narrowest() -> None:
    model = nn.Sequential(nn.Linear(2, 1), RELU, nn.Linear(1, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[6.0, -2.0]]))
        model[2].weight.copy_(torch.tensor([[1.0], [1.0]]))
    program = captured(model, torch.ones(1, 2))
    assert range_ratio(program) == 6.0 and range_ratio(program, symmetric=False) == 8.0
    run_pass(CrossLayerEqualization(symmetric=False), program)
    assert range_ratio(program, symmetric=False) < EQUAL
    torch.testing.assert_close(program.module.get_parameter("2.weight").detach(), torch.full((2, 1), 8.0**0.5))


def test_no_factor_is_beyond_the_limit() -> None:
    model = nn.Sequential(conv(), RELU, conv(5, 6)).eval()
    with torch.no_grad():
        model[0].weight[0].mul_(1e-12)
    program = captured(model, IMAGE)
    old = program.module.get_parameter("0.weight").detach().clone()
    run_pass(CrossLayerEqualization(limit=3.0), program, check_inputs=IMAGE)
    factors = program.module.get_parameter("0.weight").detach() / old
    assert float(factors.max()) == pytest.approx(8.0) and float(factors.min()) >= 1 / 8
    assert bool((factors[0] == 8.0).all())


def test_what_would_overflow_is_declined() -> None:
    model = nn.Sequential(nn.Linear(1, 1), RELU, nn.Linear(1, 1)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1e-9)
        model[0].bias.fill_(3e37)
    program = captured(model, torch.ones(1, 1))
    (reason, last) = reasons(run_pass(CrossLayerEqualization(), program))[::-1]
    assert reason == "_0_bias would overflow torch.float32" and "output" in last
    assert measured(program) == []


@pytest.mark.parametrize("options", [{"iterations": 0}, {"tolerance": 0.0}, {"limit": 99.0}, {"limit": 0.0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PassError, match="cross-layer-equalization; expected iterations >= 1, tolerance > 0"):
        CrossLayerEqualization(**options)


def test_pass_runs_behind_assign_specs_too() -> None:
    program = captured(spread(nn.Sequential(conv(), RELU, conv(5, 6))), IMAGE)
    run_pass(AssignSpecs(), program)
    assert run_pass(CrossLayerEqualization(), program, check_inputs=IMAGE).edits


def test_notes_tell_ratios_before_and_after() -> None:
    build = Builder()
    x = build.input("x", 3, 8, 8)
    stem = build.relu("relu", build.conv("conv", x, 4))
    depthwise = build.relu("relu_1", build.conv("depthwise", stem, 4, groups=4))
    build.output(build.conv("project", depthwise, 2, 1, padding=0))
    program = build.program()
    before = program.copy()
    entry = run_pass(CrossLayerEqualization(), program)
    assert before.diff(program) == "" and len(entry.edits) == 5
    text = "\n".join([*map(str, entry.edits), *map(str, program.notes), ""])
    assert_golden(text, "cross_layer_equalization.txt")
    assert not run_pass(CrossLayerEqualization(), program).edits


def channels_apart(model: nn.Module, seed: int = 0) -> None:
    """Multiply channels by 2^U(-5, 5) and divide them out again behind the relu."""
    layers: Any = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    generator = torch.Generator().manual_seed(seed)
    for first, second in zip(layers, layers[1:], strict=False):
        factors = torch.exp2(torch.rand(first.out_channels, generator=generator) * 10 - 5)
        first.weight.data.mul_(factors.view(-1, 1, 1, 1))
        first.bias.data.mul_(factors)
        second.weight.data.div_(factors.view(1, -1, 1, 1) if second.groups == 1 else factors.view(-1, 1, 1, 1))


def quantized(model: nn.Module, data: list[torch.Tensor], *, equalises: bool) -> Program:
    """The model under int8_per_tensor, with the pass behind fold-batch-norm or without it, finalized."""
    pipeline = behind_folding(*[CrossLayerEqualization()] if equalises else [])
    program = fxquant.capture(model, data[0])
    pipeline.prepare(program, check_inputs=data[0])
    fxquant.calibrate(program, data, progress=False)
    pipeline.finalize(program)
    return program


def test_rescaled_net_is_saved_and_no_code_differs_in_onnxruntime(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [conv(8, 3, padding=1), RELU, conv(8, 8, padding=1, groups=8), RELU, conv(8, 8, padding=1), RELU]
    model = nn.Sequential(*layers, conv(4, 8, 1)).eval()
    channels_apart(model)
    data = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    expected = output(model, data[0])
    sqnr = {}
    for equalises in (False, True):
        program = quantized(model, data, equalises=equalises)
        noise = expected - program.module(data[0]).detach()
        sqnr[equalises] = float(10 * torch.log10(expected.square().sum() / noise.square().sum()))
    assert sqnr[True] > 40 and sqnr[True] > sqnr[False] + 20, sqnr
    assert_no_code_differs(program, tmp_path / "net.onnx", data)
