"""What the tests of the analysis share: small calibrated programs, and a report that needs no analysis."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib import resources

import torch

import fxquant
from fxquant.analysis import AnalysisReport, Score, UnitRow, ValueRow, analyze
from fxquant.analysis.report import HistogramRow
from fxquant.graph.pipeline import Pipeline, parse_pipeline
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import FakeQuant, Mode
from tests import preset_nets

NETS = ("residual", "plain", "depthwise", "attention", "decoder")


def packaged_text(preset: str) -> str:
    """The text of a packaged pipeline."""
    return resources.files("fxquant.configs").joinpath(f"{preset}.toml").read_text()


def with_rules(*rules: str, preset: str = "int8_per_channel") -> Pipeline:
    """A packaged pipeline with placement rules."""
    text = packaged_text(preset)
    marker = '[[prepare]]\npass = "assign-specs"\n'
    assert marker in text
    return parse_pipeline(text.replace(marker, f"{marker}rules = [{', '.join(rules)}]\n"), name="test", place="test")


def prepared(name: str, *rules: str, preset: str = "int8_per_channel") -> Program:
    """A small net prepared by a packaged pipeline with placement rules."""
    program = fxquant.capture(preset_nets.net(name), preset_nets.batches(name)[0])
    with_rules(*rules, preset=preset).prepare(program)
    return program


def calibrated(name: str, *rules: str, preset: str = "int8_per_channel") -> Program:
    """The same, calibrated; a copy of its own for each caller."""
    return _calibrated(name, rules, preset).copy()


@cache
def _calibrated(name: str, rules: tuple[str, ...], preset: str) -> Program:
    program = prepared(name, *rules, preset=preset)
    fxquant.calibrate(program, preset_nets.batches(name))
    return program


@cache
def report_of(name: str, preset: str = "int8_per_channel") -> AnalysisReport:
    """The analysis of a calibrated net on the batches that it was calibrated on; measured once."""
    return analyze(calibrated(name, preset=preset), preset_nets.batches(name))


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
    """SQNR over all elements of all batches."""
    signal = sum(float((x.double() ** 2).sum()) for x in reference)
    noise = sum(float(((x.double() - y.double()) ** 2).sum()) for x, y in zip(reference, found, strict=True))
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def synthetic(layers: int, name: str = "net") -> AnalysisReport:
    """A report of so many layers, each with a weight and an activation; `name` begins every name in it."""
    units = tuple(
        UnitRow(
            f"{name}_{index}", f"{name}.{index}", "convolution", (f"{name}_{index}_weight",), (f"{name}_{index}_out",),
            "w8 a8", 0, Score(30.0 + index % 7, 1.0), Score(20.0, 0.5), 0.01 * (index % 13), 0.005 * (index % 5 - 1),
        )
        for index in range(layers)
    )  # fmt: skip
    values = tuple(
        _value(f"{name}_{index}_{kind}", role, f"{name}_{index}", index)
        for index in range(layers)
        for kind, role in (("weight", "weight"), ("out", "activation"))
    )
    scores = Score(float("inf"), 1.0), Score(20.0, 0.5), Score(30.0, 0.9), Score(25.0, 0.75)
    return AnalysisReport(name, "calibrated", 2, 8, "sqnr", *scores, units, values, (f"a note on {name}",))


def _value(value: str, kind: str, unit: str, index: int) -> ValueRow:
    is_weight = kind == "weight"
    channels = tuple(0.1 * (channel % 5 + 1) for channel in range(16)) if is_weight else ()
    accumulated = (None, None) if is_weight else (30.0 - index % 9, 0.2)
    return ValueRow(
        value, kind, unit, unit, "u8 asymmetric per-tensor", 8, "", 40.0 + index % 5, 0.01, *accumulated, -1.0, 2.0,
        -1.1, 2.1, 0.01, 0.01, 100, 100, 0.001, 200, 256, 16, (3,), 7.5, tuple(-x for x in channels), channels,
        HistogramRow(-1.0, 0.1, tuple(range(30))),
    )  # fmt: skip
