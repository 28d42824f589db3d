"""What several passes ask of a value: who wants it quantized how, and where its numbers come from."""

from __future__ import annotations

import torch
from torch import fx

from fxquant.errors import ConfigError, nearest
from fxquant.graph.program import Program, input_slots, input_spec, output_spec, value_type
from fxquant.graph.rewriter import Rewriter
from fxquant.ops._emit import argument
from fxquant.ops.base import OpDef, Role
from fxquant.ops.convolution import is_transposed
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


def is_layer(program: Program, node: fx.Node) -> bool:
    """Whether a node multiplies by a weight: a convolution, also a transposed one, or a linear layer."""
    definition = definition_of(program, node)
    if definition is None or definition.role_for(node) is Role.GRID_PRESERVING:  # a table that is looked up
        return False
    return definition.weight_for(node) is not None


def is_named(ops: tuple[str, ...], node: fx.Node, definition: OpDef) -> bool:
    """Whether `ops`, our names of operations or ONNX operator types, name what `node` calls."""
    return definition.name in ops or not set(ops).isdisjoint(definition.types_for(node))


def check_ops(ops: tuple[str, ...], option: str) -> None:
    """Refuse a name that is neither an operation of the table nor an ONNX operator type of one (ConfigError)."""
    accepted = {name for definition in TABLE for name in (definition.name, *definition.onnx_types)}
    for name in ops:
        if name not in accepted:
            raise ConfigError(f"{option}: operation '{name}' is unknown", remedy=nearest(name, accepted))


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


def channel_axis(node: fx.Node, definition: OpDef) -> tuple[int | None, str]:
    """The axis along which an operation's weight may have scales: an index for each output channel; or why none is.

    That of a grouped transposed convolution has out / groups of them along its axis 1, and the bias has out.
    """
    if definition.channel_axis is None:
        return None, "no channel axis"
    if definition.name == "convolution" and is_transposed(node) and argument(node, "groups") > 1:
        return None, "no axis of a grouped transposed convolution's weight has an index for each output channel"
    return definition.channel_axis(node), ""


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
