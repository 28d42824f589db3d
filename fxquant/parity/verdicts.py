"""From counted differences to one verdict a tensor: whose fault it is, and where what is inherited comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from fxquant.parity.certification import Certification, Standing
from fxquant.parity.compare import Difference
from fxquant.parity.constants import StoredDifference
from fxquant.parity.localise import FLOAT_ROUNDING, FOREIGN_GRID, Blame
from fxquant.parity.optimised import Fusion, NodeKernel
from fxquant.parity.row import SEVERITY, Row, Verdict
from fxquant.parity.segments import Segment, SegmentReader


@dataclass(frozen=True)
class Findings:
    """All that was found of each segment.

    Arguments:
        overall, local: what was counted.
        stored: constants that differ.
        blames: who is to blame for a segment.
        certifications: what is promised of it.
        foreign: FakeQuants of activations whose grid in the file is not the program's, where codes are promised.
    """

    overall: Mapping[Segment, Difference]
    local: Mapping[Segment, Difference]
    stored: tuple[StoredDifference, ...]
    blames: Mapping[Segment, Blame]
    certifications: Mapping[Segment, Certification]
    foreign: frozenset[fx.Node]

    def is_misread(self, segment: Segment) -> bool:
        """Whether a segment's own grid is not the program's, and codes differ there or where it is read."""
        if segment.output or segment.end not in self.foreign:
            return False
        reached = [other for other in self.overall if other is segment or segment.end in other.sources]
        return any(self.overall[other].differing for other in reached)


@dataclass(frozen=True)
class _Cause:
    """The worst thing on the way to a tensor: what it is, and at which value and row."""

    verdict: Verdict
    value: str
    is_island: bool
    row: int


_NOTHING = _Cause(Verdict.EXACT, "", False, 0)


def rows_of(reader: SegmentReader, findings: Findings, fusion: Fusion) -> tuple[Row, ...]:
    """One row a segment, in their order; causes are carried from each tensor to those computed from it."""
    causes: dict[fx.Node, _Cause] = {}
    kernels = {kernel.node: kernel for kernel in fusion.nodes}
    rows: list[Row] = []
    for segment in findings.overall:
        upstream = _worst([causes.get(source, _NOTHING) for source in segment.sources])
        verdict = _verdict(reader, segment, findings)
        is_island = findings.certifications[segment].standing is Standing.ISLAND
        own = _Cause(verdict, segment.value, is_island, len(rows)) if SEVERITY[verdict] else _NOTHING
        if not segment.output:
            causes[segment.end] = _worst([own, upstream])
        rows.append(_row(reader, segment, findings, kernels, verdict, upstream))
    return tuple(rows)


def _worst(causes: list[_Cause]) -> _Cause:
    """The most severe; of equals the one of the earliest row."""
    return max(causes, key=lambda cause: (SEVERITY[cause.verdict], -cause.row), default=_NOTHING)


def _verdict(reader: SegmentReader, segment: Segment, findings: Findings) -> Verdict:
    overall, local = findings.overall[segment], findings.local[segment]
    if owned(segment, findings.stored):
        return Verdict.STORED
    if segment in findings.blames or findings.is_misread(segment):
        return Verdict.DIFFERS
    if is_beyond(segment, local, findings.certifications[segment], step_of(reader, segment)):
        return Verdict.INHERITED  # from a grid in front of it that is not the program's
    if local.differing:
        return Verdict.ROUNDING
    return Verdict.INHERITED if overall.differing else Verdict.EXACT


def owned(segment: Segment, stored: Iterable[StoredDifference]) -> list[StoredDifference]:
    """The stored differences that belong to a segment: its quantizer's grid, and constants of its layers."""
    names = {node.name for node in segment.nodes}
    return [
        item
        for item in stored
        if (item.quantizer == segment.end.name and not segment.output)
        or (item.is_constant and names.intersection(item.owners))
    ]


def is_explained(segment: Segment, stored: Iterable[StoredDifference]) -> bool:
    """Whether stored differences explain what a segment shows: its own, or those in the grids that it reads."""
    kept = list(stored)
    sources = {source.name for source in segment.sources}
    return bool(owned(segment, kept)) or any(item.quantizer in sources for item in kept)


def is_beyond(segment: Segment, local: Difference, certification: Certification, step: float) -> bool:
    """Whether a local difference is more than may be: where certified any, else more than rounding explains.

    Rounding explains a step, or for an output float32 additions: relative to its largest value or to a `step` of the
    grids in front, whichever is more (a variance of equal numbers is 0 on one side, and rounding on the other).
    """
    if certification.is_certified:
        return local.differing > 0
    if segment.output:
        return not local.worst <= FLOAT_ROUNDING * max(local.largest, step if step > 0 else 0.0)
    return local.worst > 1


def _row(
    reader: SegmentReader,
    segment: Segment,
    findings: Findings,
    known: Mapping[str, NodeKernel],
    verdict: Verdict,
    upstream: _Cause,
) -> Row:
    nodes = tuple(node.name for node in segment.nodes)
    kernels = tuple(name for node in nodes if node in known for name in known[node].kernels)
    found = findings.blames.get(segment)
    if found is None and verdict is Verdict.DIFFERS:
        found = Blame((segment.value,), FOREIGN_GRID)
    is_inherited = verdict is Verdict.INHERITED
    stored = owned(segment, findings.stored)
    faults = found.nodes if found else tuple(dict.fromkeys(name for item in stored for name in item.owners))
    return Row(
        value=segment.value,
        is_output=bool(segment.output),
        nodes=nodes,
        kernels=kernels,
        overall=findings.overall[segment],
        local=findings.local[segment],
        step=step_of(reader, segment),
        verdict=verdict,
        certification=findings.certifications[segment],
        origin=upstream.value if is_inherited else "",
        from_island=is_inherited and upstream.is_island,
        faults=faults,
        reason=found.reason if found else "",
    )


def step_of(reader: SegmentReader, segment: Segment) -> float:
    """The largest scale of the segment's own grid or, for an output, of the grids in front of it; NaN without any."""
    ends = segment.sources if segment.output else (segment.end,)
    modules = [module for module in map(reader.program.fake_quant, ends) if module is not None]
    return max((float(module.scale.max()) for module in modules), default=float("nan"))
