"""The report: JSON, the table, and the rules that it suggests."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fxquant
from fxquant.analysis import AnalysisReport, analyze
from fxquant.errors import StorageError
from fxquant.graph.pipeline import parse_pipeline
from tests import preset_nets
from tests.analysis.cases import calibrated, packaged_text, report_of, synthetic


def test_the_report_survives_json() -> None:
    report = analyze(calibrated("plain"), preset_nets.batches("plain"), lambda model: 1.0)
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert AnalysisReport.from_dict(json.loads(text)) == report
    with pytest.raises(StorageError, match="expected version 1; got 9"):
        AnalysisReport.from_dict({**report.to_dict(), "version": 9})
    with pytest.raises(StorageError, match="KeyError: 'units'"):
        AnalysisReport.from_dict({key: value for key, value in report.to_dict().items() if key != "units"})


def test_the_table_is_sorted_and_shortens_names_in_the_middle() -> None:
    report = report_of("attention")
    assert all(len(line) <= width for width in (100, 120, 180) for line in report.table(width).splitlines())
    lines = report.table(110).splitlines()
    names = [line.split()[0] for line in lines]
    first, second = report.by_damage[0].name, report.by_damage[1].name
    assert names.index(first) < names.index(second)
    assert any("…" in name and name.endswith("scores") for name in names)
    assert "3 more layers do less harm" in report.table(140, len(report.units) - 3)


def test_layers_whose_shortened_names_look_the_same_are_told_apart() -> None:
    names = [f"bert_embeddings_{kind}_embeddings" for kind in ("word", "token_type", "position")]
    units = [replace(unit, name=name, module=name) for name, unit in zip(names, synthetic(3).units, strict=True)]
    report = replace(synthetic(3), units=tuple(units))
    for width in (110, 142):
        shown = [line.split()[0] for line in report.table(width).splitlines() if "…" in line]
        assert len(set(shown)) == len(shown) == 3, shown
    assert "…n_type_embeddings" in report.table(110)


def test_the_table_is_not_drowned_in_notes() -> None:
    report = replace(synthetic(2), notes=tuple(f"note {index}" for index in range(40)))
    text = report.table()
    assert "note: note 2\n37 more notes are in the report" in text and "note 3" not in text


def test_suggested_rules_can_be_pasted_and_do_what_they_say() -> None:
    batches = preset_nets.batches("residual")
    report = report_of("residual", "int8_per_tensor")
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


def with_damages(score: float | None, *damages: float) -> AnalysisReport:
    """A report of layers with these damages, by `evaluate`'s score, or by noise."""
    report = synthetic(len(damages))
    units = tuple(replace(unit, damage_alone=found) for unit, found in zip(report.units, damages, strict=True))
    float_score = replace(report.float_score, evaluated=score)
    return replace(report, score="sqnr" if score is None else "evaluate", float_score=float_score, units=units)


def suggested_layers(report: AnalysisReport, count: int = 9) -> set[int]:
    """The numbers of the layers that active rules are for."""
    lines = [line for line in report.suggestions(count).splitlines() if line.startswith("  {")]
    assert bool(lines) is ("rules = [" in report.suggestions(count))
    return {int(found[1]) for line in lines if (found := re.search(r'"net_(\d+)', line))}


@pytest.mark.parametrize(
    ("score", "damages", "expected"),
    [
        (0.7, (0.0, 0.0, 0.0), set()),
        (0.7, (0.0, 0.1, 0.0), {1}),
        (0.7, (0.02, 0.1, -0.02), {1}),  # a gain of 0.02 shows that a loss of 0.02 says nothing
        (0.7, (0.02, 0.1, -0.2), set()),
        (0.97, (0.97 - 0.965, 0.1, 0.97 - 0.975), {1}),  # one image of 200 lost, and one won
        (0.7, (5e-7, -1e-9, 8e-7), {2}),  # 1e-6 of the score
        (None, (0.0, 0.0), set()),
        (None, (1e-13, 0.3), {1}),
    ],
)
def test_only_layers_with_damage_beyond_the_noise_floor_get_rules(
    score: float | None, damages: tuple[float, ...], expected: set[int]
) -> None:
    report = with_damages(score, *damages)
    assert suggested_layers(report) == expected
    assert "noise floor of" in report.suggestions(9)
    assert ("rules" in tomllib.loads(report.suggestions(9))) is bool(expected)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8), st.integers(1, 8))
def test_suggested_layers_do_more_harm_than_any_gain(damages: list[float], count: int) -> None:
    report = with_damages(1.0, *damages)
    found = suggested_layers(report, count)
    assert len(found) <= count
    assert all(damages[index] > max(1e-6, -min(damages)) for index in found)
    assert all(damages[index] >= damages[other] or other in found for index in found for other in range(len(damages)))


def test_a_count_of_zero_suggests_nothing() -> None:
    assert synthetic(3).suggestions(0) == ""
    assert synthetic(0).suggestions(3).startswith("# No layer does harm beyond the noise floor")
