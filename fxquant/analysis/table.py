"""The console form of a report: scores, and the layers sorted by damage."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fxquant.analysis.report import AnalysisReport, Score, UnitRow, ValueRow

_LONGEST_NAME = 40
_SHORTEST_NAME = 12
_FIGURES = 92  # columns that all but the names need
_WIDE = 140
_NOTES = 3


def table(report: AnalysisReport, width: int, rows: int | None) -> str:
    """See AnalysisReport.table."""
    shown = report.by_damage[:rows]
    parts: list[Table | Text] = [Text(_title(report)), _summary(report), _layers(report, shown, width)]
    parts += [Text(f"note: {note}") for note in report.notes[:_NOTES]]
    parts += [Text(f"{len(report.notes) - _NOTES} more notes are in the report")] if report.notes[_NOTES:] else []
    hidden = len(report.units) - len(shown)
    parts += [Text(f"{hidden} more layers do less harm")] if hidden else []
    return render(parts, width)


def render(parts: Iterable[Table | Text], width: int) -> str:
    """Text without colours, in lines of at most `width` characters."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, highlight=False)
    for part in parts:
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def shortened(name: str, limit: int) -> str:
    """A name of at most `limit` characters: what is too long loses its middle, where names differ least."""
    if len(name) <= limit:
        return name
    tail = (limit - 1) // 2
    return f"{name[: limit - 1 - tail]}…{name[len(name) - tail :]}"


def decibels(number: float | None) -> str:
    """A figure in dB: "-" where there is none, "exact" where nothing differs."""
    if number is None:
        return "-"
    return "exact" if number == math.inf else f"{number:.2f}"


def told_apart(names: Sequence[str], limit: int) -> list[str]:
    """The names, shortened; those that would look the same lose their beginning instead."""
    shown = [shortened(name, limit) for name in names]
    alike = {
        short for short in shown if len({name for name, other in zip(names, shown, strict=True) if other == short}) > 1
    }
    return [
        f"…{name[len(name) - limit + 1 :]}" if short in alike else short
        for name, short in zip(names, shown, strict=True)
    ]


def _title(report: AnalysisReport) -> str:
    measure = "evaluate" if report.score == "evaluate" else "noise of the outputs"
    return (
        f"analysis of '{report.program}' (stage {report.stage}), {report.samples} samples in {report.batches} "
        f"batch{'' if report.batches == 1 else 'es'}; damage by {measure}"
    )


def _summary(report: AnalysisReport) -> Table:
    found = _plain_table("quantized", "outputs' SQNR (dB)", *_extra_heads(report))
    rows = (
        ("nothing (float)", report.float_score),
        ("weights alone", report.weights_only),
        ("activations alone", report.activations_only),
        ("all", report.quantized),
    )
    for name, score in rows:
        found.add_row(name, decibels(score.sqnr_db), *_extras(report, score))
    return found


def _extra_heads(report: AnalysisReport) -> list[str]:
    heads = [] if report.quantized.agreement is None else ["top-1 as float"]
    return heads if report.score == "sqnr" else [*heads, "evaluate"]


def _extras(report: AnalysisReport, score: Score) -> list[str]:
    cells = [] if report.quantized.agreement is None else [f"{score.agreement or 0.0:.2%}"]
    return cells if report.score == "sqnr" else [*cells, f"{score.evaluated or 0.0:.6g}"]


def _layers(report: AnalysisReport, units: Sequence[UnitRow], width: int) -> Table:
    names: tuple[str, ...] = ("layer", "module")
    room = max(_SHORTEST_NAME, min(_LONGEST_NAME, (width - _FIGURES) // 2))
    if width < _WIDE:  # the layer's name says nearly what its module's says
        names, room = ("layer",), max(_SHORTEST_NAME, min(_LONGEST_NAME, width - _FIGURES))
    heads = ("op", "bits", "damage alone", "damage without", "SQNR alone", "SQNR without")
    found = _plain_table(*names, *heads, "weight's own", "output's own")
    values = {value.value: value for value in report.values}
    columns = [told_apart([unit.name for unit in units], room), told_apart([unit.module for unit in units], room)]
    for unit, *shown in zip(units, *columns[: len(names)], strict=True):
        found.add_row(
            *shown,
            unit.op,
            unit.bits,
            damage(report, unit.damage_alone),
            damage(report, unit.damage_without),
            decibels(unit.alone.sqnr_db),
            decibels(unit.without.sqnr_db),
            decibels(_own(values, unit.weights)),
            decibels(_own(values, unit.activations)),
        )
    return found


def damage(report: AnalysisReport, number: float) -> str:
    """Damage as it is read: a share of the noise, or a difference of scores."""
    return f"{number:+.4g}" if report.score == "evaluate" else f"{100 * number:.2f} %"


def _own(values: dict[str, ValueRow], names: Sequence[str]) -> float | None:
    return min((values[name].local_sqnr_db for name in names), default=None)


def _plain_table(*heads: str) -> Table:
    found = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    for head in heads:
        is_text = head in ("layer", "module", "op", "bits", "quantized")
        found.add_column(Text(head), justify="left" if is_text else "right", no_wrap=is_text)
    return found
