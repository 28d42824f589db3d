"""Collector: samples of unit after unit cost one run of both programs, and are those of whole runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxquant.graph.frontier import StagedWalk, Stages
from fxquant.graph.pass_data import PassData, float_twin
from fxquant.graph.program import Program
from fxquant.graph.segment import values_of
from fxquant.passes import AdaRound, ReconstructBlocks
from fxquant.passes.adaround import layer_unit
from fxquant.passes.quantized_layers import quantized_layers
from fxquant.passes.rounding_run import LearnsRounding, settle
from fxquant.reconstruction import Collector, Reconstruction, Samples, Unit, reconstruct
from fxquant.reconstruction.units import weight_of
from tests.helpers import run_pass
from tests.passes.pipelines import residual
from tests.passes.test_adaround import codes
from tests.reconstruction.layers import calibrated, correlated

BATCHES = [correlated(8, 4, 8, 8, seed=index) for index in range(3)]


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that run."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


class Crossed(nn.Module):
    """A block of two inputs whose first layer is called before the layer that computes its second input; a shortcut
    whose layer is called last; a value that is read far behind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.other, self.shortcut = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.first, self.second, self.head = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = torch.relu(self.stem(x))
        first = self.first(stem)
        other = torch.relu(self.other(stem))
        second = self.second(first * other)
        return torch.as_tensor(self.head(second + self.shortcut(x)) + stem)


