"""One compared tensor: what differs there, what is promised of it, and what follows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from fxquant.parity.certification import Certification
from fxquant.parity.compare import Difference


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
        certification: what is promised of it: certified (no code may differ locally), a float island, or uncertified.
        origin: for what is inherited, the value that it comes from; else "".
        from_island: whether that value is a float island.
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
    certification: Certification
    origin: str
    from_island: bool
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

    def agreement(self) -> dict[str, Any]:
        """Of a graph output: the fraction of values that are equal bit for bit, and the worst difference."""
        return {
            "output": self.value,
            "compared": self.overall.compared,
            "equal_fraction": 1.0 - self.overall.fraction,
            "worst": self.overall.worst,
            "worst_steps": self.worst_steps,
        }

    @property
    def verdict_text(self) -> str:
        """The verdict, with its origin if inherited."""
        if self.verdict is not Verdict.INHERITED or not self.origin:
            return self.verdict.value
        return f"inherited from {'float island ' if self.from_island else ''}{self.origin}"

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
            "certification": self.certification.to_dict(),
            "origin": self.origin,
            "from_island": self.from_island,
            "faults": list(self.faults),
            "reason": self.reason,
        }
