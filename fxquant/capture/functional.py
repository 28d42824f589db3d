"""Make in-place operations functional: `relu_(x)` becomes `relu(x)`, and whoever reads x afterwards reads the result.

Two tensors alias when torch.export's fake values share a storage. A write to a view is written back to what it is a
view of (slice_scatter and its like), and a stale view is made again from the new value when it is next read.

    v = select(z, 2, 0); add_(v, 1); relu(z)
    ->  v = select(z, 2, 0); v1 = add(v, 1); z1 = select_scatter(z, v1, 2, 0); relu(z1)
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from fxquant.capture.places import describe_raw
from fxquant.errors import CaptureError
from fxquant.graph.program import Note, NoteKind

aten = torch.ops.aten

_RESHAPES = frozenset(
    {
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
        aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
        aten.view_as.default, aten.reshape_as.default,
    }
)  # fmt: skip
_SCATTERS = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}
_RANDOM = {aten.bernoulli_.float: aten.bernoulli.p, aten.uniform_.default: aten.uniform.default}
_SPLITS = frozenset(
    {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.unbind.int}
)


def make_functional(graph: fx.Graph, notes: list[Note]) -> None:
    """Replace every in-place operation of `graph`.

    A buffer that the model updates gets one `aten.copy_` of its last value at the end of the graph, so that the program
    keeps the model's state as the model does; a write to an input is seen by later readers only. Both are noted.
    """
    if any(is_mutating(node) for node in graph.nodes):
        _Functionalizer(graph, notes).run()


def is_mutating(node: fx.Node) -> bool:
    """Whether a node writes to one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


