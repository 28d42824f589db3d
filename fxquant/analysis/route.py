"""Route: a program's graph cut where activations are quantized.

A float run and a quantized run go along it side by side, from cut to cut, and hold no more than the values that are
still read. From any cut the outputs can be computed anew with other quantizers switched on:

    cost of a sweep over units = sum over units of (graph behind the unit) < units x forwards
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fxquant.analysis.units import Unit, callers
from fxquant.graph.constants import Constants
from fxquant.graph.program import Program
from fxquant.graph.segment import Segment
from fxquant.numerics.fake_quant import FakeQuant, Mode

Values = Mapping[fx.Node, Any]


@dataclass(frozen=True)
class Cut:
    """A place in front of a node.

    Arguments:
        position: of that node in the graph.
        quantizer: the node, where it quantizes an activation; None at the beginning.
        live: values computed in front of it that are read there or behind it.
    """

    position: int
    quantizer: fx.Node | None
    live: tuple[fx.Node, ...]


class Route:
    """The cuts of a program, and what runs between them.

    Arguments:
        program: calibrated, in eval mode and float simulation; the route switches its quantizers.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.order = {node: position for position, node in enumerate(program.graph.nodes)}
        self.modes = {module: module.mode for module in callers(program)}
        self._weights = {
            node: module for node, module in program.fake_quant_nodes() if module.follows and module in self.modes
        }
        self.cuts = tuple(self._cuts())
        self._rest: dict[int, Segment] = {}

    @cached_property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The nodes whose values the program returns."""
        return tuple(dict.fromkeys(self.program.graph.output_node().all_input_nodes))

    def start_of(self, unit: Unit) -> int:
        """The last cut in front of all that changes when the unit's quantizers are switched."""
        first = min((self.order[node] for node in unit.first_reads), default=0)
        return max((index for index, cut in enumerate(self.cuts) if cut.position <= first), default=0)

    def outputs_from(self, index: int, values: Values, on: Collection[FakeQuant]) -> list[Any]:
        """The outputs, given the values of cut `index`, where the quantizers behind it are those of `on`."""
        if index not in self._rest:
            self._rest[index] = self._segment(self.outputs, index)
        found = self._run(self._rest[index], values, on)
        return [found[node] for node in self.outputs]

    def advance(self, index: int, values: Values, on: Collection[FakeQuant]) -> dict[fx.Node, Any]:
        """The values of the next cut, given those of cut `index`."""
        return self._run(self._stretches[index], values, on)

    def weight_of(self, quantizer: fx.Node) -> torch.Tensor:
        """The weight that a quantizer's node reads."""
        return self._real[quantizer]

    def switch(self, on: Collection[FakeQuant]) -> None:
        """Let these quantizers quantize, and no others."""
        for module, mode in self.modes.items():
            module.mode = mode if module in on else Mode.OFF

    def _run(self, segment: Segment, values: Values, on: Collection[FakeQuant]) -> dict[fx.Node, Any]:
        self.switch(on)
        weights = {
            node: (self._quantized if module in on else self._real)[node] for node, module in self._weights.items()
        }
        return segment.run({**values, **weights})

    def _segment(self, wanted: Iterable[fx.Node], index: int) -> Segment:
        return Segment(self.program, list(wanted), (*self.cuts[index].live, *self._weights))

    @cached_property
    def _stretches(self) -> list[Segment]:
        return [self._segment(cut.live, index) for index, cut in enumerate(self.cuts[1:])]

    @cached_property
    def _real(self) -> dict[fx.Node, torch.Tensor]:
        constants = Constants(self.program)
        sources = {node: node.args[0] for node in self._weights}
        return {
            node: constants.tensor(source).to(self._weights[node].scale.device)
            for node, source in sources.items()
            if isinstance(source, fx.Node)
        }

    @cached_property
    def _quantized(self) -> dict[fx.Node, torch.Tensor]:
        self.switch(self.modes)
        with torch.no_grad():
            return {node: module(self._real[node]) for node, module in self._weights.items()}

    def _cuts(self) -> Iterable[Cut]:
        nodes = list(self.order)
        begin = next(index for index, node in enumerate(nodes) if node.op != "placeholder")
        quantizers = [
            node for node, module in self.program.fake_quant_nodes() if module in self.modes and not module.follows
        ]
        yield Cut(begin, None, self._live_at(begin))
        for node in quantizers:
            yield Cut(self.order[node], node, self._live_at(self.order[node]))

    def _live_at(self, position: int) -> tuple[fx.Node, ...]:
        return tuple(
            node
            for node, place in self.order.items()
            if place < position
            and node.op != "get_attr"
            and node not in self._weights
            and any(self.order[user] >= position for user in node.users)
        )
