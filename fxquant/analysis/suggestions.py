"""Placement rules for the layers that do most harm, as text that can be pasted into a pipeline's file.

1. `quantize = false` computes a layer in float. Its output goes on being quantized for the integer layers that read it.
2. `output = { bits = 16 }` names the value that is quantized: the relu behind the layer, where there is one.
3. Where that value is the layer's own both cannot be had (what is in float has no output spec): the rule for the part
   with the lower SQNR of its own stands, the other is a comment.
4. Only harm beyond the noise floor counts: a layer that quantization alone makes better by so much shows that as much
   says nothing.

    floor by `evaluate`            -smallest damage, or 0, + 1e-6 |float score|
    floor by noise of the outputs  1e-12 of the float outputs' energy (120 dB): what float32 rounds away
"""

from __future__ import annotations

import json
import math

from fxquant.analysis.report import AnalysisReport, UnitRow, ValueRow
from fxquant.analysis.table import damage, decibels

_WIDE = 16
_ROUNDING = 1e-6  # relative, of a float32 sum


def suggestions(report: AnalysisReport, count: int) -> str:
    """See AnalysisReport.suggestions."""
    if count < 1:
        return ""
    floor = noise_floor(report)
    units = [unit for unit in report.by_damage if unit.damage_alone > floor][:count]
    if not units:
        return f"# No layer does harm beyond the noise floor of {_floor_text(report, floor)}: no rules.\n"
    values = {value.value: value for value in report.values}
    lines = [
        "# In a pipeline's file, under the [[prepare]] table of assign-specs (or apply-placement).",
        "# Keep what pays: measure again after each line, as the layers' damages do not simply add up.",
        f"# Layers beyond the noise floor of {_floor_text(report, floor)}, the worst first:",
        "rules = [",
        *(line for unit in units for line in _unit_lines(report, unit, values)),
        "]",
    ]
    return "\n".join(lines) + "\n"


def noise_floor(report: AnalysisReport) -> float:
    """The damage that says nothing (case 4)."""
    if report.float_score.evaluated is not None:
        gain = max(0.0, -min((unit.damage_alone for unit in report.units), default=0.0))
        return gain + _ROUNDING * abs(report.float_score.evaluated)  # 0.97 - 0.965 is not quite 0.975 - 0.97
    return _ROUNDING**2 / report.quantized.noise if report.quantized.noise else 0.0


def _floor_text(report: AnalysisReport, floor: float) -> str:
    number = f"{floor:.2g}" if report.score == "evaluate" else f"{100 * floor:.2g} %"
    return f"{number} {_measure(report)}"


def _measure(report: AnalysisReport) -> str:
    return "of the score" if report.score == "evaluate" else "of the noise"


def _unit_lines(report: AnalysisReport, unit: UnitRow, values: dict[str, ValueRow]) -> list[str]:
    share = damage(report, unit.damage_alone)
    where = f", {unit.module}" if unit.module and unit.module != unit.name else ""
    lines = [f"  # {_printable(unit.name + where)} ({unit.bits}): {share} {_measure(report)} alone"]
    wide = [values[name] for name in unit.activations if not values[name].shares and values[name].bits < _WIDE]
    weakest = min((values[name].local_sqnr_db for name in unit.weights), default=math.inf)
    for name in unit.weights:
        clashing = any(item.value == unit.name and item.local_sqnr_db < weakest for item in wide)
        lines += _weight_lines(unit, values[name], "# " if clashing else "")
    for item in wide:
        mark = "# " if unit.weights and item.value == unit.name and item.local_sqnr_db >= weakest else ""
        own = f"output's own SQNR {decibels(item.local_sqnr_db)} dB: {'instead, ' if mark else ''}in 16 bits"
        lines.append(f"  {mark}{{ node = {json.dumps(item.value)}, output = {{ bits = {_WIDE} }} }},  # {own}")
    return lines


def _weight_lines(unit: UnitRow, weight: ValueRow, mark: str) -> list[str]:
    """The layer in float; or, where one scale serves all channels, a scale for each."""
    node = json.dumps(unit.name)
    own = f"weight's own SQNR {decibels(weight.local_sqnr_db)} dB: {'instead, ' if mark else ''}in float"
    lines = [f"  {mark}{{ node = {node}, quantize = false }},  # {own}"]
    if unit.axis is not None and "per-tensor" in weight.spec:
        axis = f"{{ granularity = {{ axis = {unit.axis} }} }}"
        ratio = "" if weight.channel_ratio is None else f" (their ranges differ {weight.channel_ratio:.3g}-fold)"
        lines.append(f"  # {{ node = {node}, weight = {axis} }},  # instead: a scale for each channel{ratio}")
    return lines


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)
