"""Islands: what onnxruntime computes in float in front of a quantizer, and whether its bits are known.

    moved     codes of one grid in other places: no arithmetic
    IEEE      each operation rounds once: torch's float32 is onnxruntime's, bit for bit
    table     parts of it are functions of one code, tabulated by asking onnxruntime for all codes (islands.py); the
              rest is as above
    float     whatever else: named, not certified

A function of one code: elementwise operations on one source of at most 256 codes, each of them computed alike wherever
an element stands. What is known of an operation is its OpDef's FloatForm.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch
from torch import fx

from fxquant.graph.program import value_type
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.ops.base import FloatForm
from fxquant.ops.kernels import KERNEL_BITS
from fxquant.simulation.facts import Facts, is_on, source_of, spelled
from fxquant.spec import Target

_TABULATED = (FloatForm.AGREES, FloatForm.POINTWISE)
_ROUNDED_ONCE = (torch.float32, torch.float64)
_UNKNOWN = {
    FloatForm.DRIFTS: "onnxruntime's vector and remainder loops round it differently",
    FloatForm.POINTWISE: "onnxruntime's bits are not torch's, and it is no function of one 8-bit code",
    None: "how onnxruntime rounds it in float is not known",
}


class IslandKind(Enum):
    """How the codes of an island are known."""

    INPUT = "graph input"  # quantized as it is given
    MOVED = "moved codes"  # operations that only move codes, between two quantizers of one grid
    IEEE = "IEEE arithmetic"  # one rounding an operation: torch's float32 is onnxruntime's bit for bit
    TABLE = "table"  # functions of one code, harvested from onnxruntime; else as IEEE
    FLOAT = "float island"  # not certified

    @property
    def is_certified(self) -> bool:
        """Whether the simulation is exact on it."""
        return self is not IslandKind.FLOAT


@dataclass(frozen=True)
class Unary:
    """Nodes that compute a function of each code of one value.

    Arguments:
        source: that value, on a grid.
        nodes: the function, in graph order; the last one gives its result.
        kept: those of them, but for the last, that are read elsewhere, too.
        end: the FakeQuant behind it, if its codes are what is tabulated; None: its float32 values are.
    """

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    kept: tuple[fx.Node, ...]
    end: fx.Node | None

    @property
    def top(self) -> fx.Node:
        """The node whose value the table gives."""
        return self.nodes[-1] if self.end is None else self.end


@dataclass(frozen=True)
class Island:
    """What stands in front of a FakeQuant and runs in float.

    Arguments:
        end: the FakeQuant.
        kind: how its codes are known.
        nodes: the operations, in graph order.
        sources: what they read, in graph order: values on a grid, graph inputs, parameters, products that give float32.
        reason: why onnxruntime has no integer kernel for it; "" at a graph input and for moved codes.
        uncertified: of kind FLOAT, the node that is not certified, and why; else "".
    """

    end: fx.Node
    kind: IslandKind
    nodes: tuple[fx.Node, ...]
    sources: tuple[fx.Node, ...]
    reason: str
    uncertified: str = ""


class Regions:
    """Finds islands.

    Arguments:
        facts: of the program.
        products: operations with an integer kernel that gives float32.
    """

    def __init__(self, facts: Facts, products: Collection[fx.Node]) -> None:
        self._facts = facts
        self._products = products
        self._order = {node: index for index, node in enumerate(facts.program.graph.nodes)}
        self._origins: dict[fx.Node, fx.Node] = {}
        self._harvested: set[fx.Node] = set()
        self._uncertified: dict[fx.Node, str] = {}
        self.unknown: set[fx.Node] = set()  # operations whose own rounding in float is not known
        for node in self._order:
            self._read(node)

    @cached_property
    def tables(self) -> dict[fx.Node, Unary]:
        """The functions of one code to be harvested, by the node whose value their table gives."""
        found = [table for node in self._order if node in self._harvested for table in self._tables_of(node)]
        return {table.top: table for table in found}

    def island(self, end: fx.Node, module: FakeQuant, reason: str) -> Island:
        """The island in front of a FakeQuant that is on, where `reason` says why it has no integer kernel."""
        source = source_of(end)
        nodes, sources = self._region(source)
        if not nodes and source.op == "placeholder":
            return Island(end, IslandKind.INPUT, (), sources, "")
        if self._facts.program.target is not Target.ONNXRUNTIME_X64:
            return Island(end, IslandKind.FLOAT, nodes, sources, reason, reason)
        grid = self._facts.grid_of(source)
        if grid is not None and grid.grid.same_as(module.grid):
            return Island(end, IslandKind.MOVED, nodes, sources, "")
        uncertified = self._uncertified[source]
        if uncertified:
            return Island(end, IslandKind.FLOAT, nodes, sources, reason, uncertified)
        kind = IslandKind.IEEE if self._harvested.isdisjoint(nodes) else IslandKind.TABLE
        return Island(end, kind, nodes, sources, reason)

    def _read(self, node: fx.Node) -> None:
        """Decide whether a node is a function of one code, and its bits are known; what it reads is decided."""
        origin = self._origin(node)
        if origin is not None:
            self._origins[node] = origin
            definition = self._facts.definition(node)
            is_own = definition is not None and definition.float_form_for(node) is FloatForm.POINTWISE
            if origin is not node and (is_own or not self._harvested.isdisjoint(node.all_input_nodes)):
                self._harvested.add(node)
        if self._is_source(node) or node in self._harvested:
            self._uncertified[node] = ""
            return
        own = self._why(node)
        if own:
            self.unknown.add(node)
        self._uncertified[node] = next(filter(None, (self._uncertified[one] for one in node.all_input_nodes)), own)

    def _is_source(self, node: fx.Node) -> bool:
        """Whether the bits of a value are known, whatever computes it."""
        module = self._facts.program.fake_quant(node)
        if module is not None and is_on(module):
            return True
        return node.op in ("placeholder", "get_attr") or node in self._products or self._facts.is_constant(node)

    def _why(self, node: fx.Node) -> str:
        """Why the bits of what a node computes are not known, those that it reads given; "" if they are."""
        kind = value_type(node)
        reads_float = any(found is None or found.is_float for found in map(value_type, node.all_input_nodes))
        if node.op == "output" or not (reads_float or (kind is not None and kind.is_float)):
            return ""
        if self._facts.program.fake_quant(node) is not None or self._facts.program.bias_fake_quant(node) is not None:
            return ""  # it is off, and passes its input on
        definition = self._facts.definition(node)
        form = None if definition is None else definition.float_form_for(node)
        name = f"{node.name} ({spelled(node, definition)})" if definition else spelled(node, None)
        if form is FloatForm.MOVES:
            return ""
        if form is not FloatForm.AGREES:
            return f"{name}: {_UNKNOWN[form]}"
        narrow = kind is not None and kind.is_float and kind.dtype not in _ROUNDED_ONCE
        return f"{name}: it is computed in {kind.dtype}" if kind is not None and narrow else ""

    def _region(self, last: fx.Node) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
        """The operations that `last` is computed by, and the sources that they read."""
        nodes, sources, stack = set[fx.Node](), set[fx.Node](), [last]
        while stack:
            node = stack.pop()
            if node in nodes or node in sources:
                continue
            if self._is_source(node):
                sources.add(node)
                continue
            nodes.add(node)
            stack.extend(node.all_input_nodes)
        return self._sorted(nodes), self._sorted(sources)

    def _sorted(self, nodes: Collection[fx.Node]) -> tuple[fx.Node, ...]:
        return tuple(sorted(nodes, key=self._order.__getitem__))

    def _origin(self, node: fx.Node) -> fx.Node | None:
        """The value on a grid of 8 bits that a node computes an elementwise function of; of such a value, itself."""
        grid = self._facts.grid_of(node)
        if grid is not None:
            fits = grid.spec.bits <= KERNEL_BITS and not grid.scale.ndim and value_type(node) is not None
            return node if fits and not self._facts.is_constant(node) else None
        origins = {self._origins.get(source) for source in node.all_input_nodes}
        origin = origins.pop() if len(origins) == 1 else None
        return origin if origin is not None and self._is_elementwise(node, origin) else None

    def _is_elementwise(self, node: fx.Node, origin: fx.Node) -> bool:
        definition, kind, whole = self._facts.definition(node), value_type(node), value_type(origin)
        if definition is None or kind is None or whole is None or node.op != "call_function":
            return False
        is_known = definition.float_form_for(node) in _TABULATED
        return is_known and kind.shape == whole.shape and kind.dtype in (torch.float32, torch.bool)

    def _tables_of(self, last: fx.Node) -> Iterator[Unary]:
        """Codes for each quantizer of 8 bits that reads `last`; floats, if something else outside the function does."""
        if not self._continues_elsewhere(last):
            return
        nodes = self._function(last)
        kept = tuple(node for node in nodes[:-1] if self._continues_elsewhere(node))
        ends = [user for user in last.users if self._takes_codes(user)]
        for end in ends:
            yield Unary(self._origins[last], nodes, kept, end)
        if any(user not in ends and not self._continues(last, user) for user in last.users):
            yield Unary(self._origins[last], nodes, kept, None)

    def _continues(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether `user` belongs to a function of the same code."""
        return self._origins.get(user) is self._origins[node]

    def _continues_elsewhere(self, node: fx.Node) -> bool:
        return any(not self._continues(node, user) for user in node.users)

    def _takes_codes(self, user: fx.Node) -> bool:
        module = self._facts.program.fake_quant(user)
        return module is not None and is_on(module) and module.spec.bits <= KERNEL_BITS and not module.scale.ndim

    def _function(self, last: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes that compute `last` from its origin."""
        nodes, stack = set[fx.Node](), [last]
        while stack:
            node = stack.pop()
            if node not in nodes and node is not self._origins[last]:
                nodes.add(node)
                stack.extend(node.all_input_nodes)
        return self._sorted(nodes)
