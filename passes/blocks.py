"""Blocks: parts of the graph with one output that are reconstructed at once, by module path and by dominators.

A set of nodes is a block if it is closed: one value of it is read outside (or, instead, what quantizes that value);
what it reads from outside, and what depends on inputs, are float tensors (or the number of samples that these have,
which reshapes read); and none of those depends on the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import networkx as nx
import torch
from torch import fx

from fxquant.graph.channels import channel_axis_of
from fxquant.graph.program import Program, value_type
from fxquant.ops.base import Role
from fxquant.reconstruction import Unit

from .quantized_layers import QuantizedLayer
from .values import is_float_value, role_of

_SOURCE = "source"  # in front of all placeholders, where dominators are asked for


def block_of_path(program: Program, path: str, layers: Sequence[QuantizedLayer]) -> Unit | str:
    """The block of the module at `path`, or why its nodes are none."""
    return block_of(program, path, {node for node in program.graph.nodes if _lies_in(node, path)}, layers)


def block_of(program: Program, name: str, nodes: set[fx.Node], layers: Sequence[QuantizedLayer]) -> Unit | str:
    """The block that these nodes are, or why they are none; nodes that only lead to weights and biases are free."""
    flow = dependent(program)
    inside = nodes & flow
    weights = tuple(layer.quantizer for layer in layers if layer.node in inside)
    if not weights:
        return "no layer whose weight is quantized is in it"
    outputs = {_unquantized(program, node) for node in inside if _is_read_outside(program, node, inside)}
    outputs -= {None}
    if len(outputs) != 1:
        names = ", ".join(sorted(str(node) for node in outputs)) or "none"
        return f"it has not one output, but {names}"
    reads = _read_outside(inside, flow)
    sizes = tuple(node for node in reads if _is_size(node))
    inputs = [node for node in reads if node not in sizes]
    for node in inputs:
        if not is_float_value(node):
            return f"it reads {node.name}, which is no tensor of floats"
    behind = _reached(program, inside)
    late = [node.name for node in inputs if node in behind]
    if late:
        return f"it reads {late[0]}, which is computed from it"
    output = next(iter(outputs))
    assert output is not None
    sources = dict.fromkeys(_unquantized(program, node) or node for node in inputs)
    if output in sources or not is_float_value(output):
        return f"its output {output.name} is its input, or no tensor of floats"
    for node in sizes:
        if {_samples(source) for source in sources} != {_samples(node.args[0])}:
            return f"it reads {node.name}, which is not the number of samples of what it reads"
    return Unit(name, weights, tuple(sources), output, channel_axis_of(program, output), sizes=sizes)


def find_blocks(program: Program, layers: Sequence[QuantizedLayer], largest: int) -> Iterator[Unit]:
    """Disjoint blocks of 2 to `largest` layers: the smallest modules that are closed, then what dominators cut out."""
    taken: set[fx.Node] = set()
    for name, nodes in (*_modules(program, layers), *_regions(program)):
        count = sum(layer.node in nodes for layer in layers)
        found = block_of(program, name, nodes, layers) if count <= largest else ""
        if isinstance(found, Unit) and taken.isdisjoint(found.weights):
            taken.update(found.weights)
            yield found


def _modules(program: Program, layers: Sequence[QuantizedLayer]) -> list[tuple[str, set[fx.Node]]]:
    """Modules with 2 layers or more, those with few layers first, outer ones before inner ones with the same layers."""
    counts: dict[str, int] = {}
    for layer in layers:
        parts = str(layer.node.meta.get("module_path", "")).split(".")
        for end in range(1, len(parts)):
            path = ".".join(parts[:end])
            counts[path] = counts.get(path, 0) + 1
    paths = sorted((path for path, count in counts.items() if count > 1), key=lambda path: (counts[path], len(path)))
    return [(path, {node for node in program.graph.nodes if _lies_in(node, path)}) for path in paths]


def _regions(program: Program) -> Iterator[tuple[str, set[fx.Node]]]:
    """Nodes between values that every path to the output goes through, where they are no chain: a residual branch
    with its sum, and the activation behind that.
    """
    flow = nx.DiGraph()
    kept = {node for node in dependent(program) if not _is_size(node)}
    for node in program.graph.nodes:
        if node in kept:
            heads = [read for read in node.all_input_nodes if read in kept] or [_SOURCE]
            flow.add_edges_from((head, node) for head in heads)
    ends = [node for node in program.graph.nodes if node.op == "output" and node in flow]
    if not ends:
        return
    dominators = nx.immediate_dominators(flow, _SOURCE)
    cuts: list[fx.Node] = [ends[0]]
    while dominators.get(cuts[0], _SOURCE) not in (_SOURCE, None):
        cuts.insert(0, dominators[cuts[0]])
    for index, (first, last) in enumerate(zip(cuts, cuts[1:], strict=False)):
        between = (nx.descendants(flow, first) & nx.ancestors(flow, last)) | {last}
        if len(between) == 1 or last.op == "output":
            continue
        behind = cuts[index + 2 : index + 3]
        between |= {node for node in behind if role_of(program, node) is Role.ACTIVATION}
        yield last.name, between


def dependent(program: Program) -> set[fx.Node]:
    """The nodes whose values depend on inputs; biases' quantizers, which read others for their scales alone, do not."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        is_flow = node.op == "placeholder" or any(read in found for read in node.all_input_nodes)
        found.update({node} if is_flow and program.bias_fake_quant(node) is None else ())
    return found


def _is_size(node: fx.Node) -> bool:
    """Whether a node gives the size of a value's axis 0."""
    return node.target is torch.ops.aten.sym_size.int and bool(node.args[1] == 0)


def _samples(value: Any) -> object:
    """How many samples along axis 0 a value has: a number or a symbol; None if it is not known."""
    found = value_type(value) if isinstance(value, fx.Node) else None
    return found.shape[0] if found is not None and found.shape else None


def _lies_in(node: fx.Node, path: str) -> bool:
    place = str(node.meta.get("module_path", ""))
    return node.op not in ("placeholder", "output") and (place == path or place.startswith(f"{path}."))


def _unquantized(program: Program, node: fx.Node) -> fx.Node | None:
    """A value as it is before its FakeQuant, if it is what one gives."""
    source = node.args[0] if program.fake_quant(node) is not None else node
    return source if isinstance(source, fx.Node) else None


def _is_read_outside(program: Program, node: fx.Node, inside: set[fx.Node]) -> bool:
    return any(user not in inside and program.bias_fake_quant(user) is None for user in node.users)


def _read_outside(inside: set[fx.Node], flow: Iterable[fx.Node]) -> list[fx.Node]:
    reads = {read for node in inside for read in node.all_input_nodes} - inside
    return [node for node in flow if node in reads]


def _reached(program: Program, inside: set[fx.Node]) -> set[fx.Node]:
    """The nodes outside that depend on some inside."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node not in inside and any(read in inside or read in found for read in node.all_input_nodes):
            found.update({node} if program.bias_fake_quant(node) is None else ())
    return found
