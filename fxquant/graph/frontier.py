"""Frontier, StagedWalk: the values of many batches at one place of a graph, which moves on.

An algorithm that must see all batches at a node before it may go on to the next would run the network once a node, from
its inputs. What is read at a node or behind it is enough to go on from there:

    live(node) = {values computed before `node`, read at `node` or behind it}

These are kept for all batches, so that the whole way costs about two forward passes; where they would need more memory
than allowed, the frontier that was kept last stays (at first: the batches themselves), and the way from there is
computed again. Networks with large values have these at their beginning, where that way is short.

Where several values are asked for at once, or one whose place in the graph is before that of the last one, Stages
takes the place of that order.
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


class Stages:
    """Sets of values that are asked for one set after another, in any order in which none depends on a later change.

    What a stage asks for, and all that leads there, is done with it. Of what is done, this must be kept:

        live(k) = {values done by stage k, read by what is not done yet, or asked for by a later stage}

    Every value is computed once, and none before a stage needs it: parameters that lead to no stage up to k may change
    until then. Stages may be left out: live(j) is enough for any later one.
    """

    def __init__(self, program: Program, stages: Sequence[Sequence[fx.Node]]) -> None:
        self.stages = [list(stage) for stage in stages]
        ways = [_leading_to(stage) for stage in self.stages]
        moving = list(_moving(program, set().union(*ways)))
        last = len(stages)
        first = {node: -1 if node.op == "placeholder" else last for node in moving}  # the stage that it is done with
        until = dict.fromkeys(moving, -1)  # the last stage that asks for it, or is done with what reads it
        for index, way in enumerate(ways):
            first.update({node: index for node in way if first.get(node) == last})
        for index, stage in enumerate(self.stages):
            until.update({node: index for node in stage if node in until})
        for node in moving:
            until[node] = max([until[node], *(first[user] for user in node.users if user in first)])
        self._spans = {node: (first[node], until[node]) for node in moving}

    def live_behind(self, stage: int) -> list[fx.Node]:
        """live(stage)."""
        return [node for node, (first, until) in self._spans.items() if first <= stage < until]


class Walk:
    """Computes values of all batches, and keeps those from which it goes on.

    Arguments:
        program: whose values they are, in float simulation and eval mode. Nodes that depend on parameters alone may be
            added while it walks.
        batches: iterated once, and again for each step that is taken before what is to be kept fits.
        limit_bytes: of all values that are kept; those of the batch at hand come on top.
    """

    def __init__(self, program: Program, batches: Iterable[Batch], limit_bytes: int) -> None:
        self._program = program
        self._batches = batches
        self._limit = limit_bytes
        self._kept: list[Values] | None = None  # None: the batches themselves
        self._known: list[fx.Node] = []
        self._fits = True

    @property
    def kept_bytes(self) -> int:
        """What is kept now."""
        return sum(map(size_in_bytes, self._kept or ()))

    @property
    def fits(self) -> bool:
        """Whether what the step at hand is to keep has fitted so far: else its rest may be left out."""
        return self._fits

    def step(self, wanted: Sequence[fx.Node], live: Sequence[fx.Node]) -> Iterator[Values]:
        """The wanted values of each batch, computed as the program is now; at the end the live ones are kept instead of
        what was, if they fit.
        """
        segment = Segment(self._program, list(dict.fromkeys([*live, *wanted])), self._known)
        fresh: list[Values] = []
        free, self._fits = self._limit - self.kept_bytes, True
        for index, known in enumerate(self._starts()):
            with torch.no_grad(), in_eval_mode(self._program.module, settled=index > 0):
                values = segment.run(known)
            if self._fits:
                fresh.append({node: values[node] for node in live})
                free -= size_in_bytes(fresh[-1])
                self._fits = free >= 0
            if not self._fits:
                fresh.clear()
            yield {node: values[node] for node in wanted}
        if self._fits:
            self._kept, self._known = fresh, list(live)

    def _starts(self) -> Iterator[Values]:
        if self._kept is not None:
            yield from self._kept
            return
        for batch in self._batches:
            yield inputs_of(self._program, batch)


class Frontier(Walk):
    """Walks a program from stop to stop, in graph order, for all batches; weights and biases behind a stop may change
    before the walk goes on.

    Arguments (the others are those of Walk):
        stops: where it will halt.
    """

    def __init__(self, program: Program, stops: Sequence[fx.Node], batches: Iterable[Batch], limit_bytes: int) -> None:
        super().__init__(program, batches, limit_bytes)
        self._route = Route(program, stops)

    def advance(self, stop: fx.Node, see: Callable[[torch.Tensor], None]) -> int:
        """Go on to `stop` and show its value for each batch to `see`; returns the number of batches.

        What comes before `stop` is computed as it is now.
        """
        count = 0
        for values in self.step([stop], self._route.live_before(stop)):
            see(values[stop])
            count += 1
        return count


class StagedWalk(Walk):
    """Walks a program from stage to stage (Stages), for all batches; parameters that lead to none of the stages that
    were asked for may change before the walk goes on.

    Arguments (the others are those of Walk):
        stages: what is asked for, in turn.
    """

    def __init__(
        self, program: Program, stages: Sequence[Sequence[fx.Node]], batches: Iterable[Batch], limit_bytes: int
    ) -> None:
        super().__init__(program, batches, limit_bytes)
        self._stages = Stages(program, stages)

    def values(self, stage: int) -> Iterator[Values]:
        """What a stage asks for, batch by batch; stages may be left out, but never asked for again."""
        return self.step(self._stages.stages[stage], self._stages.live_behind(stage))


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
        for index, (stop, live, segment) in enumerate(zip(stops, lives, segments, strict=True)):
            with torch.no_grad(), in_eval_mode(program.module, settled=count + index > 0):
                found = segment.run(values)
            see(stop, found[stop])
            values = {node: found[node] for node in live}
        count += 1
    return count
