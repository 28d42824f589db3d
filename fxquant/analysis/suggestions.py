"""Placement rules for the layers that do most harm, as text that can be pasted into a pipeline's file.

1. `quantize = false` computes a layer in float. Its output goes on being quantized for the integer layers that read it.
2. `output = { bits = 16 }` names the value that is quantized: the relu behind the layer, where there is one.
3. Where that value is the layer's own both cannot be had (what is in float has no output spec): the rule for the part
   with the lower SQNR of its own stands, the other is a comment.
"""

from __future__ import annotations

import json
import math

from fxquant.analysis.report import AnalysisReport, UnitRow, ValueRow
from fxquant.analysis.table import damage, decibels

_WIDE = 16


def suggestions(report: AnalysisReport, count: int) -> str:
    """See AnalysisReport.suggestions."""
    values = {value.value: value for value in report.values}
    units = [unit for unit in report.by_damage[:count] if unit.damage_alone > 0 or unit.alone.noise > 0]
    lines = [
        "# In a pipeline's file, under the [[prepare]] table of assign-specs (or apply-placement).",
        "# Keep what pays: measure again after each line, as the layers' damages do not simply add up.",
        "rules = [",
        *(line for unit in units for line in _unit_lines(report, unit, values)),
        "]",
    ]
    return "\n".join(lines) + "\n"


def _unit_lines(report: AnalysisReport, unit: UnitRow, values: dict[str, ValueRow]) -> list[str]:
    share = damage(report, unit.damage_alone)
    measure = "of the score" if report.score == "evaluate" else "of the noise"
    where = f", {unit.module}" if unit.module and unit.module != unit.name else ""
    lines = [f"  # {_printable(unit.name + where)} ({unit.bits}): {share} {measure} alone"]
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
