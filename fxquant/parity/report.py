"""What check_parity found: one row a compared tensor, one verdict, and on what it was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fxquant.numerics.runtime import RuntimeOptions
from fxquant.parity.certification import BIT_EXACT, NodeCertification, Standing
from fxquant.parity.constants import StoredDifference
from fxquant.parity.optimised import Fusion
from fxquant.parity.row import Row, Verdict
from fxquant.parity.sums import LayerSums, sums_text
from fxquant.parity.text import agreement_text, counted, fusion_text, named, nodes_text, table

__all__ = ["Environment", "ParityReport", "Row", "Verdict"]


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
        count = self.options.threads
        threads = "default threads" if not count else f"{count} thread{'s' if count > 1 else ''}"
        config = "".join(f", {key}={value}" for key, value in self.options.config)
        level = self.options.level.value
        return f"onnxruntime {self.onnxruntime}, {self.instruction_set}, level {level}, {threads}{config}"

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
        nodes: what is promised of each node that computes real values, in graph order.
        sums: how the exact simulation added up each layer's products, in graph order; () of other simulations.
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
    nodes: tuple[NodeCertification, ...] = ()
    sums: tuple[LayerSums, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def code_rows(self) -> tuple[Row, ...]:
        """The rows of quantized tensors."""
        return tuple(row for row in self.rows if not row.is_output)

    @property
    def outputs(self) -> tuple[Row, ...]:
        """The rows of graph outputs."""
        return tuple(row for row in self.rows if row.is_output)

    def rows_that_are(self, standing: Standing) -> tuple[Row, ...]:
        """The quantized tensors of one standing: certified, float island or uncertified."""
        return tuple(row for row in self.code_rows if row.certification.standing is standing)

    @property
    def certified_differing(self) -> int:
        """How many codes of certified tensors differ locally: 0, or a kernel does not compute what is simulated."""
        return sum(row.local.differing for row in self.rows_that_are(Standing.CERTIFIED))

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
        """One line: what was found, on what, and what is promised."""
        line = f"{self._judgement()} ({self.simulation} simulation, {self.environment})"
        return f"{line}: {self._promises()}" if self.simulation in BIT_EXACT else line

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
                "certified_differing": self.certified_differing,
                "certification": {standing.value: len(self.rows_that_are(standing)) for standing in Standing},
                "outputs": [row.agreement() for row in self.outputs],
                "worst_local_steps": self.worst_local_steps,
                "rows": [row.to_dict() for row in self.rows],
                "nodes": [node.to_dict() for node in self.nodes],
                "sums": [item.to_dict() for item in self.sums],
                "stored": [item.to_dict() for item in self.stored],
                "fusion": self.fusion.to_dict(),
                "environment": self.environment.to_dict(),
                "notes": list(self.notes),
            }
        )
        assert isinstance(plain, dict)
        return plain

    def __str__(self) -> str:
        parts = [self.verdict, "", table(self.rows), ""]
        parts += [agreement_text(row) for row in self.outputs]
        parts.append(fusion_text(self.fusion))
        parts += [nodes_text(self.nodes)] if self.simulation in BIT_EXACT else []
        parts += [sums_text(self.sums)] if self.sums else []
        parts += [f"stored: {item}" for item in self.stored]
        parts += [f"{row.value}: {row.reason}" for row in self.rows if row.reason]
        parts += [f"note: {note}" for note in self.notes]
        return "\n".join(parts)

    def _judgement(self) -> str:
        if self.fault:
            return f"FAULT at {', '.join(self.fault)}: {self._share()}"
        if not self.code_rows:
            worst = max((row.overall.worst for row in self.rows), default=0.0)
            return f"nothing quantized: graph outputs differ by at most {worst:.3g}"
        if self.exact:
            return f"exact: {self._share()}"
        worst_row = self.worst_local
        if worst_row is None:
            return f"inherited: {self._share()}, none locally"
        local = f"{worst_row.value}: {worst_row.local.differing:,} of {worst_row.local.compared:,}"
        steps = f"on onnxruntime's own inputs at most {self.worst_local_steps:g} step"
        return f"within rounding: {self._share()}; {steps} (worst {local})"

    def _share(self) -> str:
        total, differing = self.codes_compared, self.codes_differing
        count = len(self.code_rows)
        where = f"at {count} quantized tensor{'s' if count != 1 else ''}"
        share = f" ({100 * differing / total:.2g} %)" if differing else ""
        return f"{differing:,} of {total:,} codes differ {where}{share}"

    def _promises(self) -> str:
        islands = self.rows_that_are(Standing.ISLAND)
        uncertified = self.rows_that_are(Standing.UNCERTIFIED)
        return (
            f"{len(self.rows_that_are(Standing.CERTIFIED))} certified, "
            f"{counted(islands, 'float island')}, {len(uncertified)} uncertified{named(uncertified)}"
        )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
