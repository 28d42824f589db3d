"""What is known before the model runs: parameters, buffers, and what is computed from them alone."""

from __future__ import annotations

import torch
from torch import fx

from fxquant.graph.program import Program, value_type
from fxquant.numerics.live_batch_norm import ConstantModule

_RANDOM = torch.Tag.nondeterministic_seeded


class Constants:
    """Values of the nodes that depend on get_attr nodes alone; computed by torch, exactly as the program computes them.

    A weight-standardised convolution's weight is such a value, and so is one that a live batch norm is folded into, as
    it is outside training: it becomes an initializer.

    Arguments:
        at_work: True for the values that training mode computes with: r' in place of r (numerics/live_batch_norm.py).
    """

    def __init__(self, program: Program, *, at_work: bool = False) -> None:
        self._program = program
        self._at_work = at_work
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
        if not inputs or value_type(node) is None or not all(self._known.get(source, False) for source in inputs):
            return False
        if node.op == "call_module":
            return isinstance(self._program.submodule(node), ConstantModule)
        return (
            node.op == "call_function"
            and isinstance(node.target, torch._ops.OpOverload)
            and _RANDOM not in node.target.tags
            and not node.target._schema.is_mutable
        )

    def _compute(self, node: fx.Node) -> torch.Tensor:
        if node.op == "get_attr":
            return self._program.tensor(node).detach().cpu()
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.tensor)
        module = self._program.submodule(node) if node.op == "call_module" else None
        function: object = node.target
        if isinstance(module, ConstantModule):
            function = module.at_work if self._at_work else module.at_rest
        assert callable(function)
        with torch.no_grad():
            result = function(*args, **kwargs)
        assert isinstance(result, torch.Tensor)
        return result.detach().cpu()
