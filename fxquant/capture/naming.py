"""Rebuild the graph in its final order, with names from module paths and only the meta that fxquant keeps.

Names: a call_module is named after its module's path; the one operation of a leaf module after the leaf
(`layer1_0_conv1`); any other operation after its module and itself (`layer1_0_add`); a tensor after its path
(`layer1_0_conv1_weight`). The second of a name gets `_1`, the third `_2`, in graph order, skipping what is the name of
something else.
"""

from __future__ import annotations

import operator
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fxquant.capture.places import Place, place_of
from fxquant.graph.program import ValueType

_SIDE = frozenset({operator.getitem, torch.ops.aten.sym_size.int})


class SizeNames:
    """Symbolic sizes as text: the first symbol is s0, the next s1, in the order in which the graph shows them."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def text(self, size: Any) -> int | str:
        """A size as an int, or its expression ("2*s0")."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        if not expression.free_symbols:
            return int(expression)
        return self.rename(str(expression))

    def rename(self, text: str) -> str:
        """The same text with the symbols' new names."""
        return re.sub(r"\b[su]\d+\b", lambda found: self._name(found.group()), text)

    def _name(self, symbol: str) -> str:
        return self.names.setdefault(symbol, f"s{len(self.names)}")


def type_of(value: Any, sizes: SizeNames) -> ValueType | tuple[ValueType, ...] | None:
    """ValueType of a fake value; a tuple of them for several tensors; None for what is not a tensor."""
    if isinstance(value, torch.Tensor):
        return ValueType(tuple(sizes.text(size) for size in value.shape), value.dtype)
    if isinstance(value, (tuple, list)) and value and all(isinstance(item, torch.Tensor) for item in value):
        return tuple(ValueType(tuple(sizes.text(size) for size in item.shape), item.dtype) for item in value)
    return None


def rebuild(graph: fx.Graph, sizes: SizeNames) -> fx.Graph:
    """A new graph: placeholders first, each tensor just before its first reader, nothing dead, final names and meta."""
    order = _final_order(graph)
    names = _unique(_base_names(order))
    made = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in order:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda leaf: nodes[leaf])
        new = made.create_node(node.op, node.target, args, kwargs, name=names[node])
        new.meta = _kept_meta(node, sizes)
        nodes[node] = new
    made._codegen = graph._codegen
    return made


def _kept_meta(node: fx.Node, sizes: SizeNames) -> dict[str, Any]:
    place = place_of(node)
    meta: dict[str, Any] = {"module_path": place.path, "module_class": place.module_class, "source": place.source}
    kind = type_of(node.meta.get("val"), sizes)
    if kind is not None:
        meta["type"] = kind
    return meta


def _final_order(graph: fx.Graph) -> list[fx.Node]:
    live = _live(graph)
    order = [node for node in graph.nodes if node.op == "placeholder"]
    placed = set(order)
    for node in graph.nodes:
        if node not in live or node in placed or node.op == "get_attr":
            continue
        for source in (*node.all_input_nodes, node):
            if source not in placed:
                placed.add(source)
                order.append(source)
    return order


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output, or a stored buffer, depends on."""
    live: set[fx.Node] = set()
    todo = [node for node in graph.nodes if node.op == "output" or node.target is torch.ops.aten.copy_.default]
    while todo:
        node = todo.pop()
        if node not in live:
            live.add(node)
            todo.extend(node.all_input_nodes)
    return live


def _base_names(order: Iterable[fx.Node]) -> dict[fx.Node, str]:
    order = list(order)
    places = {node: place_of(node) for node in order}
    solo = _leaf_operations(order, places)
    names = {}
    for node in order:
        path = places[node].path
        if node.op in ("placeholder", "output"):
            name = str(node.target)
        elif node.op in ("get_attr", "call_module"):
            name = str(node.target)
        elif node in solo:
            name = path
        else:
            name = f"{path}.{_operation_name(node)}"
        names[node] = re.sub(r"\W+", "_", name.lstrip("."))
    return names


def _operation_name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1].strip("_")
    return str(getattr(node.target, "__name__", node.target)).strip("_")


def _leaf_operations(order: list[fx.Node], places: dict[fx.Node, Place]) -> set[fx.Node]:
    """The operations that bear the plain name of their module: alone in one call of a module that calls no other."""
    parents = {place.path.rpartition(".")[0] for place in places.values() if place.path}
    inner = set()
    for path in parents:
        while path not in inner:
            inner.add(path)
            path = path.rpartition(".")[0]
    calls: dict[tuple[str, str], list[fx.Node]] = defaultdict(list)
    for node, place in places.items():
        if node.op == "call_function" and node.target not in _SIDE and place.path and place.path not in inner:
            calls[(place.path, place.call)].append(node)
    solo = set()
    for (path, _), nodes in calls.items():
        main = nodes if len(nodes) == 1 else [node for node in nodes if _reads_own_tensor(node, path)]
        if len(main) == 1:
            solo.add(main[0])
    return solo


def _reads_own_tensor(node: fx.Node, path: str) -> bool:
    return any(source.op == "get_attr" and str(source.target).startswith(f"{path}.") for source in node.all_input_nodes)


def _unique(bases: dict[fx.Node, str]) -> dict[fx.Node, str]:
    reserved = set(bases.values())
    used: Counter[str] = Counter()
    names = {}
    for node, base in bases.items():
        name = base
        if used[base]:
            while (name := f"{base}_{used[base]}") in reserved:
                used[base] += 1
        used[base] += 1
        reserved.add(name)
        names[node] = name
    return names
