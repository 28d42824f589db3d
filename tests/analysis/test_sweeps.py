"""Both sweeps of the analysis against full forwards of the program, their order, and what is a layer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxquant.analysis import AnalysisReport, analyze
from fxquant.analysis import sweep as sweeping
from fxquant.analysis.analyze import TRIALS
from fxquant.analysis.units import Unit, units_of
from fxquant.capture import capture
from fxquant.errors import StorageError
from fxquant.evaluation import quantized
from fxquant.graph.pipeline import load_pipeline
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import Mode
from tests import preset_nets
from tests.analysis.cases import NETS, calibrated, db, outputs, report_of, with_rules


def energy(reference: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Of the error, number by number."""
    pairs = zip(torch.cat(reference).flatten().tolist(), torch.cat(found).flatten().tolist(), strict=True)
    return sum((x - y) ** 2 for x, y in pairs)


def agreement(reference: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """The fraction of samples whose largest output is the reference's, sample by sample."""
    pairs = list(zip(torch.cat(reference).tolist(), torch.cat(found).tolist(), strict=True))
    return sum(x.index(max(x)) == y.index(max(y)) for x, y in pairs) / len(pairs)


def paths(program: Program, unit: str, report: AnalysisReport) -> set[str]:
    """Targets of the quantizers of a unit, found by the values that its row names."""
    row = next(row for row in report.units if row.name == unit)
    values = {*row.weights, *row.activations}
    return {str(node.target) for node, _ in program.fake_quant_nodes() if str(node.args[0]) in values}


@pytest.mark.parametrize("name", NETS)
def test_both_sweeps_equal_full_forwards_with_the_same_quantizers(name: str) -> None:
    program = calibrated(name)
    report = report_of(name)
    reference = outputs(program, name, lambda module: False)
    everything = energy(reference, outputs(program, name, lambda module: True))
    seen: set[str] = set()
    twin = program.copy()
    twin.module.eval()
    modes = {module: module.mode for _, module in twin.fake_quant_nodes()}

    def keeping(targets: set[str], inside: bool) -> list[torch.Tensor]:
        kept = {module for node, module in twin.fake_quant_nodes() if (str(node.target) in targets) is inside}
        for module, mode in modes.items():
            module.mode = mode if module in kept else Mode.OFF
        with torch.no_grad():
            return [twin.module(batch) for batch in preset_nets.batches(name)]

    for row in report.units:
        targets = paths(program, row.name, report)
        assert targets and not targets & seen
        seen |= targets
        one, rest = keeping(targets, True), keeping(targets, False)
        assert row.alone.sqnr_db == pytest.approx(db(reference, one), abs=1e-3)
        assert row.without.sqnr_db == pytest.approx(db(reference, rest), abs=1e-3)
        assert row.damage_alone == pytest.approx(energy(reference, one) / everything, rel=1e-3)
        assert row.damage_without == pytest.approx(1 - energy(reference, rest) / everything, abs=1e-3)
        for score, found in ((row.alone, one), (row.without, rest)):
            assert score.agreement == (None if found[0].ndim != 2 else pytest.approx(agreement(reference, found)))
    assert seen == {str(node.target) for node, _ in program.fake_quant_nodes()}


@pytest.mark.parametrize("name", NETS)
def test_scores_of_the_whole_program_equal_program_quantizers(name: str) -> None:
    program = calibrated(name)
    report = report_of(name)
    reference = outputs(program, name, lambda module: False)
    assert report.float_score.sqnr_db == math.inf
    assert report.quantized.sqnr_db == pytest.approx(
        db(reference, outputs(program, name, lambda module: True)), abs=1e-3
    )
    for score, switched in (
        (report.weights_only, {"activations": False}),
        (report.activations_only, {"weights": False}),
    ):
        program.module.eval()
        with program.quantizers(**switched), torch.no_grad():
            found = [program.module(batch) for batch in preset_nets.batches(name)]
        assert score.sqnr_db == pytest.approx(db(reference, found), abs=1e-3)
    if report.quantized.agreement is not None:
        found = outputs(program, name, lambda module: True)
        assert report.quantized.agreement == pytest.approx(agreement(reference, found))


@pytest.mark.parametrize("layer", ["stem", "a2", "b1", "down", "fc"])
def test_a_layer_of_two_bits_comes_first_in_both_sweeps(layer: str) -> None:
    rule = f'{{ node = "{layer}", weight = {{ bits = 2 }} }}'
    report = analyze(calibrated("residual", rule), preset_nets.batches("residual"))
    assert report.by_damage[0].name == layer
    assert max(report.units, key=lambda unit: unit.damage_without).name == layer
    assert report.by_damage[0].bits == "w2 a8"
    worst = min((row for row in report.values if row.kind == "weight"), key=lambda row: row.local_sqnr_db)
    assert worst.unit == layer


class _Detector(nn.Module):
    """A trunk, and two heads; what the first gives is `factor` times as large."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.features, self.boxes = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            for parameter in self.features.parameters():
                parameter *= factor

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.trunk(x))
        return self.features(x), self.boxes(x)


def _ratios(program: Program, batches: list[torch.Tensor]) -> list[float]:
    """Noise over signal of each output."""
    program.module.eval()
    with torch.no_grad():
        quantized = [program.module(batch) for batch in batches]
        with program.quantizers(weights=False, activations=False):
            real = [program.module(batch) for batch in batches]
    found = []
    for place in range(len(real[0])):
        noise = sum(float(((y[place] - x[place]) ** 2).sum()) for x, y in zip(real, quantized, strict=True))
        found.append(noise / sum(float((x[place] ** 2).sum()) for x in real))
    return found


def test_each_output_counts_by_its_own_energy(tmp_path: Path) -> None:
    torch.manual_seed(1)
    batches = [torch.randn(4, 3, 8, 8), torch.randn(3, 3, 8, 8)]
    pipeline = with_rules('{ node = "boxes", weight = { bits = 2 } }')
    reports = []
    for factor in (1.0, 1024.0):
        program = quantized(capture(_Detector(factor).eval(), batches[0]), pipeline, batches)
        report = analyze(program, batches, folder=tmp_path / str(factor))
        assert report.by_damage[0].name == "boxes" and report.suggestions(1).count("boxes")
        assert report.quantized.noise == pytest.approx(sum(_ratios(program, batches)) / 2, rel=1e-3)
        assert report.quantized.agreement is None
        assert analyze(program, batches, folder=tmp_path / str(factor), resume=True) == report
        assert AnalysisReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
        reports.append(report)
    for small, large in zip(*(report.units for report in reports), strict=True):
        assert large.damage_alone == pytest.approx(small.damage_alone, rel=1e-3)
        assert large.damage_without == pytest.approx(small.damage_without, rel=1e-3, abs=1e-6)


def test_records_of_pooled_outputs_are_not_gone_on_with(tmp_path: Path) -> None:
    batches = preset_nets.batches("plain")
    analyze(calibrated("plain"), batches, folder=tmp_path)
    path = tmp_path / TRIALS
    content = json.loads(path.read_text())
    del content["recipe"]["records"]  # as it was before outputs were told apart
    path.write_text(json.dumps(content))
    with pytest.raises(StorageError, match="another run: records; expected each output by itself; got None"):
        analyze(calibrated("plain"), batches, folder=tmp_path, resume=True)


def test_evaluate_ranks_by_its_score_and_is_asked_once_for_each_choice() -> None:
    program = calibrated("residual", '{ node = "b1", weight = { bits = 2 } }')
    batches = preset_nets.batches("residual")
    with torch.no_grad(), program.quantizers(weights=False, activations=False):
        truth = [program.module.eval()(batch) for batch in batches]
    asked = []

    def evaluate(model: Any) -> float:
        asked.append(torch.rand(()).item())
        return -sum(float((model(x) - y).abs().sum()) for x, y in zip(batches, truth, strict=True))

    report = analyze(program, batches, evaluate, seed=7)
    assert len(asked) == 4 + 2 * len(report.units) and len(set(asked)) == 1  # the same seed before each
    assert report.score == "evaluate" and report.float_score.evaluated == 0.0
    assert report.by_damage[0].name == "b1"
    for row in report.units:
        assert row.alone.evaluated is not None and row.without.evaluated is not None
        assert report.quantized.evaluated is not None
        assert row.damage_alone == pytest.approx(-row.alone.evaluated)
        assert row.damage_without == pytest.approx(row.without.evaluated - report.quantized.evaluated)


def test_the_program_is_left_as_it_is() -> None:
    program = calibrated("residual")
    program.module.train()
    program.simulate = "exact"
    before = program.fingerprint(), [module.mode for _, module in program.fake_quant_nodes()]
    state = torch.get_rng_state()
    analyze(program, preset_nets.batches("residual"), lambda model: 0.0)
    assert (program.fingerprint(), [module.mode for _, module in program.fake_quant_nodes()]) == before
    assert program.module.training and program.simulate == "exact"
    assert torch.equal(torch.get_rng_state(), state)


def test_a_finalized_program_gives_the_same_figures() -> None:
    program, before = calibrated("residual"), report_of("residual")
    load_pipeline("int8_per_channel").finalize(program)
    after = analyze(program, preset_nets.batches("residual"))
    assert after.stage == "finalized" and after.units == before.units


def test_what_is_off_stays_off_and_is_no_layer() -> None:
    program = calibrated("residual")
    for node, module in program.fake_quant_nodes():
        if str(node.args[0]) in ("a1_weight", "relu_1"):
            module.mode = Mode.OFF
    report = analyze(program, preset_nets.batches("residual"))
    assert "a1" not in [row.name for row in report.units]
    reference = outputs(program, "residual", lambda module: False)
    assert report.quantized.sqnr_db == pytest.approx(
        db(reference, outputs(program, "residual", lambda module: module.mode is not Mode.OFF)), abs=1e-3
    )


def test_values_on_one_grid_are_one_unit_and_a_note_says_so() -> None:
    report = report_of("plain")
    row = next(row for row in report.units if row.name == "conv1")
    assert row.activations == ("relu", "max_pool2d") and row.weights == ("conv1_weight",)
    assert "one grid for relu, max_pool2d: switched together, as 'conv1'" in report.notes
    assert next(value for value in report.values if value.value == "max_pool2d").shares == "relu"


def test_no_more_batches_are_used_than_asked_for() -> None:
    taken = []

    def stream() -> Any:
        for batch in preset_nets.batches("plain", 4):
            taken.append(batch)
            yield batch

    report = analyze(calibrated("plain"), stream(), max_batches=2)
    assert report.batches == len(taken) == 2


def test_units_take_what_stands_behind_an_absorbed_relu() -> None:
    program = calibrated("residual")
    units: dict[str, Unit] = {unit.name: unit for unit in units_of(program)}
    assert [str(node.args[0]) for node in units["stem"].activations] == ["relu"]
    assert [str(node.args[0]) for node in units["add"].activations] == ["relu_2"]
    assert not units["add"].weights and sweeping.alone(units["add"]) == "alone add"
