"""Compute what depends on parameters alone once, instead of at every forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.constants import Constants
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
        constants = Constants(program)
        found = [node for node in program.graph.nodes if constants.is_constant(node)]
        for node in found:
            if (
                is_parameter(node)
                or not is_float_value(node)
                or all(constants.is_constant(user) for user in node.users)
            ):
                continue
            if _is_whole_view(program, node, constants.tensor(node)):
                rewriter.miss(node, "not folded: it shows all of one parameter, and stays a weight")  # case 2
            else:
                replace_by_buffer(rewriter, node, constants.tensor(node))  # case 1
        rewriter.erase_dead(*reversed(found))


def replace_by_buffer(rewriter: Rewriter, node: fx.Node, value: torch.Tensor) -> None:
    """Put a buffer `folded.<node>` that holds `value` in the place of `node`."""
    container = f"{CONTAINER}.{node.name}"
    rewriter.add_module(container, torch.nn.Module())
    rewriter.add_tensor(f"{container}.value", value.contiguous().clone(), parameter=False)
    buffer = rewriter.get_attr(f"{container}.value", name=f"{node.name}_folded", before=node, like=node)
    rewriter.replace_uses(node, buffer)


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
