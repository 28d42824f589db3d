"""What several passes ask of a value: who wants it quantized how, and where its numbers come from."""

from __future__ import annotations

import torch
from torch import fx

from fxquant.graph.program import Program, input_slots, input_spec, output_spec, value_type
from fxquant.graph.rewriter import Rewriter
from fxquant.ops.base import OpDef, Role
from fxquant.ops.table import TABLE
from fxquant.spec import QuantSpec

INTEGER_ROLES = (Role.WEIGHTED, Role.COMPUTE, Role.CONCAT, Role.FIXED_RANGE)


def definition_of(program: Program, node: fx.Node) -> OpDef | None:
    """The operation that a node calls, or None if the table does not know it."""
    module = program.submodule(node) if node.op == "call_module" else None
    return TABLE.find(node, module)


def role_of(program: Program, node: fx.Node) -> Role | None:
    """The role of the operation that a node calls."""
    definition = definition_of(program, node)
    return None if definition is None else definition.role_for(node)


def makes_codes(program: Program, value: fx.Node) -> bool:
    """Whether a value will come from an integer kernel, directly or through activations and what preserves grids."""
    role = role_of(program, value)
    while role in (Role.ACTIVATION, Role.GRID_PRESERVING) and isinstance(value.args[0], fx.Node):
        value = value.args[0]
        role = role_of(program, value)
    return role in INTEGER_ROLES or value.target is torch.ops.aten.silu.default  # decompose-silu takes it apart


def is_float_value(node: fx.Node) -> bool:
    """Whether a node's output is one tensor of a floating dtype."""
    found = value_type(node)
    return found is not None and found.is_float


def arg_slot(node: fx.Node, position: int) -> int | None:
    """The input slot (see `input_slots`) of the positional argument at `position`, or None if it is no node."""
    if position >= len(node.args) or not isinstance(node.args[position], fx.Node):
        return None
    before: list[fx.Node] = []
    fx.node.map_arg(node.args[:position], before.append)
    return len(before)


def weight_slot(node: fx.Node, definition: OpDef) -> int | None:
    """The input slot of an operation's weight at `node`, or None if it has none there."""
    position = definition.weight_for(node)
    return None if position is None else arg_slot(node, position)


def wanted_specs(value: fx.Node) -> dict[QuantSpec, list[str]]:
    """Each spec that is wanted of a value, with the names of those who want it: itself for its output spec."""
    wanted: dict[QuantSpec, list[str]] = {}
    own = output_spec(value)
    if own is not None:
        wanted.setdefault(own, []).append(value.name)
    for user in value.users:
        for slot, node in enumerate(input_slots(user)):
            spec = input_spec(user, slot) if node is value else None
            if spec is not None:
                wanted.setdefault(spec, []).append(user.name)
    return wanted


def set_value_spec(rewriter: Rewriter, value: fx.Node, old: QuantSpec, new: QuantSpec) -> None:
    """Change one spec of a value, for itself and for every consumer that wants it."""
    if output_spec(value) == old:
        rewriter.set_output_spec(value, new)
    for user in value.users:
        for slot, node in enumerate(input_slots(user)):
            if node is value and input_spec(user, slot) == old:
                rewriter.set_input_spec(user, slot, new)


def is_parameter(node: fx.Node) -> bool:
    """Whether a node reads a parameter or buffer."""
    return node.op == "get_attr"


def parameter_of(program: Program, node: fx.Node, position: int | None) -> tuple[fx.Node, torch.Tensor] | None:
    """The get_attr node at an argument position and the tensor that it reads, or None if there is another thing."""
    if position is None or position >= len(node.args):
        return None
    source = node.args[position]
    if not isinstance(source, fx.Node) or not is_parameter(source):
        return None
    return source, program.tensor(source)
