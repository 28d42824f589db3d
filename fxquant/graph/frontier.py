"""Frontier: the values of many batches at one place of a graph, which moves on node by node.

An algorithm that must see all batches at a node before it may go on to the next would run the network once a node, from
its inputs. What is read at a node or behind it is enough to go on from there:

    live(node) = {values computed before `node`, read at `node` or behind it}

These are kept for all batches, so that the whole way costs about two forward passes; where they would need more memory
than allowed, the frontier that was kept last stays (at first: the batches themselves), and the way from there is
computed again. Networks with large values have these at their beginning, where that way is short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxquant.graph.batches import Batch, placeholder_values
from fxquant.graph.program import Program
from fxquant.graph.segment import Segment, in_eval_mode

Values = dict[fx.Node, Any]


class Route:
    """The nodes that lead from a program's inputs to `stops`, and which of their values are alive at a stop.

    What depends on parameters alone is on no route: it is computed again where it is read, as it may have changed.
    """

    def __init__(self, program: Program, stops: Sequence[fx.Node]) -> None:
        self._place = {node: index for index, node in enumerate(_moving(program, _leading_to(stops)))}
        self._last = {
            node: max((self._place[user] for user in node.users if user in self._place), default=-1)
            for node in self._place
        }

    def live_before(self, stop: fx.Node) -> list[fx.Node]:
        """Values computed before `stop` that it, or what is behind it, reads."""
        return self._live(self._place[stop])

    def live_behind(self, stop: fx.Node) -> list[fx.Node]:
        """Values computed up to `stop` that something behind it reads."""
        return self._live(self._place[stop] + 1)

    def _live(self, border: int) -> list[fx.Node]:
        return [node for node, place in self._place.items() if place < border <= self._last[node]]


def _leading_to(stops: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(stops)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _moving(program: Program, needed: set[fx.Node]) -> Iterator[fx.Node]:
    """Those of `needed`, in graph order, that depend on an input; a bias does not, whatever its quantizer names."""
    moving: set[fx.Node] = set()
    for node in program.graph.nodes:
        depends = node.op == "placeholder" or any(source in moving for source in node.all_input_nodes)
        if node in needed and depends and program.bias_fake_quant(node) is None:
            moving.add(node)
            yield node


class Frontier:
    """Walks a program from stop to stop, in graph order, for all batches; weights and biases behind a stop may change
    before the walk goes on.

    Arguments:
        program: whose values they are, in float simulation and eval mode. Nodes that depend on parameters alone may be
            added while it walks.
        stops: where it will halt.
        batches: iterated once, and again for each stop that is reached before a frontier fits.
        limit_bytes: of all values that are kept; those of the batch at hand come on top.
    """

    def __init__(self, program: Program, stops: Sequence[fx.Node], batches: Iterable[Batch], limit_bytes: int) -> None:
        self._program = program
        self._route = Route(program, stops)
        self._batches = batches
        self._limit = limit_bytes
        self._kept: list[Values] | None = None  # None: the batches themselves
        self._known: list[fx.Node] = []

    @property
    def kept_bytes(self) -> int:
        """What is kept now."""
        return sum(map(size_in_bytes, self._kept or ()))

    def advance(self, stop: fx.Node, see: Callable[[torch.Tensor], None]) -> int:
        """Go on to `stop` and show its value for each batch to `see`; returns the number of batches.

        What comes before `stop` is computed as it is now.
        """
        live = self._route.live_before(stop)
        segment = Segment(self._program, [*live, stop], self._known)
        fresh: list[Values] | None = []
        free, count = self._limit - self.kept_bytes, 0
        for known in self._starts():
            with torch.no_grad(), in_eval_mode(self._program.module):
                values = segment.run(known)
            see(values[stop])
            count += 1
            if fresh is not None:
                fresh.append({node: values[node] for node in live})
                free -= size_in_bytes(fresh[-1])
                fresh = fresh if free >= 0 else None
        if fresh is not None:
            self._kept, self._known = fresh, live
        return count

    def _starts(self) -> Iterator[Values]:
        if self._kept is not None:
            yield from self._kept
            return
        for batch in self._batches:
            yield inputs_of(self._program, batch)


def inputs_of(program: Program, batch: Batch) -> Values:
    """What each placeholder gets for a batch. Raises FxquantError if it does not fit."""
    given = placeholder_values(program, batch)
    return {node: given[node.name] for node in program.graph.nodes if node.op == "placeholder"}


def size_in_bytes(values: Values) -> int:
    """Memory that the tensors among `values` hold, a storage that several share counted once."""
    tensors = [leaf for leaf in pytree.tree_leaves(list(values.values())) if isinstance(leaf, torch.Tensor)]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def show_all(
    program: Program, stops: Sequence[fx.Node], batches: Iterable[Batch], see: Callable[[fx.Node, torch.Tensor], None]
) -> int:
    """Show the value of each of `stops`, which are in graph order, for each batch to `see`; returns the number of
    batches.

    One forward pass a batch, in which no more values are held than the network itself needs.
    """
    route = Route(program, stops)
    lives = [route.live_behind(stop) for stop in stops]
    starts: list[list[fx.Node]] = [[], *lives]
    segments = [Segment(program, [*live, stop], start) for live, stop, start in zip(lives, stops, starts, strict=False)]
    count = 0
    for batch in batches:
        values = inputs_of(program, batch)
        for stop, live, segment in zip(stops, lives, segments, strict=True):
            with torch.no_grad(), in_eval_mode(program.module):
                found = segment.run(values)
            see(stop, found[stop])
            values = {node: found[node] for node in live}
        count += 1
    return count