class _Functionalizer:
    def __init__(self, graph: fx.Graph, notes: list[Note]) -> None:
        self.graph = graph
        self.notes = notes
        self.storage: dict[fx.Node, int | None] = {node: _storage(node) for node in graph.nodes}
        self.parent: dict[fx.Node, fx.Node | None] = {}  # what a node is a view of
        self.latest: dict[fx.Node, fx.Node] = {}  # the node that holds a node's value now
        self.version: Counter[int] = Counter()  # writes so far, for each storage
        self.seen: dict[fx.Node, int] = {}  # the version that `latest` is of
        self.calls: dict[fx.Node, tuple[Any, Any, dict[fx.Node, fx.Node]]] = {}  # arguments, and their values then
        self.renamed: dict[fx.Node, fx.Node] = {}  # unsqueeze_ and its like: the node is now this view of itself

    def run(self) -> None:
        for node in list(self.graph.nodes):
            self.parent[node] = self._find_parent(node)
            sources = dict.fromkeys(node.all_input_nodes)
            if node.op == "output":
                self._store_buffers(node)
            with self.graph.inserting_before(node):
                current = {source: self._read(self._follow(source)) for source in sources}
                self.calls[node] = (node.args, node.kwargs, current)
                if is_mutating(node):
                    self._replace(node, current)
                    continue
            node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), current.__getitem__)
            self._mark(node, node)
        for node in reversed(list(self.graph.nodes)):
            if is_mutating(node) and node in self.parent:
                self.graph.erase_node(node)

    def _mark(self, node: fx.Node, value: fx.Node) -> None:
        self.latest[node] = value
        self.seen[node] = self._version(node)

    def _version(self, node: fx.Node) -> int:
        storage = self.storage[node]
        return 0 if storage is None else self.version[storage]

    def _find_parent(self, node: fx.Node) -> fx.Node | None:
        storage = self.storage[node]
        shared = (source for source in node.all_input_nodes if storage is not None and self.storage[source] == storage)
        return next(shared, None)

    def _follow(self, node: fx.Node) -> fx.Node:
        while node in self.renamed:
            node = self.renamed[node]
        return node

    def _read(self, node: fx.Node) -> fx.Node:
        """The node that holds the present value of `node`; a stale view is made again."""
        parent = self.parent[node]
        if parent is None or self.seen[node] == self._version(node):
            return self.latest[node]
        base = self._read(parent)
        if _same_geometry(node, parent):
            self._mark(node, base)
            return base
        args, kwargs, then = self.calls[node]
        args, kwargs = fx.node.map_arg((args, kwargs), lambda leaf: base if leaf is parent else then[leaf])
        copied = self._create(_view_operation(node), args, kwargs, node)
        self._mark(node, copied)
        return copied

    def _replace(self, node: fx.Node, current: dict[fx.Node, fx.Node]) -> None:
        written = _written_argument(node)
        if written is None:
            raise _cannot(node, "an operation that writes to its first argument and returns it")
        written = self._follow(written)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), current.__getitem__)
        assert isinstance(node.target, torch._ops.OpOverload)
        if torch.Tag.inplace_view in node.target.tags:
            self._mark(node, self._create(_functional(node), args, kwargs, node))
            self.parent[node] = written
            self.renamed[written] = node
            return
        value = self._copied(node, args) if node.target is aten.copy_.default else self._computed(node, args, kwargs)
        self._write(written, value, node)
        self._mark(node, value)

    def _computed(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        if node.target in (aten.fill_.Scalar, aten.zero_.default):
            fill = args[1] if node.target is aten.fill_.Scalar else 0
            return self._create(aten.full_like.default, (args[0], fill), {}, node)
        return self._create(_functional(node), args, kwargs, node)

    def _copied(self, node: fx.Node, args: Any) -> fx.Node:
        """`copy_(to, from)`: the value of `from`, in the dtype and shape of `to`."""
        target, source = args[:2]
        wanted, given = node.args[0].meta["val"], node.args[1].meta["val"]  # type: ignore[union-attr]  # both are tensors by schema
        if wanted.dtype != given.dtype:
            source = self._create(aten.to.dtype, (source, wanted.dtype), {}, node)
        if _sizes(wanted) != _sizes(given):
            source = self._create(aten.expand_as.default, (source, target), {}, node)
        return source  # type: ignore[no-any-return]  # a node by schema

    def _create(self, target: Callable[..., Any], args: Any, kwargs: Any, like: fx.Node) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs)
        node.meta = dict(like.meta)
        return node

    def _write(self, node: fx.Node, value: fx.Node, at: fx.Node) -> None:
        """Give `node`, and all that it is a view of, its new value."""
        chain = [node]
        while (parent := self.parent[chain[-1]]) is not None:
            chain.append(parent)
        old = [self._read(link) for link in chain]
        storage = self.storage[node]
        if storage is None:
            raise _cannot(at, "a write to a dense tensor")
        self.version[storage] += 1
        self._mark(node, value)
        for index, (child, parent) in enumerate(pairwise(chain)):
            if child.target is operator.getitem:
                continue  # its parent is a list: the write goes to the list's parent
            if index and chain[index - 1].target is operator.getitem:
                value = self._scatter_part(chain[index - 1], child, old[index + 1], value, at)
            else:
                value = self._scatter(child, parent, old[index + 1], value, at)
            self._mark(parent, value)

    def _scatter(self, child: fx.Node, parent: fx.Node, old: fx.Node, value: fx.Node, at: fx.Node) -> fx.Node:
        if _same_geometry(child, parent):
            return value
        rest, target = child.args[1:], _view_operation(child)
        if target in _SCATTERS:
            made = self._create(_SCATTERS[target], (old, value, *rest), dict(child.kwargs), at)
        elif target in _RESHAPES:
            made = self._create(aten.reshape_as.default, (value, old), {}, at)
        elif target in (aten.transpose.int, aten.t.default):
            made = self._create(target, (value, *rest), {}, at)
        elif target is aten.permute.default:
            made = self._create(aten.permute.default, (value, _inverse(rest[0])), {}, at)
        else:
            raise _cannot(at, f"a write to a view that can be written back; '{child.target}' cannot")
        made.meta["val"] = parent.meta["val"]
        return made

    def _scatter_part(self, part: fx.Node, split: fx.Node, old: fx.Node, value: fx.Node, at: fx.Node) -> fx.Node:
        """Write back to the tensor that `part`, one output of `split`, is a slice of."""
        index = int(part.args[1])  # type: ignore[arg-type]  # getitem of a list by a constant
        source = self.parent[split]
        if split.target not in _SPLITS or source is None:
            raise _cannot(at, f"a write to a view that can be written back; '{split.target}' cannot")
        first = 1 if split.target is aten.unbind.int else 2
        dim = split.args[first] if len(split.args) > first else 0
        if split.target is aten.unbind.int:
            made = self._create(aten.select_scatter.default, (old, value, dim, index), {}, at)
        else:
            sizes = [int(piece.shape[dim]) for piece in split.meta["val"]]
            start = sum(sizes[:index])
            made = self._create(aten.slice_scatter.default, (old, value, dim, start, start + sizes[index]), {}, at)
        made.meta["val"] = source.meta["val"]
        return made

    def _store_buffers(self, output: fx.Node) -> None:
        """Case: the model updates its buffers or inputs."""
        for node in [node for node in self.latest if self.parent[node] is None and self._version(node)]:
            value = self.latest[node]
            if node.op == "placeholder":
                text = "the model writes to this input; the program leaves the caller's tensor alone"
                self.notes.append(Note(NoteKind.OTHER, str(node.target), text))
            elif node.op == "get_attr":
                with self.graph.inserting_before(output):
                    stored = self.graph.call_function(aten.copy_.default, (node, value))
                stored.meta = {"val": node.meta["val"]}
                text = "the model updates this tensor in eval mode; an ONNX file cannot keep such state"
                self.notes.append(Note(NoteKind.OTHER, str(node.target), text))


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        value = next((item for item in value if isinstance(item, torch.Tensor)), None)
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    return int(value.untyped_storage()._cdata)


