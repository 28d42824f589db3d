"""What the plan asks of a program: definitions, grids, constants."""

from __future__ import annotations

from torch import fx

from fxquant.graph.constants import Constants
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.numerics.live_batch_norm import LiveBatchNorm
from fxquant.ops.base import OpDef, OpTable, Role


class Facts:
    """One program, as its FakeQuants are now."""

    def __init__(self, program: Program, table: OpTable) -> None:
        self.program = program
        self._table = table
        self._constants = Constants(program)

    def definition(self, node: fx.Node) -> OpDef | None:
        """The OpDef of a node, if the table knows it."""
        module = self.program.submodule(node) if node.op == "call_module" else None
        return self._table.find(node, module)

    def role(self, node: fx.Node) -> Role | None:
        """The role of a node; None if the table does not know it."""
        definition = self.definition(node)
        return None if definition is None else definition.role_for(node)

    def grid_of(self, node: fx.Node) -> FakeQuant | None:
        """The FakeQuant that a value is on the grid of: its own, or in front of operations that only move codes."""
        while True:
            module = self.program.fake_quant(node)
            if module is not None:
                return module if is_on(module) else None
            if self.role(node) is not Role.GRID_PRESERVING or not node.args or not isinstance(node.args[0], fx.Node):
                return None
            node = node.args[0]

    def why_live(self, node: fx.Node) -> str:
        """Why a live batch norm is more than the identity now; "" if it is not."""
        module = self.program.submodule(node) if node.op == "call_module" else None
        is_live = isinstance(module, LiveBatchNorm) and module.training
        return f"{node.name} normalises by its batch in training mode" if is_live else ""

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a value is a parameter, or computed from parameters alone."""
        return self._constants.is_constant(node)

    def is_constant_quantizer(self, node: fx.Node) -> bool:
        """Whether a node is the FakeQuant of a constant."""
        return self.program.fake_quant(node) is not None and self.is_constant(source_of(node))


def is_on(module: FakeQuant) -> bool:
    """Whether a FakeQuant quantizes."""
    return module.mode.quantizes


def source_of(node: fx.Node) -> fx.Node:
    """A node's first argument, a node."""
    source = node.args[0]
    assert isinstance(source, fx.Node), node.format_node()
    return source


def spelled(node: fx.Node, definition: OpDef | None) -> str:
    """What a node computes, in words."""
    return f"'{node.name}' ({node.target})" if definition is None else definition.name.replace("_", " ")
