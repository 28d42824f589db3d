"""The analysis against plain loops over the program, its order, its resumption and its errors."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.analysis import AnalysisReport, analyze
from fxquant.analysis import sweep as sweeping
from fxquant.analysis.route import Route
from fxquant.analysis.units import Unit, units_of
from fxquant.errors import CalibrationError, FxquantError, StorageError
from fxquant.graph.pass_data import float_twin
from fxquant.graph.pipeline import load_pipeline, parse_pipeline
from fxquant.graph.program import Program
from fxquant.graph.segment import values_of
from fxquant.numerics.fake_quant import FakeQuant, Mode
from tests import preset_nets
from tests.analysis.cases import NETS, calibrated, packaged_text, prepared


def outputs(program: Program, name: str, keep: Callable[[FakeQuant], bool]) -> list[torch.Tensor]:
    """What the whole module gives for each batch with these quantizers on: the slow and plain way."""
    twin = program.copy()
    twin.module.eval()
    for _, module in twin.fake_quant_nodes():
        if not keep(module):
            module.mode = Mode.OFF
    with torch.no_grad():
        return [twin.module(batch) for batch in preset_nets.batches(name)]


def db(reference: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    signal = sum(float((x.double() ** 2).sum()) for x in reference)
    noise = sum(float(((x.double() - y.double()) ** 2).sum()) for x, y in zip(reference, found, strict=True))
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def paths(program: Program, unit: str, report: AnalysisReport) -> set[str]:
    """Targets of the quantizers of a unit, found by the values that its row names."""
    row = next(row for row in report.units if row.name == unit)
    values = {*row.weights, *row.activations}
    return {str(node.target) for node, _ in program.fake_quant_nodes() if str(node.args[0]) in values}


@pytest.mark.parametrize("name", NETS)
def test_both_sweeps_equal_full_forwards_with_the_same_quantizers(name: str) -> None:
    program = calibrated(name)
    report = analyze(program, preset_nets.batches(name))
    reference = outputs(program, name, lambda module: False)
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
        assert row.alone.sqnr_db == pytest.approx(db(reference, keeping(targets, True)), abs=1e-3)
        assert row.without.sqnr_db == pytest.approx(db(reference, keeping(targets, False)), abs=1e-3)
    assert seen == {str(node.target) for node, _ in program.fake_quant_nodes()}


@pytest.mark.parametrize("name", NETS)
def test_scores_of_the_whole_program_equal_program_quantizers(name: str) -> None:
    program = calibrated(name)
    report = analyze(program, preset_nets.batches(name))
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
        pairs = [(x.argmax(1) == y.argmax(1)) for x, y in zip(reference, found, strict=True)]
        assert report.quantized.agreement == pytest.approx(float(torch.cat(pairs).double().mean()))


@pytest.mark.parametrize("layer", ["stem", "a2", "b1", "down", "fc"])
def test_a_layer_of_two_bits_comes_first_in_both_sweeps(layer: str) -> None:
    rule = f'{{ node = "{layer}", weight = {{ bits = 2 }} }}'
    report = analyze(calibrated("residual", rule), preset_nets.batches("residual"))
    assert report.by_damage[0].name == layer
    assert max(report.units, key=lambda unit: unit.damage_without).name == layer
    assert report.by_damage[0].bits == "w2 a8"
    worst = min((row for row in report.values if row.kind == "weight"), key=lambda row: row.local_sqnr_db)
    assert worst.unit == layer


def test_errors_of_values_equal_plain_loops() -> None:
    program = calibrated("residual", preset="int8_per_tensor")
    batches = preset_nets.batches("residual")
    report = analyze(program, batches)
    real, twin = float_twin(program), program.copy()
    twin.module.eval()
    for row in report.values:
        quantizer = next(node for node, _ in program.fake_quant_nodes() if str(node.args[0]) == row.value)
        module = copy.deepcopy(program.fake_quant(quantizer))
        assert module is not None
        xs = [found[row.value] for found in values_of(real, batches, [row.value])]
        ys = [found[quantizer.name] for found in values_of(twin, batches, [quantizer.name])]
        if row.kind == "weight":
            xs, ys = xs[:1], ys[:1]
        xs, ys = [x.detach() for x in xs], [y.detach() for y in ys]
        own = [module(x) - x for x in xs]
        count = sum(x.numel() for x in xs)
        energy = sum(float((x.double() ** 2).sum()) for x in xs)
        noise = sum(float((x.double() ** 2).sum()) for x in own)
        assert row.local_mse == pytest.approx(noise / count, rel=1e-5)
        assert row.local_sqnr_db == pytest.approx(10 * math.log10(energy / noise), abs=1e-4)
        if row.accumulated_mse is not None:
            behind = sum(float(((y - x).double() ** 2).sum()) for x, y in zip(xs, ys, strict=True))
            assert row.accumulated_mse == pytest.approx(behind / count, rel=1e-4)
        low, high = min(float(x.min()) for x in xs), max(float(x.max()) for x in xs)
        assert (row.min, row.max) == pytest.approx((low, high))
        codes = torch.cat([module.codes(x).flatten() for x in xs])
        low_end, high_end = row.grid_min - row.scale_low / 2, row.grid_max + row.scale_low / 2
        beyond = sum(int(((x < low_end) | (x > high_end)).sum()) for x in xs)
        assert row.clipped * count == pytest.approx(beyond, abs=1.5)
        assert row.codes_used == len(codes.unique()) and row.codes == module.spec.steps + 1
        assert sum(row.histogram.counts) == count
        assert row.histogram.low <= low and high <= row.histogram.low + row.histogram.width * len(row.histogram.counts)


def test_averages_do_not_depend_on_how_samples_are_cut_into_batches() -> None:
    program = calibrated("residual")
    whole = torch.cat(preset_nets.batches("residual"))
    one = analyze(program, [whole])
    cut = analyze(program, [whole[:1], whole[1:4], whole[4:]])
    assert cut.samples == one.samples == len(whole)
    for a, b in zip(one.values, cut.values, strict=True):
        assert a.local_mse == pytest.approx(b.local_mse, rel=1e-5)
        assert a.accumulated_mse == (None if b.accumulated_mse is None else pytest.approx(b.accumulated_mse, rel=1e-4))
        assert (a.min, a.max) == (pytest.approx(b.min, rel=1e-5), pytest.approx(b.max, rel=1e-5))
        assert abs(a.codes_used - b.codes_used) <= 1  # torch sums otherwise in other batches
        assert sum(a.histogram.counts) == sum(b.histogram.counts)
    assert one.quantized.sqnr_db == pytest.approx(cut.quantized.sqnr_db, abs=1e-3)


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


def test_the_report_survives_json() -> None:
    report = analyze(calibrated("plain"), preset_nets.batches("plain"), lambda model: 1.0)
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert AnalysisReport.from_dict(json.loads(text)) == report
    with pytest.raises(StorageError, match="expected version 1; got 9"):
        AnalysisReport.from_dict({**report.to_dict(), "version": 9})
    with pytest.raises(StorageError, match="KeyError: 'units'"):
        AnalysisReport.from_dict({key: value for key, value in report.to_dict().items() if key != "units"})


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
    program = calibrated("residual")
    before = analyze(program, preset_nets.batches("residual"))
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
    report = analyze(calibrated("plain"), preset_nets.batches("plain"))
    row = next(row for row in report.units if row.name == "conv1")
    assert row.activations == ("relu", "max_pool2d") and row.weights == ("conv1_weight",)
    assert "one grid for relu, max_pool2d: switched together, as 'conv1'" in report.notes
    assert next(value for value in report.values if value.value == "max_pool2d").shares == "relu"


class Ranges(nn.Module):
    """A dead channel, a channel a hundred times as large as another, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, 100.0, 0.0, 10.0]).view(4, 1, 1, 1).expand(4, 3, 1, 1))
            self.conv.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = torch.relu(self.conv(x))
        return {"head": self.head(y), "features": y}


