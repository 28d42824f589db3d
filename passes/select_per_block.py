"""Give weights one scale for each block along the axis that a layer sums over.

w_hat[o, i] = code[o, i] * scale[o, i // block]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from fxquant.errors import PassError, nearest
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage, input_slots, input_spec, value_type
from fxquant.graph.rewriter import Rewriter
from fxquant.ops.base import OpDef
from fxquant.ops.kernels import ProductKernel
from fxquant.ops.table import TABLE
from fxquant.spec import Granularity

from .values import definition_of, weight_slot


@dataclass(frozen=True)
class SelectPerBlock(Pass):
    """Make the weight specs of convolutions and linear layers block-wise, along their weights' input axis.

    1. The axis is the one that the operation sums over: 1 for linear [out, in] and for a convolution's input channels
       [out, in, *kernel], 0 for a product x w with w: [in, out].
    2. A weight whose axis blocks do not fill keeps its granularity (a depthwise convolution's, a first layer's of three
       channels), with the reason.
    3. So does that of an operation without an integer kernel for this form (a transposed convolution), and a table that
       is only looked up.

    No integer kernel of onnxruntime takes blocks: such layers are float islands there, whose weights are stored in 8
    bits, and their biases stay in float. Export needs opset 21. Run it behind select-per-channel, if that is there:
    what declines is then per channel. Contract: PRESERVES (it only annotates).

    Options:
        ops: names of the operations that are meant; empty for all that have a weight.
        block: how many elements share a scale.
    """

    name: ClassVar[str] = "select-per-block"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.ASSIGNED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    ops: tuple[str, ...] = ()
    block: int = 32

    def __post_init__(self) -> None:
        Granularity(0, self.block)

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Change every weight spec that is not block-wise already."""
        self._require_known_operations()
        for node in program.graph.nodes:
            definition = definition_of(program, node)
            if definition is None or (self.ops and definition.name not in self.ops):
                continue
            slot = weight_slot(node, definition)
            spec = None if slot is None else input_spec(node, slot)
            if slot is None or spec is None or spec.granularity.block is not None:
                continue
            weight = input_slots(node)[slot]
            found = self._granularity(node, definition, weight)
            if isinstance(found, str):
                rewriter.miss(node, f"weight {weight.name} stays {spec.granularity}: {found}")
            else:
                rewriter.set_input_spec(node, slot, replace(spec, granularity=found))

    def _granularity(self, node: fx.Node, definition: OpDef, weight: fx.Node) -> Granularity | str:
        """The blocks of a weight, or why it has none."""
        kernel, found = definition.kernel, value_type(weight)
        if not isinstance(kernel, ProductKernel) or found is None:
            return f"{definition.name} sums over none of its axes"  # case 3
        if reason := kernel.declines(node):
            return reason  # case 3
        axis = kernel.right_axis % len(found.shape)  # case 1
        size = found.shape[axis]
        if not isinstance(size, int) or size % self.block:
            return f"blocks of {self.block} do not fill axis {axis} of {list(found.shape)}"  # case 2
        return Granularity(axis, self.block)

    def _require_known_operations(self) -> None:
        for name in self.ops:
            if name not in TABLE.names():
                raise PassError(
                    f"{self.name}: operation '{name}' is unknown",
                    expected="the name of an operation with a weight",
                    remedy=nearest(name, TABLE.names()),
                )
