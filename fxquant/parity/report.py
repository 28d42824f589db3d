"""What check_parity found: one row a compared tensor, one verdict, and on what it was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fxquant.numerics.runtime import RuntimeOptions
from fxquant.parity.compare import Difference
from fxquant.parity.constants import StoredDifference
from fxquant.parity.optimised import Fusion, KernelKind


class Verdict(Enum):
    """What the comparison says of one tensor."""

    EXACT = "exact"
    INHERITED = "inherited"  # equal on onnxruntime's own inputs: the difference comes from further up
    ROUNDING = "rounding"  # at most one step on onnxruntime's own inputs; for a float output: within float32 rounding
    DIFFERS = "differs (local)"
    STORED = "stored constant differs"

    @property
    def is_fault(self) -> bool:
        """Whether something in this segment is at fault."""
        return self in (Verdict.DIFFERS, Verdict.STORED)


SEVERITY = {Verdict.EXACT: 0, Verdict.INHERITED: 0, Verdict.ROUNDING: 1, Verdict.DIFFERS: 2, Verdict.STORED: 3}


@dataclass(frozen=True)
class Row:
    """The comparison of one quantized tensor, or of one graph output in float.

    Arguments:
        value: name of the quantized value (its codes are `<value>.codes` in the file), or of the graph output.
        is_output: whether it is a graph output, compared as float32.
        nodes: the operations between this tensor and the quantizers in front of it, in graph order.
        kernels: what onnxruntime runs for them.
        overall: simulation against onnxruntime, each on its own values.
        local: the same with every input of the segment taken from onnxruntime.
        step: size of one step in real units: of the tensor's own grid, or for an output of the last grid in front;
            NaN if there is none.
        verdict: what follows.
        origin: for what is inherited, the value that it comes from; else "".
        faults: the nodes at fault here; () unless the verdict is a fault.
        reason: why, in words; "" if there is nothing to say.
    """

    value: str
    is_output: bool
    nodes: tuple[str, ...]
    kernels: tuple[str, ...]
    overall: Difference
    local: Difference
    step: float
    verdict: Verdict
    origin: str
    faults: tuple[str, ...]
    reason: str

    @property
    def worst_steps(self) -> float:
        """Largest overall difference in steps."""
        return self.overall.worst / self.step if self.is_output else self.overall.worst

    @property
    def worst_local_steps(self) -> float:
        """Largest local difference in steps."""
        return self.local.worst / self.step if self.is_output else self.local.worst

    @property
    def verdict_text(self) -> str:
        """The verdict, with its origin if inherited."""
        return (
            f"inherited from {self.origin}" if self.verdict is Verdict.INHERITED and self.origin else self.verdict.value
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {
            "value": self.value,
            "is_output": self.is_output,
            "nodes": list(self.nodes),
            "kernels": list(self.kernels),
            "compared": self.overall.compared,
            "overall": self.overall.to_dict(),
            "local": self.local.to_dict(),
            "worst_steps": self.worst_steps,
            "worst_local_steps": self.worst_local_steps,
            "verdict": self.verdict.value,
            "origin": self.origin,
            "faults": list(self.faults),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Environment:
    """What a report was measured on."""

    onnxruntime: str
    build: str
    instruction_set: str
    cpu_flags: tuple[str, ...]
    options: RuntimeOptions
    torch: str

    def __str__(self) -> str:
        threads = str(self.options.threads) if self.options.threads else "default"
        config = "".join(f", {key}={value}" for key, value in self.options.config)
        level = self.options.level.value
        return f"onnxruntime {self.onnxruntime} {level}, threads {threads}, {self.instruction_set}{config}"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {**vars(self), "cpu_flags": list(self.cpu_flags), "options": self.options.to_dict()}


@dataclass(frozen=True)
class ParityReport:
    """The answer of check_parity.

    Arguments:
        program: name of the program.
        model: path of the ONNX file.
        simulation: name of the simulation that was compared.
        batches: how many batches were compared.
        rows: one a quantized tensor in graph order, then one a graph output.
        stored: constants of the file that are not the program's; () also if they were not compared.
        fusion: the graph that onnxruntime really ran.
        environment: on what.
        notes: what else a reader must know.
    """

    program: str
    model: str
    simulation: str
    batches: int
    rows: tuple[Row, ...]
    stored: tuple[StoredDifference, ...]
    fusion: Fusion
    environment: Environment
    notes: tuple[str, ...] = ()

    @property
    def code_rows(self) -> tuple[Row, ...]:
        """The rows of quantized tensors."""
        return tuple(row for row in self.rows if not row.is_output)

    @property
    def exact(self) -> bool:
        """Whether no code and no stored constant differs; without quantized tensors: no graph output."""
        compared = self.code_rows or self.rows
        return not self.stored and all(row.overall.differing == 0 for row in compared)

    @property
    def codes_compared(self) -> int:
        """How many codes were compared, over all tensors and batches."""
        return sum(row.overall.compared for row in self.code_rows)

    @property
    def codes_differing(self) -> int:
        """How many of them differ."""
        return sum(row.overall.differing for row in self.code_rows)

    @property
    def worst_local_steps(self) -> float:
        """Largest local difference at a quantized tensor, in steps; 0 without any."""
        return max((row.worst_local_steps for row in self.code_rows), default=0.0)

    @property
    def worst_local(self) -> Row | None:
        """The quantized tensor that differs most locally: by steps, then by fraction; None if none differs."""
        differing = [row for row in self.code_rows if row.local.differing]
        return max(differing, key=lambda row: (row.worst_local_steps, row.local.fraction), default=None)

    @property
    def fault(self) -> tuple[str, ...]:
        """The nodes at fault, each once: owners of stored constants that differ, then nodes that compute otherwise."""
        names = [name for item in self.stored for name in item.owners]
        names += [name for row in self.rows for name in row.faults]
        return tuple(dict.fromkeys(names))

    @property
    def verdict(self) -> str:
        """One line."""
        return f"{self._judgement()} [{self.simulation} simulation, {self.batches} batches, {self.environment}]"

    def to_dict(self) -> dict[str, Any]:
        """Everything as values that JSON can hold; what is not finite becomes its name ("inf")."""
        plain = _finite(
            {
                "verdict": self.verdict,
                "exact": self.exact,
                "fault": list(self.fault),
                "program": self.program,
                "model": self.model,
                "simulation": self.simulation,
                "batches": self.batches,
                "codes_compared": self.codes_compared,
                "codes_differing": self.codes_differing,
                "worst_local_steps": self.worst_local_steps,
                "rows": [row.to_dict() for row in self.rows],
                "stored": [item.to_dict() for item in self.stored],
                "fusion": self.fusion.to_dict(),
                "environment": self.environment.to_dict(),
                "notes": list(self.notes),
            }
        )
        assert isinstance(plain, dict)
        return plain

    def __str__(self) -> str:
        parts = [self.verdict, "", _table(self.rows), "", _fusion_text(self.fusion)]
        parts += [f"stored: {item}" for item in self.stored]
        parts += [f"{row.value}: {row.reason}" for row in self.rows if row.reason]
        parts += [f"note: {note}" for note in self.notes]
        return "\n".join(parts)

    def _judgement(self) -> str:
        if self.fault:
            return f"FAULT at {', '.join(self.fault)}"
        if not self.code_rows:
            worst = max((row.overall.worst for row in self.rows), default=0.0)
            return f"NOTHING QUANTIZED: graph outputs differ by at most {worst:.3g}"
        total, differing = self.codes_compared, self.codes_differing
        if self.exact:
            return f"EXACT: {total:,} of {total:,} codes at {len(self.code_rows)} tensors are equal"
        share = f"{differing:,} of {total:,} codes differ ({differing / total:.2%})"
        worst_row = self.worst_local
        if worst_row is None:
            return f"INHERITED: {share}, none locally"
        local = f"{worst_row.value}: {worst_row.local.differing:,} of {worst_row.local.compared:,}"
        steps = f"on onnxruntime's own inputs at most {self.worst_local_steps:g} step"
        return f"WITHIN ROUNDING: {share}; {steps} (worst {local})"


def _table(rows: Sequence[Row]) -> str:
    head = ("tensor", "kernels", "compared", "differ", "worst", "differ locally", "worst", "verdict")
    lines = [head] + [_cells(row) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rule = tuple("-" * width for width in widths)
    numeric = {2, 3, 4, 5, 6}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in numeric else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [head, rule, *lines[1:]]
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"output {row.value}" if row.is_output else row.value,
        "+".join(row.kernels) or "-",
        f"{row.overall.compared:,}",
        _count(row.overall),
        f"{row.worst_steps:.4g}" if row.overall.differing else "0",
        _count(row.local),
        f"{row.worst_local_steps:.4g}" if row.local.differing else "0",
        row.verdict_text,
    )


def _count(difference: Difference) -> str:
    return f"{difference.differing:,} ({difference.fraction:.2e})" if difference.differing else "0"


def _fusion_text(fusion: Fusion) -> str:
    counts = ", ".join(f"{fusion.count(kind)} {kind.value}" for kind in KernelKind if fusion.count(kind))
    lines = [f"kernels (level {fusion.level.value}): {counts or 'none'}; {fusion.leftover} Q/DQ left inside"]
    for kernel in fusion.unfused:
        lines.append(f"  {kernel.node} ({'+'.join(kernel.kernels)}): {kernel.kind.value}: {kernel.reason}")
    return "\n".join(lines)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
