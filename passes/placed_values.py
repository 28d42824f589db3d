"""A program as placement sees it: its values, the operations that make and read them, and who only moves codes."""

from __future__ import annotations

import operator

import torch
from torch import fx

from fxquant.graph.constants import Constants
from fxquant.graph.program import Program, input_slots, value_type
from fxquant.ops._arguments import bind
from fxquant.ops.base import OpDef, Role

from .values import arg_slot, definition_of, is_float_value

PADS = ("pad", "constant_pad", "reflection_pad", "replication_pad")


class PlacedValues:
    """The values that a quantizer could stand behind: float32 tensors that depend on the model's inputs.

    A split's parts are values, made by the split. What only moves codes (reshape, pooling maximum, zero padding ...)
    passes on the codes of its source; the owner of a value is the first one on that way back.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._constants = Constants(program)
        self.values = [node for node in program.graph.nodes if self.is_value(node)]
        calls = (node for node in program.graph.nodes if node.op in ("call_function", "call_module"))
        self.operations = [node for node in calls if "type" in node.meta and not self._constants.is_constant(node)]

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a tensor depends on parameters alone."""
        return self._constants.is_constant(node)

    def is_value(self, node: fx.Node) -> bool:
        """Whether a quantizer could stand behind what `node` gives."""
        kind = value_type(node)
        if kind is None or kind.dtype is not torch.float32 or not node.users or self._constants.is_constant(node):
            return False
        return node.op == "placeholder" or any("type" in source.meta for source in node.all_input_nodes)

    def operation(self, value: fx.Node) -> fx.Node:
        """The node whose operation makes a value: the value itself, or what it is a part of."""
        if value.target is operator.getitem and isinstance(value.args[0], fx.Node):
            return value.args[0]
        return value

    def definition(self, node: fx.Node) -> OpDef | None:
        """The operation that a node calls; None for inputs and for what the table does not know."""
        return definition_of(self.program, node) if node.op in ("call_function", "call_module") else None

    def types(self, node: fx.Node) -> tuple[str, ...]:
        """The ONNX operator types of the operation that `node` calls."""
        definition = self.definition(node)
        return () if definition is None else definition.types_for(node)

    def moves_codes(self, value: fx.Node) -> bool:
        """Whether the operation that makes a value only moves what it reads."""
        operation = self.operation(value)
        definition = self.definition(operation)
        if definition is None:
            return False
        if definition.name in PADS:
            return bind(operation).get("value") in (None, 0)
        return definition.role_for(operation) is Role.GRID_PRESERVING

    def source(self, value: fx.Node) -> fx.Node | None:
        """The value whose codes `value` passes on, if it does."""
        if not self.moves_codes(value):
            return None
        source = self.operation(value).args[0]
        return source if isinstance(source, fx.Node) and self.is_value(source) else None

    def owner(self, value: fx.Node) -> fx.Node:
        """The value whose codes these are."""
        while (source := self.source(value)) is not None:
            value = source
        return value

    def parameter_slots(self, node: fx.Node) -> dict[str, int]:
        """The input slots of an operation's "weight" and "bias", where they are float32 constants."""
        found = {"weight": self._slot(node, "weight"), "bias": self._slot(node, "bias")}
        return {name: slot for name, slot in found.items() if slot is not None}

    def inputs(self, node: fx.Node) -> list[tuple[int, fx.Node]]:
        """The slots of the float tensors, constants too, that an operation reads besides weight and bias."""
        parameters = self.parameter_slots(node).values()
        slots = enumerate(input_slots(node))
        return [(slot, value) for slot, value in slots if slot not in parameters and is_float_value(value)]

    def only_reader(self, value: fx.Node) -> fx.Node | None:
        """The operation that alone reads a value, once; None if several do, or the model's output."""
        readers = [user for user in value.users for node in input_slots(user) if node is value]
        return readers[0] if len(readers) == 1 and readers[0].op in ("call_function", "call_module") else None

    def _slot(self, node: fx.Node, name: str) -> int | None:
        definition = self.definition(node)
        if definition is None:
            return None
        position = definition.weight_for(node) if name == "weight" else definition.bias
        if position is None and definition.role_for(node) is not Role.WEIGHTED:
            position = _position(node, name)
        slot = None if position is None else arg_slot(node, position)
        value = None if slot is None else input_slots(node)[slot]
        kind = None if value is None else value_type(value)
        is_parameter = value is not None and kind is not None and kind.dtype is torch.float32
        return slot if is_parameter and value is not None and self._constants.is_constant(value) else None


def _position(node: fx.Node, name: str) -> int | None:
    """Where an ATen operation has its argument called `name`: layer_norm's weight."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    names = [argument.name for argument in node.target._schema.arguments]
    return names.index(name) if name in names else None
