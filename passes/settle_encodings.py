"""Fix every grid: the last pass before lowering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxquant.calibration import require_finite_parameters, require_ranges, settle
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage
from fxquant.graph.rewriter import Rewriter
from fxquant.numerics.fake_quant import Mode


@dataclass(frozen=True)
class SettleEncodings(Pass):
    """Compute the weights' grids from the weights as they are now, raise those that a bias needs, and freeze all grids.

    1. Every FakeQuant but those that are off is frozen; a weight's grid, if not frozen already, is computed once more
       before.
    2. Refuses, by name, values that have no range, and parameters that are NaN or Inf (CalibrationError).

    Contract: PRESERVES: the grids are those that the calibrated program simulates.
    """

    name: ClassVar[str] = "settle-encodings"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CALIBRATED,)
    leaves: ClassVar[Stage | None] = Stage.FINALIZED
    contract: ClassVar[Contract] = Contract.PRESERVES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Settle, then freeze."""
        require_finite_parameters(program)
        require_ranges(program)
        for path in settle(program):
            rewriter.record(path, "grid computed from the weight")
        for node, module in program.fake_quant_nodes():
            if module.mode is not Mode.OFF:
                rewriter.set_mode(str(node.target), Mode.FROZEN)