def test_ranges_name_dead_channels_ratios_and_what_is_clipped() -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 3, 5, 5)
    program = fxquant.capture(Ranges().eval(), x)
    load_pipeline("int8_per_tensor").prepare(program)
    fxquant.calibrate(program, [x])
    report = analyze(program, [2 * x])
    rows = {row.value: row for row in report.values}
    weight, activation = rows["conv_weight"], rows["relu"]
    assert weight.dead_channels == (2,) and weight.channels == 4
    assert weight.channel_ratio == pytest.approx(100.0)
    assert weight.channel_high == pytest.approx((1.0, 100.0, 0.0, 10.0))
    assert activation.dead_channels == (2,)
    values = next(values_of(float_twin(program), [2 * x], ["relu"]))["relu"]
    module = next(module for node, module in program.fake_quant_nodes() if str(node.args[0]) == "relu")
    beyond = values > float(module.encoding.max) + float(module.encoding.scale) / 2
    assert activation.clipped == pytest.approx(float(beyond.double().mean())) and activation.clipped > 0
    assert report.quantized.agreement is None and report.float_score.agreement is None  # two outputs are no classes


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = preset_nets.batches("residual", 3)
    expected = analyze(calibrated("residual"), batches)
    runs: list[int] = []
    plain = Route.outputs_from

    def counted(self: Route, index: int, *rest: Any) -> Any:
        runs.append(index)
        if len(runs) == limit:
            raise KeyboardInterrupt
        return plain(self, index, *rest)

    monkeypatch.setattr(Route, "outputs_from", counted)
    each = 4 + 2 * len(expected.units)
    limit = each + 10  # in the middle of the second batch
    with pytest.raises(KeyboardInterrupt):
        analyze(calibrated("residual"), batches, folder=tmp_path)
    done = len(runs) - 1
    runs.clear()
    limit = -1
    assert analyze(calibrated("residual"), batches, folder=tmp_path, resume=True) == expected
    assert len(runs) == 3 * each - done + 2  # and the float outputs of the two batches that were begun, again
    runs.clear()
    assert analyze(calibrated("residual"), batches, folder=tmp_path, resume=True) == expected
    assert len(runs) == 3  # float outputs alone


