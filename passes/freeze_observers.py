"""Let no grid move any more: what was observed, and what the weights are now, is what counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.graph.constants import Constants
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage
from fxquant.graph.rewriter import Rewriter
from fxquant.numerics.fake_quant import FakeQuant, Mode


@dataclass(frozen=True)
class FreezeObservers(Pass):
    """Freeze every FakeQuant that has, or can have, a grid.

    1. One whose grid follows its parameter: the grid is computed from the parameter once more.
    2. One that still observes: the grid is computed from what it saw, or from its fixed range.
    3. One that has its grid: it keeps it, be it calibrated or a moving average.
    4. One whose range is learned: the grid is computed from its parameters once more.

    Declines, by name, a FakeQuant that never saw data; it goes on observing. One that is off stays off, and one that
    is frozen as it is. Biases need nothing: their grid is the product of two frozen ones. Leaves the stage as it is.
    Contract: QUANTIZES (case 2 begins to quantize; otherwise eval outputs do not change).
    """

    name: ClassVar[str] = "freeze-observers"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.INSERTED, Stage.CALIBRATED)
    contract: ClassVar[Contract] = Contract.QUANTIZES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Visit every FakeQuant once, at the node that owns its range."""
        constants = Constants(program)
        for node, module in program.fake_quant_nodes():
            owns = node.kwargs.get("observe", True) and (len(node.args) < 2 or node.args[1])
            if not owns or module.mode in (Mode.FROZEN, Mode.OFF):
                continue
            reason = _settle(rewriter, node, module, constants)
            if reason is None:
                rewriter.set_mode(str(node.target), Mode.FROZEN)
            else:
                rewriter.miss(node, f"{node.name} not frozen: {reason}")


def _settle(rewriter: Rewriter, node: fx.Node, module: FakeQuant, constants: Constants) -> str | None:
    """Compute the grid that is to stay; the reason if there is none."""
    source, path = node.args[0], str(node.target)
    assert isinstance(source, fx.Node)
    if module.mode is Mode.LEARN:  # case 4
        rewriter.sync(path)
        return None
    if module.follows:  # case 1
        rewriter.compute_encoding(path, follows=constants.tensor(source).to(module.scale.device))
        return None
    sees = module.estimator.has_range or module.spec.fixed is not None
    if module.mode is Mode.OBSERVE and sees:  # case 2
        rewriter.compute_encoding(path)
        return None
    return None if module.has_encoding else f"{source.name} has no range: it saw no data"
