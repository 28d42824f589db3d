"""The post-training table as text and JSON, and what it promises, judged.

Promises are about top-1 points, agreement with the float net and the logits' SQNR. With 119 photos one photo is 0.84
points, so that "within 1.5 points" means: one photo at most.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks import runner
from benchmarks.ptq_nets import NETS, Net
from benchmarks.ptq_rows import Cell, Method, Outcome, Side
from benchmarks.quality import Quality
from benchmarks.runner import Json, Verdict

POINTS = 1.5
MOST = 0.5
COLLAPSED = 0.5  # of the float net's right answers
HEADER = ["bits, scales, who, method", "top-1", "agree", "SQNR dB", "seconds", "codes differing"]
Rows = Mapping[Cell, Outcome]


@dataclass(frozen=True)
class Table:
    """One net's rows, its float quality, and what one of its images is worth."""

    net: Net
    own: Quality
    rows: Rows

    @property
    def resolution(self) -> float:
        """Points of top-1 that one image is worth."""
        return 100 / self.own.photos

    def quality(self, method: Method, *, is_per_channel: bool, bits: int) -> Quality | None:
        """fxquant's row, if it ran."""
        outcome = self.rows.get(Cell(Side.FXQUANT, method, is_per_channel, bits))
        return None if outcome is None else outcome.quality

    def render(self) -> str:
        """The float net first, then the rows by bits and scales, and the reasons of those that did not run."""
        ran = {cell: outcome for cell, outcome in self.rows.items() if outcome.quality is not None}
        order = sorted(ran, key=lambda cell: (-cell.bits, cell.is_per_channel, list(Side).index(cell.side)))
        cells = [["float", *_quality_cells(self.own), "-", "-"], *(_row(cell, ran[cell]) for cell in order)]
        title = f"{self.net.name}: {self.own.photos} images are judged, one is {self.resolution:.2f} points"
        return "\n".join([title, runner.table(HEADER, cells), *self._skipped()])

    def _skipped(self) -> Iterator[str]:
        reasons: dict[str, list[str]] = {}
        for cell, outcome in self.rows.items():
            if outcome.quality is None:
                reasons.setdefault(outcome.skipped, []).append(str(cell))
        for reason, cells in reasons.items():
            yield f"skip {', '.join(cells)}: {reason}"

    def to_dict(self) -> dict[str, Json]:
        """Every figure."""
        rows: dict[str, Json] = {str(cell): outcome.to_dict() for cell, outcome in self.rows.items()}
        return {"float": self.own.to_dict(), "rows": rows}


def verdicts(tables: Mapping[str, Table]) -> list[Verdict]:
    """Every promise that the rows at hand can be asked about."""
    found = []
    for table in tables.values():
        found += [*_ran(table), *_codes(table), *_collapses(table), *_points(table, tables), *_recoveries(table)]
    return [Verdict(f"{name}: {verdict.promise}", verdict.is_kept, verdict.figures) for name, verdict in found]


def _ran(table: Table) -> Iterator[tuple[str, Verdict]]:
    broken = [f"{cell}: {outcome.skipped}" for cell, outcome in table.rows.items() if outcome.is_broken]
    yield table.net.name, Verdict("every row of fxquant ran", not broken, "; ".join(broken) or "no error")


def _codes(table: Table) -> Iterator[tuple[str, Verdict]]:
    compared = {cell: outcome for cell, outcome in table.rows.items() if outcome.differing is not None}
    if compared:
        differing = {str(cell): outcome.differing for cell, outcome in compared.items() if outcome.differing}
        total = sum(outcome.compared or 0 for outcome in compared.values())
        figures = f"{differing or 0} of {total} in {len(compared)} rows"
        yield (
            table.net.name,
            Verdict("no code of a certified value differs from onnxruntime's", not differing and total > 0, figures),
        )


