"""Which nodes integer kernels can run, as far as the graph alone says: the colours of a drawing."""

from __future__ import annotations

from enum import Enum

from torch import fx

from fxquant.graph.constants import Constants
from fxquant.graph.program import Program, input_slots, input_spec, value_type
from fxquant.numerics.fake_quant import BiasFakeQuant, FakeQuant, Mode
from fxquant.ops.base import OpDef, Role
from fxquant.ops.table import TABLE
from fxquant.spec import Target


class Island(Enum):
    """What a node is in a quantized graph."""

    INTEGER = "integer"  # reads codes and writes codes
    FLOAT = "float"
    QUANTIZER = "quantizer"
    CONSTANT = "constant"  # a parameter or buffer, or what is computed from such alone
    BOUNDARY = "input or output"
    INDEX = "integers, booleans and sizes"


_NEVER_INTEGER = (Role.FLOAT, Role.INDEX)
_PRODUCTS = (Role.WEIGHTED, Role.COMPUTE)


def islands(program: Program) -> dict[fx.Node, Island]:
    """The island of every node.

    1. A node is INTEGER if all its float inputs come from quantizers, all that reads it is quantizers, and its
       operation has an integer kernel; the parts of a split are read by quantizers in its stead.
    2. An absorbed activation between a layer and its quantizer belongs to the layer.
    3. Where the target fuses float ends, a layer, product or sum of codes is INTEGER whatever its bias and whoever
       reads it; so are a sum of what a layer gives and codes, and an activation, that alone read such a node.
    4. What is quantized in blocks, or by a quantizer that is off, counts as float.

    Whether a runtime fuses a node is for check_parity to say, which reads the graph that ran.
    """
    return IslandMap(program).found


class IslandMap:
    """What the graph says of each node: its island (`found`), and whether it would write codes if it read some
    (`writes`).
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.constants = Constants(program)
        self.found = {node: self._kind(node) for node in program.graph.nodes}
        self.writes = self._writes_codes()
        for node, island in self.found.items():
            if island is Island.FLOAT and self._is_integer(node):
                self.found[node] = Island.INTEGER

    def float_inputs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that are not codes, but a bias that the target's kernels take in float.

        An activation has one input: what a live batch norm undoes in training is none in eval mode.
        """
        definition = self._definition(node)
        position = None if definition is None or not self.program.target.fuses_float_ends else definition.bias
        bias = None if position is None or position >= len(node.args) else node.args[position]
        slots = input_slots(node)[:1] if self._role(node) is Role.ACTIVATION else input_slots(node)
        return [slot for slot in slots if slot is not bias and self._is_float(slot)]

    def _kind(self, node: fx.Node) -> Island:
        if node.op in ("placeholder", "output"):
            return Island.BOUNDARY
        if node.op == "call_module" and isinstance(self.program.submodule(node), (FakeQuant, BiasFakeQuant)):
            return Island.QUANTIZER
        if self.constants.is_constant(node):
            return Island.CONSTANT
        if self._role(node) is Role.INDEX:
            return Island.INDEX
        found = value_type(node)
        return Island.FLOAT if found is None or found.is_float else Island.INDEX

    def _definition(self, node: fx.Node) -> OpDef | None:
        if node.op not in ("call_function", "call_module"):
            return None
        return TABLE.find(node, self.program.submodule(node) if node.op == "call_module" else None)

    def _role(self, node: fx.Node) -> Role | None:
        definition = self._definition(node)
        if definition is None:
            return None
        return Role.WEIGHTED if has_foreign_kernel(self.program, node, definition) else definition.role_for(node)

    def _is_float(self, slot: fx.Node) -> bool:
        """Whether a node gives floats: a quantizer gives codes, and so does a split of codes."""
        if self.found[slot] is Island.QUANTIZER:
            module = self.program.fake_quant(slot)
            return module is not None and (module.spec.granularity.block is not None or module.mode is Mode.OFF)
        if value_type(slot) is None:
            return self._role(slot) is Role.GRID_PRESERVING and self.found[slot] is not Island.INTEGER
        return self.found[slot] is not Island.INDEX

    def _writes_codes(self) -> set[fx.Node]:
        writes: set[fx.Node] = set()
        for node in reversed(list(self.found)):
            if node.users and all(self._takes_codes(node, user, writes) for user in node.users):
                writes.add(node)
        return writes

    def _takes_codes(self, node: fx.Node, user: fx.Node, writes: set[fx.Node]) -> bool:
        """Whether a reader makes codes of what `node` gives: itself, or what reads it."""
        if self.found[user] is Island.QUANTIZER:
            module = self.program.fake_quant(user)
            return module is None or module.mode is not Mode.OFF
        is_part = value_type(node) is None and self._role(node) is Role.GRID_PRESERVING
        return user in writes and (is_part or self._role(user) is Role.ACTIVATION)

    def _is_integer(self, node: fx.Node) -> bool:
        role, fuses = self._role(node), self.program.target.fuses_float_ends
        inputs = [slot for slot in input_slots(node) if value_type(slot) is None or is_float_value(slot)]
        if role is None or role in _NEVER_INTEGER or not inputs:
            return False
        missing = self.float_inputs(node)
        if not missing:
            return node in self.writes or (fuses and role in _PRODUCTS)
        ahead = missing[0]
        if len(missing) > 1 or self.found[ahead] is not Island.INTEGER or not self._ends_in_sums(ahead):
            return False
        if role is Role.ACTIVATION:
            return node in self.writes or (fuses and len(ahead.users) == 1)
        return fuses and role is Role.COMPUTE and len(inputs) == 2 and len(ahead.users) == 1

    def _ends_in_sums(self, node: fx.Node) -> bool:
        """Whether a kernel's sums are what `node` gives, so that more can be done to them before they are codes."""
        return self._role(node) in (*_PRODUCTS, Role.ACTIVATION)


def has_foreign_kernel(program: Program, node: fx.Node, definition: OpDef) -> bool:
    """Whether a layer for which onnxruntime has no integer kernel is quantized, for a target that has one."""
    position = definition.weight_for(node)
    if program.target is Target.ONNXRUNTIME_X64 or position is None or definition.role_for(node) is not Role.FLOAT:
        return False
    slots = enumerate(input_slots(node))
    return any(source is node.args[position] and input_spec(node, slot) is not None for slot, source in slots)


def is_float_value(node: fx.Node) -> bool:
    """Whether a node gives one float tensor."""
    found = value_type(node)
    return found is not None and found.is_float
