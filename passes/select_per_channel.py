"""Give weights one scale for each output channel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage, input_slots, input_spec
from fxquant.graph.rewriter import Rewriter
from fxquant.spec import PER_TENSOR, Granularity

from .values import definition_of, weight_slot


@dataclass(frozen=True)
class SelectPerChannel(Pass):
    """Make the weight specs of convolutions and linear layers per channel.

    1. The axis is the operation's: 0, or 1 for a transposed convolution. onnxruntime ignores the axis of a
       DequantizeLinear, so no other axis is ever chosen.
    2. A layer whose operation has no channel axis for this form is left per tensor, with the reason.

    Contract: PRESERVES (it only annotates).

    Options:
        ops: names of the operations that are meant; empty for all that have a weight.
    """

    name: ClassVar[str] = "select-per-channel"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.ASSIGNED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    ops: tuple[str, ...] = ()

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Narrow every weight spec that is per tensor."""
        for node in program.graph.nodes:
            definition = definition_of(program, node)
            if definition is None or (self.ops and definition.name not in self.ops):
                continue
            slot = weight_slot(node, definition)
            spec = None if slot is None else input_spec(node, slot)
            if slot is None or spec is None or spec.granularity != PER_TENSOR:
                continue
            if not spec.symmetric:
                rewriter.miss(node, f"weight {input_slots(node)[slot].name} stays per tensor: its spec is asymmetric")
            elif definition.channel_axis is None:
                rewriter.miss(
                    node, f"weight {input_slots(node)[slot].name} stays per tensor: no channel axis"
                )  # case 2
            else:
                axis = definition.channel_axis(node)
                rewriter.set_input_spec(node, slot, replace(spec, granularity=Granularity(axis)))  # case 1
