"""Give the weights of the first layers fewer bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from fxquant.errors import PassError
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage, input_spec
from fxquant.graph.rewriter import Rewriter
from fxquant.spec import QuantSpec

from .values import check_ops, definition_of, is_layer, is_named, weight_slot


@dataclass(frozen=True)
class NarrowFirstWeights(Pass):
    """Quantize the weights of the layers that read the model's inputs on half of their grid.

    x64 without VNNI adds pairs of u8 x s8 products in 16 bits, which saturate: 2 * 255 * 127 > 32767. The first layer
    is where it hurts most, as its input fills the grid, while others mostly read what a relu left; there is no
    saturation at 7 bits: 2 * 255 * 64 < 32767.

    1. A layer is first if its input depends on a graph input through no other layer.

    Layers whose weight has `bits` or fewer are left alone. Contract: PRESERVES (it only annotates).

    Options:
        bits: width of these weights; 8 changes nothing.
        ops: the operations that are meant, by our name or ONNX operator type.
    """

    name: ClassVar[str] = "narrow-first-weights"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.ASSIGNED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    bits: int = 7
    ops: tuple[str, ...] = ("Conv",)

    def __post_init__(self) -> None:
        check_ops(self.ops, "narrow-first-weights: ops")
        if not 2 <= self.bits <= 8:
            raise PassError("narrow-first-weights: bits", expected="2 to 8", got=str(self.bits))

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Follow the graph inputs as far as the first layers."""
        raw: set[fx.Node] = set()
        for node in program.graph.nodes:
            if node.op != "placeholder" and raw.isdisjoint(node.all_input_nodes):
                continue
            if is_layer(program, node):
                self._narrow(program, rewriter, node)
            else:
                raw.add(node)

    def _narrow(self, program: Program, rewriter: Rewriter, node: fx.Node) -> None:
        definition = definition_of(program, node)
        assert definition is not None
        slot = weight_slot(node, definition)
        spec: QuantSpec | None = None if slot is None else input_spec(node, slot)
        if slot is not None and spec is not None and spec.bits > self.bits and is_named(self.ops, node, definition):
            rewriter.set_input_spec(node, slot, replace(spec, bits=self.bits))  # case 1
