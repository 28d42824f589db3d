"""What guards and barriers ask about a program: layers, quantizers, and where a value comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxquant.graph.constants import Constants
from fxquant.graph.program import Program
from fxquant.lowering.encodings import Encodings
from fxquant.ops.base import OpDef, OpTable, Role

LAYER_TYPES = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True)
class Layer:
    """A node that multiplies its input by a weight: its arguments, and the weight's axis of output channels."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    channel_axis: int
    role: Role


@dataclass(frozen=True)
class Scene:
    """One program as it is being lowered."""

    program: Program
    table: OpTable
    constants: Constants
    encodings: Encodings
    _definitions: dict[fx.Node, OpDef | None] = field(default_factory=dict)

    def definition(self, node: fx.Node) -> OpDef | None:
        """The OpDef of a node, if the table knows it."""
        if node not in self._definitions:
            module = self.program.submodule(node) if node.op == "call_module" else None
            self._definitions[node] = self.table.find(node, module)
        return self._definitions[node]

    def role(self, node: fx.Node) -> Role | None:
        """The role of a node; None if the table does not know it."""
        definition = self.definition(node)
        return None if definition is None else definition.role_for(node)

    def layer(self, node: fx.Node) -> Layer | None:
        """`node` as a layer: a convolution, transposed or not, or a product with a weight; else None."""
        definition = self.definition(node)
        position = None if definition is None else definition.weight_for(node)
        if definition is None or position is None or definition.channel_axis is None:
            return None
        if not LAYER_TYPES & set(definition.types_for(node)):
            return None
        bias = _argument(node, definition.bias)
        weight = _argument(node, position)
        others = (arg for index, arg in enumerate(node.args) if index not in (position, definition.bias))
        x = next((arg for arg in others if isinstance(arg, fx.Node)), None)
        if weight is None or x is None:
            return None
        return Layer(node, x, weight, bias, definition.channel_axis(node), definition.role_for(node))

    def is_quantizer(self, node: fx.Node) -> bool:
        """Whether `node` is a FakeQuant or BiasFakeQuant that is on."""
        is_one = self.program.fake_quant(node) is not None or self.program.bias_fake_quant(node) is not None
        return is_one and not self.encodings.is_off(node)

    def is_activation_quantizer(self, node: fx.Node) -> bool:
        """Whether `node` is the FakeQuant of something that is known only when the model runs."""
        return self.is_quantizer(node) and not self.encodings.is_constant_quantizer(node)

    def quantizer_of(self, node: fx.Node) -> fx.Node | None:
        """The FakeQuant that a value comes from, perhaps through grid-preserving operations; None if it has no grid."""
        while not self.is_quantizer(node):
            if self.role(node) is not Role.GRID_PRESERVING or not node.all_input_nodes:
                return None
            node = node.all_input_nodes[0]
        return node

    def is_quantized(self, node: fx.Node) -> bool:
        """Whether a value is on a grid."""
        return self.quantizer_of(node) is not None


def _argument(node: fx.Node, position: int | None) -> fx.Node | None:
    found: Any = None if position is None or position >= len(node.args) else node.args[position]
    return found if isinstance(found, fx.Node) else None
