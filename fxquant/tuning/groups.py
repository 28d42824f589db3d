"""Groups: operations whose precision is chosen together, because what they read is quantized once for all of them.

A value has one quantizer on runtimes that merge two of them, and its precision is its readers' affair. So operations
that read one value are one group, and an operation that reads several values joins the readers of them all: a residual
sum and the convolution beside it, the readers of a concatenation's inputs. What only passes a value on (a relu, a
maximum pooling, a reshape, a split) goes with those who read it behind. A value that no operation reads, the program's
output, belongs to the operation that makes it; so does, for the time being, one whose readers are all in float.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from torch import fx

from fxquant.graph.constants import Constants
from fxquant.graph.program import Program, input_slots, input_spec, output_spec, value_type
from fxquant.ops._emit import argument
from fxquant.ops.base import OpDef, Role
from fxquant.ops.convolution import is_transposed
from fxquant.ops.table import TABLE
from fxquant.spec import Granularity, QuantSpec

FOLLOWERS = (Role.ACTIVATION, Role.GRID_PRESERVING)
Element = tuple[str, Hashable]


@dataclass(frozen=True)
class Operation:
    """One operation that has a quantized input or weight under the config.

    Arguments:
        name: of its node.
        activation_bits: of what it reads, as the config has it; None if it reads nothing quantized.
        weight: the spec of its weight, as the config has it; None if it has none.
        channel_axis: of a scale for each output channel; None where there is no such axis.
        readers: the group that reads what it gives, by its index; None if no operation does.
    """

    name: str
    activation_bits: int | None
    weight: QuantSpec | None
    channel_axis: int | None
    readers: int | None

    @property
    def granularity(self) -> Granularity | None:
        """Of its weight, under the config."""
        return None if self.weight is None else self.weight.granularity


@dataclass(frozen=True)
class Group:
    """Operations whose precision is chosen together, in graph order; `followers` are the relus and clips among them."""

    operations: tuple[Operation, ...]
    followers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The first operation's, and how many more there are."""
        more = len(self.operations) - 1
        return self.operations[0].name + (f" +{more}" if more else "")

    @property
    def has_weights(self) -> bool:
        """Without any, a candidate says nothing but how wide its activations are."""
        return any(item.weight is not None for item in self.operations)

    @property
    def names(self) -> tuple[str, ...]:
        """Of its operations."""
        return tuple(item.name for item in self.operations)


def definition_of(program: Program, node: fx.Node) -> OpDef | None:
    """The operation that a node calls, if the table knows it."""
    module = program.submodule(node) if node.op == "call_module" else None
    return TABLE.find(node, module)


def find_groups(assigned: Program, inserted: Program) -> tuple[Group, ...]:
    """The groups of a program.

    Arguments:
        assigned: right after the pass that assigns specs.
        inserted: the same program, with FakeQuants.
    """
    finding = _Finding(assigned)
    finding.join()
    return tuple(finding.groups(inserted))


class _Finding:
    """A union of operations, as readers, with values."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.constants = Constants(program)
        self.parents: dict[Element, Element] = {}
        self.readers = [node for node in program.graph.nodes if any(True for _ in self._wanted(node))]
        self.owners: set[fx.Node] = set()

    def join(self) -> None:
        """Join readers with what they read, followers with what they pass on, and outputs with their makers."""
        for node in self.readers:
            for value in self._read(node):
                self._join(("read", node), ("value", value))
            if self._is_follower(node):
                for value in _results(node):
                    self._join(("read", node), ("value", value))
        computed = {self._root(("read", node)) for node in self.readers if not self._is_follower(node)}
        for node in self.readers:
            is_read = self._root(("value", node)) in computed
            if not self._is_follower(node) and output_spec(node) is not None and not is_read:
                self.owners.add(node)
        for node in self.owners:
            self._join(("read", node), ("value", node))

    def groups(self, inserted: Program) -> Iterator[Group]:
        """Groups with an operation in them, in the order of their first ones."""
        members: dict[Element, list[fx.Node]] = {}
        for node in self.readers:
            members.setdefault(self._root(("read", node)), []).append(node)
        computing = {root: nodes for root, nodes in members.items() if not all(map(self._is_follower, nodes))}
        numbers = {root: number for number, root in enumerate(computing)}
        for nodes in computing.values():
            operations = (self._operation(node, inserted, numbers) for node in nodes if not self._is_follower(node))
            relus = (node.name for node in nodes if self._role(node) is Role.ACTIVATION)
            yield Group(tuple(operations), tuple(relus))

    def _operation(self, node: fx.Node, inserted: Program, numbers: dict[Element, int]) -> Operation:
        bits = [spec.bits for value, spec in self._wanted(node) if not self.constants.is_constant(value)]
        twin = inserted.node(node.name)
        definition = definition_of(inserted, twin)
        position = None if definition is None else definition.weight_for(twin)
        weight = None if position is None else twin.args[position]
        quant = inserted.fake_quant(weight) if isinstance(weight, fx.Node) else None
        axis = None if definition is None else _channel_axis(twin, definition)
        readers = None if node in self.owners else numbers.get(self._root(("value", node)))
        return Operation(node.name, bits[0] if bits else None, None if quant is None else quant.spec, axis, readers)

    def _wanted(self, node: fx.Node) -> Iterator[tuple[fx.Node, QuantSpec]]:
        for slot, value in enumerate(input_slots(node)):
            spec = input_spec(node, slot)
            if spec is not None:
                yield value, spec

    def _read(self, node: fx.Node) -> Iterator[fx.Node]:
        return (value for value, _ in self._wanted(node) if not self.constants.is_constant(value))

    def _role(self, node: fx.Node) -> Role | None:
        definition = definition_of(self.program, node)
        return None if definition is None else definition.role_for(node)

    def _is_follower(self, node: fx.Node) -> bool:
        return self._role(node) in FOLLOWERS

    def _root(self, element: Element) -> Element:
        while (parent := self.parents.get(element, element)) != element:
            element = parent
        return element

    def _join(self, one: Element, other: Element) -> None:
        self.parents[self._root(one)] = self._root(other)


def _results(node: fx.Node) -> list[fx.Node]:
    """What a node gives: itself, or the parts of a split."""
    return [node] if value_type(node) is not None else list(node.users)


def _channel_axis(node: fx.Node, definition: OpDef) -> int | None:
    """The axis of a weight that has an index for each output channel, if there is one."""
    if definition.channel_axis is None:
        return None
    if definition.name == "convolution" and is_transposed(node) and argument(node, "groups") > 1:
        return None
    return definition.channel_axis(node)