def _sizes(value: torch.Tensor) -> list[str]:
    return [str(size) for size in value.shape]


def _same_geometry(one: fx.Node, other: fx.Node) -> bool:
    a, b = one.meta.get("val"), other.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.dtype != b.dtype:
        return False
    strides = [str(s) for s in a.stride()] == [str(s) for s in b.stride()]
    return strides and _sizes(a) == _sizes(b) and str(a.storage_offset()) == str(b.storage_offset())


def _written_argument(node: fx.Node) -> fx.Node | None:
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema
    written = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    first = node.args[0] if node.args else None
    return first if written == [0] and isinstance(first, fx.Node) and len(schema.returns) <= 1 else None


def _functional(node: fx.Node) -> torch._ops.OpOverload:
    op = node.target
    assert isinstance(op, torch._ops.OpOverload)
    if op in _RANDOM:
        return _RANDOM[op]
    name = op._schema.name.split("::")[1]
    name = f"__{name[3:]}" if name.startswith("__i") else name.removesuffix("_")
    packet = getattr(getattr(torch.ops, op.namespace), name, None)
    overload = getattr(packet, op._overloadname, None)
    if overload is None or overload._schema.is_mutable:
        raise _cannot(node, "an operation that has a functional form")
    return overload  # type: ignore[no-any-return]  # torch.ops is untyped


def _view_operation(node: fx.Node) -> Any:
    """The operation that makes `node` from what it is a view of: its own, or the functional form (unsqueeze_)."""
    return _functional(node) if is_mutating(node) else node.target


def _inverse(order: Any) -> list[int]:
    rank = len(order)
    return sorted(range(rank), key=lambda axis: order[axis] % rank)


def _cannot(node: fx.Node, expected: str) -> CaptureError:
    return CaptureError(
        f"capture: in-place operation '{node.target}' cannot be made functional",
        place=describe_raw(node),
        expected=expected,
        got=str(node.format_node()),
        remedy="Write that line without changing a tensor in place.",
    )
