"""From counted differences to one verdict a tensor: whose fault it is, and where what is inherited comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from fxquant.parity.compare import Difference
from fxquant.parity.constants import StoredDifference
from fxquant.parity.localise import FLOAT_ROUNDING, Blame
from fxquant.parity.optimised import Fusion, NodeKernel
from fxquant.parity.report import SEVERITY, Row, Verdict
from fxquant.parity.segments import Segment, SegmentReader


@dataclass(frozen=True)
class Findings:
    """All that was counted: differences by segment, stored constants that differ, and who is to blame for a segment."""

    overall: Mapping[Segment, Difference]
    local: Mapping[Segment, Difference]
    stored: tuple[StoredDifference, ...]
    blames: Mapping[Segment, Blame]


@dataclass(frozen=True)
class _Cause:
    """The worst thing on the way to a tensor: what it is, at which value, and the number of that value's row."""

    verdict: Verdict
    value: str
    row: int


_NOTHING = _Cause(Verdict.EXACT, "", 0)


def rows_of(reader: SegmentReader, findings: Findings, fusion: Fusion) -> tuple[Row, ...]:
    """One row a segment, in their order; causes are carried from each tensor to those computed from it."""
    causes: dict[fx.Node, _Cause] = {}
    kernels = {kernel.node: kernel for kernel in fusion.nodes}
    rows: list[Row] = []
    for segment in findings.overall:
        upstream = _worst([causes.get(source, _NOTHING) for source in segment.sources])
        verdict = _verdict(segment, findings)
        own = _Cause(verdict, segment.value, len(rows)) if SEVERITY[verdict] else _NOTHING
        if not segment.output:
            causes[segment.end] = _worst([own, upstream])
        origin = upstream.value if verdict is Verdict.INHERITED else ""
        rows.append(_row(reader, segment, findings, kernels, verdict, origin))
    return tuple(rows)


def _worst(causes: list[_Cause]) -> _Cause:
    """The most severe; of equals the one of the earliest row."""
    return max(causes, key=lambda cause: (SEVERITY[cause.verdict], -cause.row), default=_NOTHING)


def _verdict(segment: Segment, findings: Findings) -> Verdict:
    overall, local = findings.overall[segment], findings.local[segment]
    if owned(segment, findings.stored):
        return Verdict.STORED
    if segment in findings.blames:
        return Verdict.DIFFERS
    if is_more_than_rounding(segment, local):
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


def is_more_than_rounding(segment: Segment, local: Difference) -> bool:
    """Whether a local difference is more than rounding explains: a step, or for an output float32 additions."""
    if segment.output:
        return not local.worst <= FLOAT_ROUNDING * local.largest
    return local.worst > 1


def _row(
    reader: SegmentReader,
    segment: Segment,
    findings: Findings,
    known: Mapping[str, NodeKernel],
    verdict: Verdict,
    origin: str,
) -> Row:
    nodes = tuple(node.name for node in segment.nodes)
    kernels = tuple(name for node in nodes if node in known for name in known[node].kernels)
    found = findings.blames.get(segment)
    stored = owned(segment, findings.stored)
    faults = found.nodes if found else tuple(dict.fromkeys(name for item in stored for name in item.owners))
    return Row(
        value=segment.value,
        is_output=bool(segment.output),
        nodes=nodes,
        kernels=kernels,
        overall=findings.overall[segment],
        local=findings.local[segment],
        step=_step(reader, segment),
        verdict=verdict,
        origin=origin,
        faults=faults,
        reason=found.reason if found else "",
    )


def _step(reader: SegmentReader, segment: Segment) -> float:
    """The largest scale of the segment's own grid or, for an output, of the grids in front of it; NaN without any."""
    ends = segment.sources if segment.output else (segment.end,)
    modules = [module for module in map(reader.program.fake_quant, ends) if module is not None]
    return max((float(module.scale.max()) for module in modules), default=float("nan"))