def test_an_interrupted_evaluate_is_asked_only_for_what_is_missing(tmp_path: Path) -> None:
    batches = preset_nets.batches("plain")
    asked: list[float] = []

    def evaluate(model: Any) -> float:
        if len(asked) == limit:
            raise KeyboardInterrupt
        with torch.no_grad():
            asked.append(float(model(batches[0]).sum()))
        return asked[-1]

    limit = -1
    expected = analyze(calibrated("plain"), batches, evaluate)
    total = len(asked)
    asked.clear()
    limit = 7
    with pytest.raises(KeyboardInterrupt):
        analyze(calibrated("plain"), batches, evaluate, folder=tmp_path)
    asked.clear()
    limit = -1
    assert analyze(calibrated("plain"), batches, evaluate, folder=tmp_path, resume=True) == expected
    assert len(asked) == total - 7


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    batches = preset_nets.batches("plain")
    analyze(calibrated("plain"), batches, folder=tmp_path)
    with pytest.raises(StorageError, match="is there already"):
        analyze(calibrated("plain"), batches, folder=tmp_path)
    with pytest.raises(StorageError, match="another run: seed; expected 5; got 0"):
        analyze(calibrated("plain"), batches, folder=tmp_path, resume=True, seed=5)
    with pytest.raises(StorageError, match="another run: program"):
        analyze(calibrated("plain", preset="int8_per_tensor"), batches, folder=tmp_path, resume=True)
    with pytest.raises(FxquantError, match="batch 0; expected the batches of the run that is resumed"):
        analyze(calibrated("plain"), batches[::-1], folder=tmp_path, resume=True)
    analyze(calibrated("plain"), batches[::-1], folder=tmp_path, overwrite=True)


