"""Segments: the nodes between the quantizers that a value comes from and the quantizer, or graph output, it reaches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from fxquant.graph.constants import Constants
from fxquant.graph.program import Program
from fxquant.lowering.signature import input_nodes, output_leaves
from fxquant.numerics.fake_quant import Mode


@dataclass(frozen=True)
class Segment:
    """What is compared at one place, and what may be at fault there.

    Arguments:
        end: the FakeQuant node of an activation, or the node that the graph returns.
        output: name of the graph output; "" for a FakeQuant.
        nodes: the operations between, in graph order (quantizers and constants are not among them).
        sources: the FakeQuant nodes of activations, and placeholders, that they start from, in graph order.
    """

    end: fx.Node
    output: str
    nodes: tuple[fx.Node, ...]
    sources: tuple[fx.Node, ...]

    @property
    def value(self) -> str:
        """Name of the quantized value, or of the graph output."""
        return self.output or str(self.end.args[0])


class SegmentReader:
    """Finds the segments of a program, and what they read."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.constants = Constants(program)
        self._order = {node: index for index, node in enumerate(program.graph.nodes)}

    def is_activation_quantizer(self, node: fx.Node) -> bool:
        """Whether `node` is the FakeQuant of an activation, and quantizes."""
        module = self.program.fake_quant(node)
        return module is not None and module.mode is not Mode.OFF and not self.is_constant_quantizer(node)

    def is_constant_quantizer(self, node: fx.Node) -> bool:
        """Whether `node` is the (Bias)FakeQuant of a parameter, or of what is computed from parameters alone."""
        if self.program.fake_quant(node) is None and self.program.bias_fake_quant(node) is None:
            return False
        source = node.args[0]
        return isinstance(source, fx.Node) and self.constants.is_constant(source)

    def segments(self) -> tuple[Segment, ...]:
        """One for each activation FakeQuant in graph order, then one for each graph output."""
        ends = [node for node in self.program.graph.nodes if self.is_activation_quantizer(node)]
        found = [self._segment(node, node.all_input_nodes, "") for node in ends]
        reserved = {node.name for node in input_nodes(self.program)}
        for leaf in output_leaves(self.program, reserved):
            if isinstance(leaf.value, fx.Node):
                found.append(self._segment(leaf.value, [leaf.value], leaf.name))
        return tuple(found)

    def owners(self, quantizer: fx.Node) -> tuple[str, ...]:
        """The nodes that a quantizer belongs to: the layers that read a constant, or the activation itself."""
        if not self.is_constant_quantizer(quantizer):
            return (str(quantizer.args[0]),)
        layers = [user.name for user in quantizer.users if self.program.bias_fake_quant(user) is None]
        return tuple(layers) or (quantizer.name,)

    def _segment(self, end: fx.Node, starts: Iterable[fx.Node], output: str) -> Segment:
        nodes: set[fx.Node] = set()
        sources: set[fx.Node] = set()
        pending = list(starts)
        while pending:
            node = pending.pop()
            if node in nodes or node in sources or not self._is_tensor(node):
                continue
            if node.op == "placeholder" or self.is_activation_quantizer(node):
                sources.add(node)
            elif not self.constants.is_constant(node) and not self.is_constant_quantizer(node):
                nodes.add(node)
                pending.extend(node.all_input_nodes)
        return Segment(end, output, self._sorted(nodes), self._sorted(sources))

    def _is_tensor(self, node: fx.Node) -> bool:
        """Sizes are not followed: whatever they are read from, they carry none of its codes."""
        return "type" in node.meta

    def _sorted(self, nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
        return tuple(sorted(nodes, key=self._order.__getitem__))
