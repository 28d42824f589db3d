"""Segment: the part of a program's graph between values that are known and values that are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from fxquant.errors import FxquantError
from fxquant.graph.batches import Batch, placeholder_values
from fxquant.graph.liveness import last_uses
from fxquant.graph.program import Program, describe


class Segment:
    """Computes some values of a program from others, as `program.module` does in float simulation, and nothing else.

    It reads parameters, modules and modes when it runs, keeps only values that are still read, and is differentiable
    wherever the modules are.

    Arguments:
        program: whose graph it is; its nodes must not be edited while the segment is in use.
        wanted: nodes whose values are computed.
        known: nodes whose values are handed in, of any kind: what only leads to them is not run. Placeholders that are
            needed and not among them are `inputs`.
    """

    def __init__(self, program: Program, wanted: Sequence[fx.Node], known: Sequence[fx.Node] = ()) -> None:
        self.program = program
        self.wanted = tuple(wanted)
        self.known = tuple(known)
        needed = _needed(self.wanted, set(self.known))
        ordered = [node for node in program.graph.nodes if node in needed]
        self.inputs = tuple(node for node in ordered if node.op == "placeholder")
        self.nodes = tuple(node for node in ordered if node.op != "placeholder")
        self._dead = last_uses(self.nodes, set(self.wanted))

    def run(self, known: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """The wanted values, given those of `known` and `inputs`.

        Raises FxquantError naming a node whose value is missing.
        """
        missing = [node for node in (*self.known, *self.inputs) if node not in known and self._reads(node)]
        if missing:
            raise FxquantError(f"segment: value '{missing[0].name}'", place=describe(missing[0]), got="no value for it")
        values = dict(known)
        for node in self.nodes:
            values[node] = self._compute(node, values)
            for dead in self._dead.get(node, ()):
                values.pop(dead, None)
        return {node: values[node] for node in self.wanted}

    def _reads(self, node: fx.Node) -> bool:
        return node in self.wanted or any(user in set(self.nodes) for user in node.users)

    def _compute(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return self.program.tensor(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda read: values[read])
        called: Any = self.program.submodule(node) if node.op == "call_module" else node.target
        return called(*args, **kwargs)


def _needed(wanted: Iterable[fx.Node], known: set[fx.Node]) -> set[fx.Node]:
    """The nodes that must run (or be given, as placeholders are) for `wanted`."""
    needed: set[fx.Node] = set()
    waiting = list(wanted)
    while waiting:
        node = waiting.pop()
        if node not in needed and node not in known:
            needed.add(node)
            waiting.extend(node.all_input_nodes)
    return needed


def values_of(program: Program, batches: Iterable[Batch], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """For each batch the values of the nodes called `names`, without gradients, as eval mode has them.

    Only what leads to them is run. Raises FxquantError for an unknown name, and for a batch that does not fit.
    """
    segment = Segment(program, [program.node(name) for name in names])
    for batch in batches:
        given = placeholder_values(program, batch)
        with torch.no_grad(), in_eval_mode(program.module):
            found = segment.run({node: given[node.name] for node in segment.inputs})
        yield {node.name: value for node, value in found.items()}


@contextmanager
def in_eval_mode(module: nn.Module, settled: bool = False) -> Iterator[None]:
    """Eval mode inside; on leaving, each submodule is in the mode that it was in.

    settled: the module was here before, and no parameter has changed since: grids that follow weights, which a program
    brings up to date when it is put in eval mode, are so already.
    """
    training = [child for child in module.modules() if child.training]
    if not settled:
        module.eval()
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True
