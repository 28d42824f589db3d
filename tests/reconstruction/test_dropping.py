"""Dropping of activations' quantizers while rounding is learned: where it applies, how often, what passes instead."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fxquant.graph.pass_data import float_twin
from fxquant.graph.pipeline import load_pipeline
from fxquant.graph.program import Program
from fxquant.graph.segment import Segment, in_eval_mode
from fxquant.passes.blocks import find_blocks
from fxquant.passes.quantized_layers import quantized_layers
from fxquant.passes.rounding_run import settle
from fxquant.reconstruction import Samples, Settings, Unit, collect, reconstruct
from fxquant.reconstruction.learn import _Dropping
from fxquant.spec import SpecOverride
from tests.reconstruction.layers import bench, calibrated, correlated


def test_layer_alone_is_learned_from_patches_whatever_the_drop() -> None:
    torch.manual_seed(0)
    batches = [correlated(12, 4, 9, 9)]
    case = bench(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)), batches)
    unit = replace(case.unit, positions=16)
    samples = collect(case.program, case.reference, unit, batches, cache_mb=64)
    assert isinstance(samples, Samples) and samples.each == 16
    settings = Settings(iterations=150)
    plain, dropped = (reconstruct(case.program, unit, samples, replace(settings, drop=drop)) for drop in (0.0, 0.5))
    assert dropped.is_better and dropped.curve == plain.curve
    assert all(torch.equal(dropped.codes[name], plain.codes[name]) for name in plain.codes)


def block() -> tuple[Program, Unit, Samples]:
    """Two linear layers with a relu between, on coarse activations and with float biases, and their samples."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), nn.ReLU(), nn.Linear(8, 4))
    batches = [correlated(64, 8)]
    float_biases = load_pipeline("tensorrt").override(activation=SpecOverride(bits=4), weight=SpecOverride(bits=4))
    program = calibrated(net, batches, float_biases)
    (unit,) = find_blocks(program, list(quantized_layers(program)), 8)
    settle(program)
    samples = collect(program, float_twin(program), unit, batches, cache_mb=64)
    assert isinstance(samples, Samples)
    return program, unit, samples


@pytest.mark.parametrize("drop", [0.1, 0.75])
def test_share_of_elements_that_pass_in_float_is_the_probability(drop: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    program = calibrated(net, [correlated(64, 16)])
    (middle,) = [
        node
        for node, module in program.fake_quant_nodes()
        if not module.follows and getattr(node.args[0], "op", "") == "call_function" and node.users
        if any(user.op == "call_function" for user in node.users)
    ]
    source = middle.args[0]
    assert isinstance(source, torch.fx.Node)
    unit = Unit("all", (), (source,), middle, 1)
    dropping = _Dropping(program, unit, drop, torch.Generator().manual_seed(0))
    value = torch.rand(64, 32) * 3.0
    with torch.no_grad():
        found = dropping.run({source: value})[middle]
        module = program.fake_quant(middle)
        assert module is not None
        quantized = module(value)
    differ = quantized != value
    passed = (found == value) & differ
    assert torch.equal(torch.where(passed, value, quantized), found)
    assert abs(float(passed.sum() / differ.sum()) - drop) < 0.04
    both = differ[0::2] & differ[1::2]  # each element is drawn for itself: not once for all samples
    assert 0 < int((passed[0::2] != passed[1::2])[both].sum()) < int(both.sum())


def test_whole_drop_learns_on_float_activations_and_none_on_quantized_ones() -> None:
    program, unit, samples = block()
    settings = Settings(iterations=1, warm_start=0.0, regularization=0.0, batch_size=64)
    first = {drop: reconstruct(program, unit, samples, replace(settings, drop=drop)).curve[0][1] for drop in (0.0, 1.0)}
    quantized = program.copy()
    with quantized.quantizers(weights=False):
        error = (_output(quantized, unit, samples) - samples.targets).square()
    expected = float(error.sum(unit.channel_axis).mean())
    assert first[0.0] == pytest.approx(expected, rel=1e-3)
    with quantized.quantizers(weights=False, activations=False):
        error = (_output(quantized, unit, samples) - samples.targets).square()
    expected = float(error.sum(unit.channel_axis).mean())
    assert first[1.0] == pytest.approx(expected, rel=1e-3)
    assert first[1.0] < 0.9 * first[0.0]


def _output(program: Program, unit: Unit, samples: Samples) -> torch.Tensor:
    """The unit's output with the quantizers that are on."""
    inputs = [program.node(node.name) for node in unit.inputs]
    output = program.node(unit.output.name)
    with torch.no_grad(), in_eval_mode(program.module):
        values = dict(zip(inputs, samples.inputs.values(), strict=True))
        found: torch.Tensor = Segment(program, [output], inputs).run(values)[output]
    return found
