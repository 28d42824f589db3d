"""What is known before the model runs: parameters, buffers, and what is computed from them alone."""

from __future__ import annotations

import torch
from torch import fx

from fxquant.graph.program import Program, value_type

_RANDOM = torch.Tag.nondeterministic_seeded


class Constants:
    """Values of the nodes that depend on get_attr nodes alone; computed by torch, exactly as the program computes them.

    A weight-standardised convolution's weight is such a value: it becomes an initializer.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._known: dict[fx.Node, bool] = {}
        self._tensors: dict[fx.Node, torch.Tensor] = {}

    def is_constant(self, node: fx.Node) -> bool:
        """Whether `node` is a tensor that depends on parameters and buffers alone."""
        if node not in self._known:
            # Graph order, not recursion: a chain may be longer than the stack is deep.
            for earlier in self._program.graph.nodes:
                self._known.setdefault(earlier, self._decide(earlier))
        return self._known[node]

    def tensor(self, node: fx.Node) -> torch.Tensor:
        """The value of a constant node, on the CPU."""
        if node not in self._tensors:
            self._tensors[node] = self._compute(node)
        return self._tensors[node]

    def _decide(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return True
        inputs = node.all_input_nodes
        if node.op != "call_function" or not inputs or value_type(node) is None:
            return False
        if (
            not isinstance(node.target, torch._ops.OpOverload)
            or _RANDOM in node.target.tags
            or node.target._schema.is_mutable
        ):
            return False
        return all(self._known.get(source, False) for source in inputs)

    def _compute(self, node: fx.Node) -> torch.Tensor:
        if node.op == "get_attr":
            return self._program.tensor(node).detach().cpu()
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.tensor)
        assert callable(node.target)
        with torch.no_grad():
            result = node.target(*args, **kwargs)
        assert isinstance(result, torch.Tensor)
        return result.detach().cpu()
