"""Compute what depends on parameters alone once, instead of at every forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage
from fxquant.graph.rewriter import Rewriter

from .values import is_float_value, is_parameter

CONTAINER = "folded"


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace expressions over parameters and buffers (weight normalization, gathered position biases) by buffers.

    1. The outermost call of such an expression becomes a buffer `folded.<node>`; what it alone needed is erased.
    2. A view that shows all of one parameter is left alone: a transposed weight stays a weight.

    Declines expressions with random or stateful operations. The parameters inside can no longer be trained through it:
    for post-training pipelines. Contract: PRESERVES.
    """

    name: ClassVar[str] = "fold-constants"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Find the outermost constant calls, compute them, and put buffers in their place."""
        values: dict[fx.Node, Any] = {}
        for node in list(program.graph.nodes):
            if is_parameter(node):
                values[node] = program.tensor(node).detach()
            elif node.op == "call_function" and _is_foldable(node, values):
                values[node] = _compute(node, values)
        outermost = [node for node in values if not is_parameter(node) and any(user not in values for user in node.users)]
        for node in outermost:
            if not isinstance(values[node], torch.Tensor) or not is_float_value(node):
                continue
            if _is_whole_view(program, node, values[node]):
                rewriter.miss(node, "not folded: it shows all of one parameter, and stays a weight")  # case 2
                continue
            self._replace(rewriter, node, values[node])
        dead = [node for node in reversed(list(program.graph.nodes)) if node in values]
        rewriter.erase_dead(*dead)

    def _replace(self, rewriter: Rewriter, node: fx.Node, value: torch.Tensor) -> None:
        container = f"{CONTAINER}.{node.name}"
        rewriter.add_module(container, torch.nn.Module())
        rewriter.add_tensor(f"{container}.value", value.contiguous().clone(), parameter=False)
        buffer = rewriter.get_attr(f"{container}.value", name=f"{node.name}_folded", before=node, like=node)
        rewriter.replace_uses(node, buffer)


def _is_foldable(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    inputs = node.all_input_nodes
    if not inputs or any(source not in values for source in inputs):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        random = torch.Tag.nondeterministic_seeded in node.target.tags
        return not random and not node.target._schema.is_mutable
    return True


def _compute(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: values[source])
    assert callable(node.target)
    with torch.no_grad():
        return node.target(*args, **kwargs)


def _is_whole_view(program: Program, node: fx.Node, value: torch.Tensor) -> bool:
    """Case 2: whether `value` shows all of one parameter's memory."""
    source = node
    while not is_parameter(source):
        if len(source.all_input_nodes) != 1:
            return False
        source = source.all_input_nodes[0]
    parameter = program.tensor(source)
    same_memory = value.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    return same_memory and value.numel() == parameter.numel()
