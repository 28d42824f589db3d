"""Units: the layers of a program as a placement rule can name them, each with the quantizers that belong to it.

1. A weight, or another constant, belongs to the first operation that reads it.
2. An activation belongs to the operation that computes it, also where a relu or clip in front of the quantizer stands
   between them (it is absorbed by the grid); an input is a unit of its own.
3. A quantizer that several values share belongs to the value that owns its range.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.ops.base import OpDef, Role
from fxquant.ops.table import TABLE


@dataclass(frozen=True)
class Unit:
    """One operation and the quantizers that are its own.

    Arguments:
        node: the operation; the name of the unit.
        weights, activations: the nodes that call its quantizers.
        modules: those quantizers.
    """

    node: fx.Node
    weights: tuple[fx.Node, ...]
    activations: tuple[fx.Node, ...]
    modules: tuple[FakeQuant, ...]

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name

    @property
    def first_reads(self) -> list[fx.Node]:
        """The nodes that compute otherwise when its quantizers are switched, the first of them among these."""
        return [*self.activations, *(user for weight in self.weights for user in weight.users)]


def units_of(program: Program) -> list[Unit]:
    """The units of a program's quantizers that are not off, in graph order."""
    nodes_of = callers(program)
    found: dict[fx.Node, list[FakeQuant]] = {}
    for module, nodes in nodes_of.items():
        place = reader(program, nodes[0]) if module.follows else _source(program, nodes[0])
        found.setdefault(place, []).append(module)

    def quantizing(modules: list[FakeQuant], weights: bool) -> tuple[fx.Node, ...]:
        return tuple(node for module in modules if module.follows is weights for node in nodes_of[module])

    return [
        Unit(node, quantizing(found[node], True), quantizing(found[node], False), tuple(found[node]))
        for node in program.graph.nodes
        if node in found
    ]


def callers(program: Program) -> dict[FakeQuant, list[fx.Node]]:
    """Each quantizer that is not off, with the nodes that call it, the one that owns its range first."""
    found: dict[FakeQuant, list[fx.Node]] = {}
    for node, module in program.fake_quant_nodes():
        if module.mode is not Mode.OFF:
            found.setdefault(module, []).append(node)
    for nodes in found.values():
        nodes.sort(key=lambda node: not node.kwargs.get("observe", True))
    return found


def reader(program: Program, quantizer: fx.Node) -> fx.Node:
    """The first operation that reads a quantizer's value; biases only take their scale from it."""
    users = [user for user in quantizer.users if program.bias_fake_quant(user) is None]
    return users[0] if users else quantizer


def definition_of(program: Program, node: fx.Node) -> OpDef | None:
    """What the operation table knows about a node."""
    return TABLE.find(node, program.submodule(node) if node.op == "call_module" else None)


def _source(program: Program, quantizer: fx.Node) -> fx.Node:
    """What computes the value that `quantizer` quantizes (case 2)."""
    node = quantizer.args[0]
    assert isinstance(node, fx.Node)
    while True:
        definition = definition_of(program, node)
        before = node.args[0] if node.args else None
        if definition is None or definition.role_for(node) is not Role.ACTIVATION or not isinstance(before, fx.Node):
            return node
        if program.fake_quant(before) is not None or len(before.users) != 1:
            return node
        node = before