def test_suggested_rules_can_be_pasted_and_do_what_they_say() -> None:
    batches = preset_nets.batches("residual")
    report = analyze(calibrated("residual", preset="int8_per_tensor"), batches)
    text = packaged_text("int8_per_tensor")
    marker = '[[prepare]]\npass = "assign-specs"\n'
    count = len(report.units)
    suggested = report.suggestions(count)
    program = fxquant.capture(preset_nets.net("residual"), batches[0])
    parse_pipeline(text.replace(marker, marker + suggested), name="test", place="test").prepare(program)
    rows = {row.value: row for row in program.coverage().rows}
    active = [line.strip() for line in suggested.splitlines() if line.startswith("  {")]
    for unit in report.units:
        in_float = f'{{ node = "{unit.name}", quantize = false }}'
        assert all(rows[name].is_quantized is not any(in_float in line for line in active) for name in unit.weights)
        for name in unit.activations[:1]:
            widened = any(f'{{ node = "{name}", output = {{ bits = 16 }} }}' in line for line in active)
            spec = rows[name].spec
            assert spec is None or (spec.bits == 16) is widened  # None: no integer layer reads it
    assert len(active) >= len(report.units)
    # the alternatives, too
    every = suggested.replace("# { node", "{ node").splitlines()
    lines = [line for line in every if "quantize = false" not in line]
    program = fxquant.capture(preset_nets.net("residual"), batches[0])
    parse_pipeline(text.replace(marker, marker + "\n".join(lines) + "\n"), name="test", place="test").prepare(program)
    specs = {row.value: str(row.spec) for row in program.coverage().rows}
    assert all("per-channel(0)" in specs[name] for unit in report.units for name in unit.weights)
    fxquant.calibrate(program, batches)
    assert analyze(program, batches).quantized.sqnr_db > report.quantized.sqnr_db + 1


def test_a_program_without_grids_is_refused() -> None:
    with pytest.raises(CalibrationError, match="expected a program at stage calibrated or finalized; got inserted"):
        analyze(prepared("plain"), preset_nets.batches("plain"))


def test_a_program_whose_quantizers_are_all_off_is_refused() -> None:
    program = calibrated("plain")
    with (
        program.quantizers(weights=False, activations=False),
        pytest.raises(FxquantError, match="quantizers; got none that is on"),
    ):
        analyze(program, preset_nets.batches("plain"))


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ([], "at least one batch; got none"),
        (torch.zeros(2, 3, 8, 8), "an iterable of batches; got a tensor"),
        ([torch.zeros(2, 5, 8, 8)], "batch 0: batch: input 'x'"),
        ([torch.full((2, 3, 8, 8), math.nan)], "output is NaN in batch 0"),
        ([torch.full((2, 3, 8, 8), math.inf)], "NaN in batch 0|not finite in batch 0"),
    ],
)
def test_batches_that_cannot_be_measured_are_refused(batches: Any, text: str) -> None:
    with pytest.raises(FxquantError, match=text):
        analyze(calibrated("plain"), batches)


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused(score: float) -> None:
    with pytest.raises(FxquantError, match="analyze: the score of 'float'; expected a finite number"):
        analyze(calibrated("plain"), preset_nets.batches("plain"), lambda model: score)


@pytest.mark.parametrize(("key", "value"), [("max_batches", 0), ("seed", -1)])
def test_options_out_of_range_are_refused(key: str, value: int) -> None:
    with pytest.raises(FxquantError, match=f"analyze: {key}"):
        analyze(calibrated("plain"), preset_nets.batches("plain"), **{key: value})


def test_no_more_batches_are_used_than_asked_for() -> None:
    taken = []

    def stream() -> Any:
        for batch in preset_nets.batches("plain", 4):
            taken.append(batch)
            yield batch

    report = analyze(calibrated("plain"), stream(), max_batches=2)
    assert report.batches == len(taken) == 2


def test_the_table_is_sorted_and_shortens_names_in_the_middle() -> None:
    report = analyze(calibrated("attention"), preset_nets.batches("attention"))
    assert all(len(line) <= width for width in (100, 120, 180) for line in report.table(width).splitlines())
    lines = report.table(110).splitlines()
    names = [line.split()[0] for line in lines]
    first, second = report.by_damage[0].name, report.by_damage[1].name
    assert names.index(first) < names.index(second)
    assert any("…" in name and name.endswith("scores") for name in names)
    assert "3 more layers do less harm" in report.table(140, len(report.units) - 3)


def test_units_take_what_stands_behind_an_absorbed_relu() -> None:
    program = calibrated("residual")
    units: dict[str, Unit] = {unit.name: unit for unit in units_of(program)}
    assert [str(node.args[0]) for node in units["stem"].activations] == ["relu"]
    assert [str(node.args[0]) for node in units["add"].activations] == ["relu_2"]
    assert not units["add"].weights and sweeping.alone(units["add"]) == "alone add"
