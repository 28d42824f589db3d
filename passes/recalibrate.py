"""Estimate activations' ranges anew, once weights have changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxquant.calibration import calibrate
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage
from fxquant.graph.rewriter import Rewriter


@dataclass(frozen=True)
class Recalibrate(Pass):
    """Calibrate a calibrated program afresh, on the batches of the run: fxquant.calibrate as a pass.

    Behind algorithms that change weights or biases (adaround, correct-bias) the ranges that were found before them are
    those of another network. What is frozen stays, as adaround's weights do. Contract: QUANTIZES.

    Arguments:
        through_quantizers: estimators see what the quantizers before them leave, instead of float activations.
    """

    through_quantizers: bool = False

    name: ClassVar[str] = "recalibrate"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CALIBRATED,)
    leaves: ClassVar[Stage | None] = Stage.CALIBRATED
    contract: ClassVar[Contract] = Contract.QUANTIZES

    @property
    def needs_data(self) -> bool:
        """It always measures."""
        return True

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Record every quantizer that calibration may move, then calibrate."""
        for node, module in program.fake_quant_nodes():
            if not module.mode.is_settled:
                with rewriter.editing(str(node.target), "calibrated afresh"):
                    pass
        data = rewriter.data
        calibrate(program, data.batches, through_quantizers=self.through_quantizers, progress=data.progress)
