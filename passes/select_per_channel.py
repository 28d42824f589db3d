"""Give weights one scale for each output channel."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage, input_slots, input_spec
from fxquant.graph.rewriter import Rewriter
from fxquant.spec import PER_TENSOR, Granularity, SpecOverride

from .values import channel_axis, check_ops, definition_of, is_named, weight_slot


@dataclass(frozen=True)
class SelectPerChannel(Pass):
    """Make the weight specs of convolutions and linear layers per channel.

    1. The axis is the operation's: 0, or 1 for a transposed convolution. onnxruntime ignores the axis of a
       DequantizeLinear, so no other axis is ever chosen.
    2. A layer whose operation has no channel axis for this form is left per tensor, with the reason: a grouped
       transposed convolution, whose weight has out / groups indices along its axis 1.
    3. So are the nodes of `except_nodes`.

    Contract: PRESERVES (it only annotates).

    Options:
        ops: the operations that are meant, by our name or ONNX operator type; empty for all that have a weight.
        change: what else becomes of such a weight's spec (a runtime may want unsigned weights, but signed ones where
            they are per channel).
        except_nodes: names of nodes whose weights stay per tensor (case 3); an unknown one is refused.
    """

    name: ClassVar[str] = "select-per-channel"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.ASSIGNED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    ops: tuple[str, ...] = ()
    change: SpecOverride = field(default=SpecOverride())
    except_nodes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_ops(self.ops, "select-per-channel: ops")

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Narrow every weight spec that is per tensor."""
        kept = {program.node(name) for name in self.except_nodes}
        for node in program.graph.nodes:
            definition = definition_of(program, node)
            if definition is None or node in kept or (self.ops and not is_named(self.ops, node, definition)):
                continue
            slot = weight_slot(node, definition)
            spec = None if slot is None else input_spec(node, slot)
            if slot is None or spec is None or spec.granularity != PER_TENSOR:
                continue
            changed = self.change.apply(spec)
            if not changed.symmetric:
                rewriter.miss(node, f"weight {input_slots(node)[slot].name} stays per tensor: its spec is asymmetric")
                continue
            axis, reason = channel_axis(node, definition)
            if axis is None:
                rewriter.miss(node, f"weight {input_slots(node)[slot].name} stays per tensor: {reason}")  # case 2
            else:
                rewriter.set_input_spec(node, slot, replace(changed, granularity=Granularity(axis)))  # case 1