def _collapses(table: Table) -> Iterator[tuple[str, Verdict]]:
    naive = table.quality(Method.NAIVE, is_per_channel=False, bits=8)
    if table.net.is_rescaled and naive is not None:
        figures = f"top-1 {naive.top1:.3f}, in float {table.own.top1:.3f}"
        promise = "rescaled, naive per-tensor W8A8 collapses"
        yield table.net.name, Verdict(promise, naive.top1 <= COLLAPSED * table.own.top1, figures)


def _points(table: Table, tables: Mapping[str, Table]) -> Iterator[tuple[str, Verdict]]:
    """Per-channel scales do not undo a rescaling, so a rescaled net is held to per-channel without one."""
    origin = tables.get(table.net.origin)
    aim = None if origin is None else origin.quality(Method.NAIVE, is_per_channel=True, bits=8)
    corrected = table.quality(Method.BIAS, is_per_channel=False, bits=8)
    if aim is not None and corrected is not None:
        lost = 100 * (aim.top1 - corrected.top1)
        promise = f"CLE + BC per-tensor W8A8 within {POINTS} points of naive per-channel of {table.net.origin}"
        figures = f"{lost:+.2f} points lost ({table.resolution:.2f} is one image)"
        yield table.net.name, Verdict(promise, lost <= POINTS, figures)


def _recoveries(table: Table) -> Iterator[tuple[str, Verdict]]:
    for is_per_channel in (False, True):
        scales = "per-channel" if is_per_channel else "per-tensor"
        before = table.quality(Method.NAIVE, is_per_channel=is_per_channel, bits=4)
        after = table.quality(Method.ADAROUND, is_per_channel=is_per_channel, bits=4)
        best = _best_at_8_bits(table, is_per_channel)
        if before is None or after is None or best is None:
            continue
        lost, left = 1 - before.agreement, 1 - after.agreement
        promise = f"AdaRound recovers most of what W4A8 {scales} loses"
        figures = f"disagreement {lost:.4f} -> {left:.4f}"
        is_kept = left <= MOST * lost
        yield table.net.name, Verdict(f"{promise} in agreement", is_kept, figures)
        start, end = _decibels(before), _decibels(after)
        figures = f"{start:.1f} -> {end:.1f} dB, W8A8 {best:.1f} dB"
        yield table.net.name, Verdict(f"{promise} in SQNR", end >= start + MOST * (best - start), figures)


def _best_at_8_bits(table: Table, is_per_channel: bool) -> float | None:
    """What there is to recover: the best W8A8 of the same scales."""
    found = [table.quality(method, is_per_channel=is_per_channel, bits=8) for method in Method]
    return max((_decibels(quality) for quality in found if quality is not None), default=None)


def _decibels(quality: Quality) -> float:
    return float("inf") if quality.sqnr_db is None else quality.sqnr_db


def _row(cell: Cell, outcome: Outcome) -> list[str]:
    assert outcome.quality is not None
    codes = "-" if outcome.differing is None else f"{outcome.differing} / {outcome.compared}"
    named = f"{cell} ({outcome.iterations})" if outcome.iterations else str(cell)
    return [named, *_quality_cells(outcome.quality), f"{outcome.seconds:.0f}", codes]


def _quality_cells(quality: Quality) -> list[str]:
    """Four digits where one image is less than a thousandth."""
    digits = 3 if quality.photos < 1000 else 4
    sqnr = "-" if quality.sqnr_db is None else f"{quality.sqnr_db:.1f}"
    return [f"{quality.top1:.{digits}f}", f"{quality.agreement:.{digits}f}", sqnr]


def render(tables: Mapping[str, Table], judged: list[Verdict], skipped: Mapping[str, str]) -> str:
    """All tables in the order of NETS, then the verdicts, and the nets that could not be had."""
    parts = [tables[name].render() for name in NETS if name in tables]
    parts += ["\n".join(str(verdict) for verdict in judged)] if judged else []
    parts += [f"{name}: skip {reason}" for name, reason in skipped.items()]
    return "\n" + "\n\n".join(parts)