class Deep(nn.Module):
    """Thirty convolutions in a row, each with a relu."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(30)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.layers(x))


def prepared(model: nn.Module) -> tuple[Program, Program, list[Unit]]:
    """A program, its float twin, and its layers as units."""
    program = calibrated(model, BATCHES)
    reference = float_twin(program)
    settle(program)
    return program, reference, [layer_unit(program, layer) for layer in quantized_layers(program)]


def test_thirty_layers_cost_one_run_of_both_programs() -> None:
    torch.manual_seed(0)
    program, reference, units = prepared(Deep())
    collector = Collector(program, reference, units, BATCHES, cache_mb=64)
    with Convolutions() as seen:
        assert all(isinstance(collector.samples(unit), Samples) for unit in units)
    assert len(units) == 30 and seen.count == len(BATCHES) * (29 + 30)  # the last layer's output is of no use


@pytest.mark.parametrize("limit_mb", [0.01, 0.1, 64])
@pytest.mark.parametrize("skipped", [(), (0, 2), (1, 3, 4)], ids=str)
def test_samples_are_those_of_whole_runs_whatever_fits_and_whichever_units_are_skipped(
    monkeypatch: pytest.MonkeyPatch, limit_mb: float, skipped: Sequence[int]
) -> None:
    torch.manual_seed(0)
    program, reference, units = prepared(Crossed())
    limits: list[float] = []

    class Limited(StagedWalk):
        def __init__(self, program: Program, stages: Any, batches: Any, limit_bytes: int) -> None:
            super().__init__(program, stages, batches, int(limit_mb * 2**20))

        def values(self, stage: int) -> Iterator[Any]:
            yield from super().values(stage)
            limits.append(self.kept_bytes)

    monkeypatch.setattr("fxquant.reconstruction.samples.StagedWalk", Limited)
    collector = Collector(program, reference, units, BATCHES, cache_mb=64)
    for index, unit in enumerate(units):
        if index not in skipped:
            found = collector.samples(unit)
            assert isinstance(found, Samples)
            for node, value in found.inputs.items():
                assert torch.equal(value, whole(program, node.name)), (unit.name, node.name)
            assert torch.equal(found.targets, whole(reference, unit.output.name)), unit.name
        weight_of(program, unit.weights[0]).mul_(0.9)  # as learning changes it
    assert max(limits) <= limit_mb * 2**20


def whole(program: Program, name: str) -> torch.Tensor:
    """A value on all batches, by runs from the inputs."""
    return torch.cat([row[name] for row in values_of(program, BATCHES, [name])])


def test_batches_beyond_the_samples_are_run_only_if_what_they_give_can_be_kept() -> None:
    wide = [correlated(8, 4, 64, 64, seed=index) for index in range(6)]  # 0.5 MiB each: 0.5 MiB to keep is too little
    program = calibrated(Deep(), wide[:1])
    reference = float_twin(program)
    settle(program)
    units = [layer_unit(program, layer) for layer in quantized_layers(program)][:2]
    with Convolutions() as seen:
        assert isinstance(Collector(program, reference, units, wide, cache_mb=1).samples(units[0]), Samples)
    assert seen.count <= 2


def test_reason_of_one_unit_leaves_those_behind_as_they_are() -> None:
    torch.manual_seed(0)
    program, reference, units = prepared(Crossed())
    bad = Unit("bad", units[1].weights, (program.node("first_weight"),), units[1].output, 1)
    collector = Collector(program, reference, [units[0], bad, *units[2:]], BATCHES, cache_mb=64)
    assert isinstance(collector.samples(units[0]), Samples)
    assert collector.samples(bad) == "first_weight has not as many samples along axis 0 as its output"
    for unit in units[2:]:
        found = collector.samples(unit)
        assert isinstance(found, Samples) and torch.equal(found.targets, whole(reference, unit.output.name))


def from_the_inputs(self: LearnsRounding) -> type[Collector]:
    """A collector that runs both programs from their inputs for every unit."""

    class Anew(Collector):
        def __init__(self, *given: Any) -> None:
            self.given = given

        def samples(self, unit: Unit) -> Samples | str:
            program, reference, _, *rest = self.given
            return Collector(program, reference, [unit], *rest).samples(unit)

    return Anew


MODELS = {"residual": residual, "crossed": Crossed}
PASSES = {
    "layers": AdaRound(iterations=30),
    "blocks": ReconstructBlocks(iterations=30),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("item", PASSES.values(), ids=PASSES)
def test_codes_are_those_that_runs_from_the_inputs_give(
    item: LearnsRounding, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for anew in (False, True):
        torch.manual_seed(0)
        program = calibrated(model(), BATCHES)
        if anew:
            monkeypatch.setattr("fxquant.passes.rounding_run.Collector", from_the_inputs(item))
        run_pass(item, program, data=PassData(BATCHES, progress=False))
        found.append(codes(program))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_stages_hold_what_later_ones_need_and_nothing_else() -> None:
    program = calibrated(Crossed(), BATCHES)
    node = program.node
    stages = Stages(program, [[node("x_fq")], [node("relu")], [node("relu_1"), node("first")], [node("add_1")]])
    live = [[value.name for value in stages.live_behind(index)] for index in range(4)]
    assert live == [["x_fq"], ["x_fq", "relu"], ["x_fq", "relu_fq", "first", "relu_1"], []]


def test_learned_units_are_those_of_a_multi_input_block() -> None:
    torch.manual_seed(0)
    program, reference, _ = prepared(Crossed())
    layers = {layer.node.name: layer for layer in quantized_layers(program)}
    item = ReconstructBlocks(iterations=20)
    block = Unit(
        "block",
        (layers["first"].quantizer, layers["second"].quantizer),
        (program.node("relu"), program.node("relu_1")),
        program.node("second"),
        1,
    )
    order = [layer_unit(program, layers["stem"]), layer_unit(program, layers["other"]), block]
    order += [layer_unit(program, layers["shortcut"]), layer_unit(program, layers["head"])]
    collector = Collector(program, reference, order, BATCHES, cache_mb=64)
    for unit in order:
        samples = collector.samples(unit)
        assert isinstance(samples, Samples)
        for node, value in samples.inputs.items():
            assert torch.equal(value, whole(program, node.name)), (unit.name, node.name)
        learned = reconstruct(program, unit, samples, item.settings(), progress=False)
        assert isinstance(learned, Reconstruction)
        for quantizer in unit.weights:
            module = program.fake_quant(quantizer)
            assert module is not None
            weight_of(program, quantizer).copy_(module.real(learned.codes[quantizer.name]))
