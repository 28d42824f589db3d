"""Where masks meet attention scores: what lies between the product that makes them and the softmax that reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.graph.program import Program, value_type
from fxquant.graph.rewriter import Rewriter
from fxquant.ops._emit import argument
from fxquant.ops.base import Role

from .values import definition_of, is_float_value

aten = torch.ops.aten

MASK_REASON = "mask before softmax"
SOFTMAXES = frozenset({"softmax", "safe_softmax", "log_softmax"})
ADDITIVE = frozenset({"add", "subtract", "reverse_subtract", "minimum", "maximum"})
CHOOSING = frozenset({"where", "masked_fill"})
OTHERS = frozenset({"multiply", "divide", "neg", "cast", "clamp", "clamp_one_side", "concat", "stack"})
WALKED = ADDITIVE | CHOOSING | OTHERS
PRODUCTS = frozenset({"matmul", "baddbmm", "addmm", "einsum", "scaled_dot_product_attention"})


@dataclass(frozen=True)
class Approach:
    """What leads to one softmax.

    Arguments:
        softmax: the softmax, or the exp of a hand-written one.
        between: the element-wise operations in front of it, nearest first.
        sources: the values that these (or the softmax itself) read, scores and masks alike.
    """

    softmax: fx.Node
    between: tuple[fx.Node, ...]
    sources: tuple[fx.Node, ...]

    def is_masked(self, program: Program) -> bool:
        """Whether a second tensor is added to the scores or takes their place; Python numbers only scale or shift."""
        names = {_name(program, node) for node in self.between}
        tensors = [source for source in self.sources if not _is_single(source)]
        return bool(names & CHOOSING) or (bool(names & ADDITIVE) and len(tensors) > 1)


def approaches(program: Program) -> Iterator[Approach]:
    """One for each softmax, and for each exp that is summed (a hand-written softmax), in graph order."""
    for node in program.graph.nodes:
        name = _name(program, node)
        if name in SOFTMAXES or (name == "exp" and any(_name(program, user) == "sum" for user in node.users)):
            yield _approach(program, node)


def mask_islands(program: Program) -> dict[fx.Node, str]:
    """The nodes to be left in float for the sake of a mask, each with the reason.

    1. The element-wise operations between a masked softmax and what makes the scores, and the softmax itself.
    2. What is computed without any weight or product and read by case 1 alone: the mask's own arithmetic.
    """
    found: dict[fx.Node, str] = {}
    for approach in approaches(program):
        if approach.is_masked(program):
            found.update(dict.fromkeys((*approach.between, approach.softmax), MASK_REASON))
    if found:
        weighted = _weighted(program)
        for node in reversed(list(program.graph.nodes)):
            is_call = node.op in ("call_function", "call_module")
            if is_call and _holds_floats(node) and node not in weighted and node.users:
                if all(user in found or not _holds_floats(user) for user in node.users):
                    found[node] = MASK_REASON
    return found


def split_product(rewriter: Rewriter, node: fx.Node, reason: str) -> str:
    """Make a baddbmm the sum of its mask, in float for `reason`, and the product; returns what stands against it."""
    mask, left, right, beta, alpha = (argument(node, key) for key in ("self", "batch1", "batch2", "beta", "alpha"))
    kind, own = value_type(left), value_type(node)
    if beta != 1 or not isinstance(alpha, int | float):
        return f"beta={beta}, alpha={alpha}: only a mask that is added as it is can be set apart"
    if alpha != 1:
        left = _call(rewriter, node, "scale", aten.mul.Tensor, (left, alpha), kind)
    scores = _call(rewriter, node, "scores", aten.bmm.default, (left, right), own)
    rewriter.turn_into_function(node, aten.add.Tensor, (scores, mask))
    rewriter.set_float_reason(node, reason)
    return ""


def _call(rewriter: Rewriter, node: fx.Node, part: str, target: Any, args: tuple[Any, ...], kind: Any) -> fx.Node:
    return rewriter.call_function(target, args, name=f"{node.name}_{part}", before=node, like=node, type=kind)


def _approach(program: Program, softmax: fx.Node) -> Approach:
    between: dict[fx.Node, None] = {}
    sources: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    pending = [softmax.all_input_nodes[0]]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        definition = definition_of(program, node)
        if definition is not None and definition.name in WALKED:
            between[node] = None
            pending.extend(source for source in node.all_input_nodes if is_float_value(source))
        elif _keeps_values(program, node):
            pending.append(node.all_input_nodes[0])
        else:
            sources[node] = None
    return Approach(softmax, tuple(between), tuple(sources))


def _keeps_values(program: Program, node: fx.Node) -> bool:
    """Reshapes and the like, also the largest score that a hand-written softmax subtracts; an embedding is a source."""
    definition = definition_of(program, node)
    if definition is None or definition.role_for(node) is not Role.GRID_PRESERVING:
        return False
    return definition.name != "embedding" and bool(node.all_input_nodes)


def _weighted(program: Program) -> set[fx.Node]:
    """The nodes that depend on a weighted operation or a product of activations."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        definition = definition_of(program, node)
        is_product = definition is not None and (
            definition.role_for(node) is Role.WEIGHTED or definition.name in PRODUCTS
        )
        if is_product or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _name(program: Program, node: fx.Node) -> str:
    definition = definition_of(program, node)
    return "" if definition is None else definition.name


def _is_single(node: fx.Node) -> bool:
    kind = value_type(node)
    return kind is not None and all(size == 1 for size in kind.shape)


def _holds_floats(node: fx.Node) -> bool:
    """Whether a node makes a tensor of a floating dtype, or several tensors; graph outputs read floats too."""
    kind = node.meta.get("type")
    return node.op == "output" or isinstance(kind, tuple) or is_float_value(node)
