"""Which codes of a parity report must be equal, and which of them are not.

locally     every certified tensor: each side reads onnxruntime's own codes in front of it
overall     every certified tensor, unless it inherits from a tensor that is not certified
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fxquant.parity import ParityReport
from fxquant.parity.certification import Standing
from fxquant.parity.report import Row, Verdict

MOST_REFUSED = 0.1  # of many programs; a guard that refuses more than it must shows here, and nowhere else


@dataclass(frozen=True)
class Count:
    """Codes at certified tensors.

    Arguments:
        compared: how many, over the reports.
        differing: how many of them differ locally.
        inherited: how many of them differ overall, though nothing in front that is not certified explains it.
    """

    compared: int = 0
    differing: int = 0
    inherited: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.compared + other.compared, self.differing + other.differing, self.inherited + other.inherited)


def why_void(programs: int, refused: int, compared: int) -> str:
    """Why a run over programs has shown nothing: no code compared, or too many refused; "" if it has."""
    if compared == 0:
        return f"no code of {programs} programs was compared"
    return (
        f"{refused} of {programs} programs were refused, more than {MOST_REFUSED:.0%}"
        if refused > MOST_REFUSED * programs
        else ""
    )


def is_certified(row: Row) -> bool:
    """Whether the simulation promises this tensor's codes, given onnxruntime's own inputs."""
    return row.certification.is_certified and not row.is_output


def is_unexplained(report: ParityReport, row: Row) -> bool:
    """Whether a certified tensor differs overall, and what it inherits from is certified too (or is nothing)."""
    if not is_certified(row) or not row.overall.differing:
        return False
    origin = next((other for other in report.code_rows if other.value == row.origin), None)
    return origin is None or origin.certification.is_certified


def count(report: ParityReport) -> Count:
    """The codes of a report's certified tensors."""
    rows = [row for row in report.rows if is_certified(row)]
    unexplained = [row for row in rows if is_unexplained(report, row)]
    return Count(
        sum(row.local.compared for row in rows),
        sum(row.local.differing for row in rows),
        sum(row.overall.differing for row in unexplained),
    )


def standings(report: ParityReport) -> Counter[str]:
    """How many quantized tensors are certified, float islands or uncertified, and of which kernels islands differ."""
    return Counter(_standing(row) for row in report.rows if not row.is_output or is_wrong_island(row))


def _standing(row: Row) -> str:
    if is_wrong_island(row):
        return f"float island beyond rounding: {'+'.join(row.kernels) or 'no kernel'}"
    is_named = row.certification.standing is Standing.UNCERTIFIED
    return str(row.certification) if is_named else row.certification.standing.value


def is_wrong_island(row: Row) -> bool:
    """A float island that torch and onnxruntime compute differently: counted and named, as nothing is promised."""
    return row.verdict is Verdict.DIFFERS and row.certification.standing is Standing.ISLAND


def faults_of(report: ParityReport) -> list[str]:
    """One line a fault: stored constants, what the report blames except islands, and certified tensors that differ."""
    found = [f"stored: {item}" for item in report.stored]
    for row in report.rows:
        kernels = "+".join(row.kernels) or "no kernel"
        if row.verdict.is_fault and not is_wrong_island(row):
            steps = f"{row.worst_local_steps:g} steps"
            found.append(f"{kernels}: {row.verdict.value} at {row.value}, {steps}, {row.reason}")
        elif is_certified(row) and row.local.differing:
            found.append(f"{kernels}: certified, but {row.local.differing} codes differ at {row.value}")
        elif is_unexplained(report, row):
            found.append(f"{kernels}: certified up to here, but {row.overall.differing} codes differ at {row.value}")
    return found
