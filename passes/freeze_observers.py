"""Let no grid move any more: what was observed, and what the weights are now, is what counts."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.calibration import hold
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage
from fxquant.graph.rewriter import Rewriter
from fxquant.numerics.fake_quant import FakeQuant, Mode


@dataclass(frozen=True)
class FreezeObservers(Pass):
    """Freeze every FakeQuant that has, or can have, a grid.

    1. One whose grid follows its parameter: the grid is computed from the parameter once more, and raised where the
       parameter's bias needs it, as finalize would. In front of a live batch norm whose gamma is nearly 0 the grid also
       covers the weight that training computes with (numerics/live_batch_norm.py): it could not be trained otherwise.
    2. One that still observes: the grid is computed from what it saw, or from its fixed range.
    3. One that has its grid: it keeps it, be it calibrated or a moving average.
    4. One whose range is learned: the grid is computed from its parameters once more, and a weight's raised where its
       bias needs it.

    Declines, by name, a FakeQuant that never saw data; it goes on observing. One that is off stays off, and one that
    is frozen as it is. Biases need nothing: their grid is the product of two frozen ones. Leaves the stage as it is.
    Contract: QUANTIZES (case 2 begins to quantize; otherwise eval outputs do not change, but behind such a gamma).
    """

    name: ClassVar[str] = "freeze-observers"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.INSERTED, Stage.CALIBRATED)
    contract: ClassVar[Contract] = Contract.QUANTIZES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Settle all grids first: those of weights depend on those of activations, by way of the biases."""
        moving = [(node, module) for node, module in program.fake_quant_nodes() if _moves(node, module)]
        reasons = {node: _observed(rewriter, node, module) for node, module in moving}
        with ExitStack() as stack:
            for path in dict.fromkeys(str(node.target) for node, module in moving if _is_computed(module)):
                stack.enter_context(rewriter.editing(path, "grid computed once more"))
            if moving:
                hold(program)
        for node, _ in moving:
            if (reason := reasons[node]) is None:
                rewriter.set_mode(str(node.target), Mode.FROZEN)
            else:
                rewriter.miss(node, f"{node.name} not frozen: {reason}")


def _moves(node: fx.Node, module: FakeQuant) -> bool:
    """Whether this node owns a range that is still to be frozen."""
    owns = node.kwargs.get("observe", True) and (len(node.args) < 2 or node.args[1])
    return bool(owns) and not module.mode.is_settled


def _is_computed(module: FakeQuant) -> bool:
    """Cases 1 and 4."""
    return module.follows or module.mode is Mode.LEARN


def _observed(rewriter: Rewriter, node: fx.Node, module: FakeQuant) -> str | None:
    """Case 2: compute the grid from what was seen; the reason if there will be none."""
    if _is_computed(module):
        return None
    if module.mode is Mode.OBSERVE and (module.estimator.has_range or module.spec.fixed is not None):
        rewriter.compute_encoding(str(node.target))
        return None
    return None if module.has_encoding else f"{node.args[0]} has no range: it saw no data"
