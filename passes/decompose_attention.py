"""Take scaled_dot_product_attention apart, so that its two products can be quantized: softmax(scale q k^T + mask) v."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage, ValueType, input_slots, value_type
from fxquant.graph.rewriter import Rewriter
from fxquant.ops._emit import argument
from fxquant.ops.attention import attention_scale

from .masks import approaches, split_product

aten = torch.ops.aten
Shape = tuple[int | str, ...]

_SHAPE_ONLY = (
    aten.reshape.default,
    aten.view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.unflatten.int,
)
MASK_REASON = "attention mask"


@dataclass(frozen=True)
class DecomposeAttention(Pass):
    """Replace each scaled_dot_product_attention `a` by the products `a_scores` and `a`, and what stands between them.

    1. The scale is folded into the linear layer that makes q, where q is that layer's whole output (reshaped,
       transposed) and its weight and bias have no other user. It costs nothing at run time, and is exact for a power
       of two (head sizes 16, 64, 256).
    2. Elsewhere (one layer for q, k and v, rotary embeddings ...) q is multiplied: `a_scale`. Such a layer is not
       folded, because q, k and v share a grid there, of which q would then use a fraction.
    3. A boolean mask puts -inf in the scores where it is False, a float mask is added: `a_mask`, kept in float.
    4. is_causal hides later keys: positions are compared, `a_causal`, also where the lengths are symbolic.
    5. Where a mask may hide a whole row, `a_softmax` is torch's `_safe_softmax`, which gives zeros for it; a mask
       that is a buffer is looked at.
    6. enable_gqa repeats the heads of k and v: `a_key_heads`, `a_value_heads`.
    7. A baddbmm(mask, q, k) in front of a softmax (nn.MultiheadAttention with need_weights, BLOOM) is a product with
       its mask built in: it becomes `a_scores`, and `a` is the sum with the mask, kept in float. A beta is declined.

    Either way the scores are the product itself, so that onnxruntime computes their codes (QLinearMatMul) and,
    unmasked, those of the softmax: a multiplication behind the product would put both in float. Declines, with the
    reason, an active dropout, and head sizes or head counts that are not known. Contract: PRESERVES (torch multiplies
    q and k by sqrt(scale) each: head sizes 16 to 80 differed by at most 2e-6 of the largest output).

    Options:
        fold_scale: False leaves all parameters alone (case 2 always).
    """

    name: ClassVar[str] = "decompose-attention"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    fold_scale: bool = True

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Visit every attention."""
        for node in list(program.graph.nodes):
            if node.target is aten.scaled_dot_product_attention.default:
                reason = _obstacle(node)
                if reason:
                    rewriter.miss(node, f"{node.name} not decomposed: {reason}")
                else:
                    _Attention(program, rewriter, node).decompose(self.fold_scale)
        sources = [source for approach in approaches(program) for source in approach.sources]
        for node in dict.fromkeys(source for source in sources if source.target is aten.baddbmm.default):
            reason = split_product(rewriter, node, MASK_REASON)  # case 7
            if reason:
                rewriter.miss(node, f"{node.name} not decomposed: {reason}")


def _obstacle(node: fx.Node) -> str:
    if argument(node, "dropout_p"):
        return f"dropout_p={argument(node, 'dropout_p')} is active; capture the model in eval mode"
    query, key, value = (_shape(argument(node, name)) for name in ("query", "key", "value"))
    if not isinstance(query[-1], int):
        return f"the head size {query[-1]} is symbolic"
    if argument(node, "enable_gqa") and any(not isinstance(shape[-3], int) for shape in (query, key, value)):
        return "the number of heads is symbolic"
    return ""


class _Attention:
    """The decomposition of one node."""

    def __init__(self, program: Program, rewriter: Rewriter, node: fx.Node) -> None:
        self.program = program
        self.rewriter = rewriter
        self.node = node
        self.dtype = _type(node).dtype

    def decompose(self, fold_scale: bool) -> None:
        """Write the parts in front of the node, and make it the second product."""
        query = self._scaled(argument(self.node, "query"), fold_scale)
        key = self._heads("key")
        *batch, keys, size = _shape(key)
        turned = self._make("key", aten.transpose.int, (key, -2, -1), (*batch, size, keys))
        shape = (*_broadcast(_shape(query)[:-2], tuple(batch)), _shape(query)[-2], keys)
        scores = self._make("scores", aten.matmul.default, (query, turned), shape)
        self.rewriter.turn_into_function(self.node, aten.matmul.default, (self._softmax(scores), self._heads("value")))

    def _make(
        self,
        part: str,
        target: torch._ops.OpOverload,
        args: Sequence[object],
        shape: Shape,
        dtype: torch.dtype | None = None,
    ) -> fx.Node:
        kind = ValueType(tuple(shape), dtype or self.dtype)
        name = f"{self.node.name}_{part}"
        return self.rewriter.call_function(target, args, name=name, before=self.node, like=self.node, type=kind)

    def _scaled(self, query: fx.Node, fold_scale: bool) -> fx.Node:
        """Cases 1 and 2."""
        size = _shape(query)[-1]
        assert isinstance(size, int)
        scale = attention_scale(self.node, size)
        is_read_once = input_slots(self.node).count(query) == 1
        layer = _own_linear(query) if fold_scale and is_read_once else None
        if scale == 1.0:
            return query
        if layer is None:
            return self._make("scale", aten.mul.Tensor, (query, scale), _shape(query))
        for parameter in layer.args[1:]:
            if isinstance(parameter, fx.Node):
                self.rewriter.set_tensor(str(parameter.target), self.program.tensor(parameter).detach() * scale)
        return query

    def _heads(self, name: str) -> fx.Node:
        """Case 6: k or v, each head as often as there are queries for it."""
        x: fx.Node = argument(self.node, name)
        if not argument(self.node, "enable_gqa"):
            return x
        *batch, heads, length, size = _shape(x)
        wanted = _shape(argument(self.node, "query"))[-3]
        assert isinstance(heads, int) and isinstance(wanted, int)
        if heads == wanted:
            return x
        axis, times = len(batch) + 1, wanted // heads
        grouped = self._make(f"{name}_groups", aten.unsqueeze.default, (x, axis), (*batch, heads, 1, length, size))
        repeats = [1] * axis + [times, 1, 1]
        repeated = self._make(
            f"{name}_repeat", aten.repeat.default, (grouped, repeats), (*batch, heads, times, length, size)
        )
        return self._make(
            f"{name}_heads", aten.flatten.using_ints, (repeated, axis - 1, axis), (*batch, wanted, length, size)
        )

    def _softmax(self, scores: fx.Node) -> fx.Node:
        """Cases 3 to 5."""
        mask = argument(self.node, "attn_mask")
        if argument(self.node, "is_causal"):
            causal = self._causal()
            part = "mask" if mask is None else "causal_mask"
            scores = self._masked(part, aten.where.ScalarOther, (causal, scores, -math.inf))
        if mask is not None and _type(mask).dtype == torch.bool:
            scores = self._masked("mask", aten.where.ScalarOther, (mask, scores, -math.inf))
        elif mask is not None:
            scores = self._masked("mask", aten.add.Tensor, (scores, mask))
        both = mask is not None and bool(argument(self.node, "is_causal"))
        safe = both or (mask is not None and self._may_hide_a_row(mask))
        target = aten._safe_softmax.default if safe else aten.softmax.int
        return self._make("softmax", target, (scores, -1), _shape(scores))

    def _masked(self, part: str, target: torch._ops.OpOverload, args: tuple[object, ...]) -> fx.Node:
        first, second = (_shape(arg) for arg in args[:2] if isinstance(arg, fx.Node))
        made = self._make(part, target, args, _broadcast(first, second))
        self.rewriter.set_float_reason(made, MASK_REASON)
        return made

    def _causal(self) -> fx.Node:
        """[L, S] of booleans: key j is seen by query i if j <= i."""
        rows, columns = self._positions("query"), self._positions("key")
        length, keys = _shape(rows)[0], _shape(columns)[0]
        stood = self._make("rows", aten.unsqueeze.default, (rows, 1), (length, 1), torch.int64)
        return self._make("causal", aten.le.Tensor, (columns, stood), (length, keys), torch.bool)

    def _positions(self, name: str) -> fx.Node:
        x = argument(self.node, name)
        size: int | str | fx.Node = _shape(x)[-2]
        if isinstance(size, str):
            size = self._make(f"{name}_length", aten.sym_size.int, (x, len(_shape(x)) - 2), ())
            self.rewriter.set_type(size, None)
        tensor = next(chain(self.program.module.parameters(), self.program.module.buffers()), None)
        device = (
            torch.device("cpu") if tensor is None else tensor.device
        )  # a literal: it follows the module when that moves
        kind = ValueType((_shape(x)[-2],), torch.int64)
        part, before = f"{self.node.name}_{name}_positions", self.node
        return self.rewriter.call_function(
            aten.arange.default, (size,), {"device": device}, name=part, before=before, like=before, type=kind
        )

    def _may_hide_a_row(self, mask: fx.Node) -> bool:
        if mask.op != "get_attr":
            return True
        values = self.program.tensor(mask)
        hidden = ~values if values.dtype == torch.bool else values == -math.inf
        return bool(hidden.all(-1).any())


def _own_linear(query: fx.Node) -> fx.Node | None:
    """Case 1: the linear layer whose whole output is `query`, if neither that nor its parameters are read elsewhere."""
    while query.target in _SHAPE_ONLY and len(query.users) == 1 and isinstance(query.args[0], fx.Node):
        query = query.args[0]
    if query.target is not aten.linear.default or len(query.users) != 1:
        return None
    parameters = [arg for arg in query.args[1:] if isinstance(arg, fx.Node)]
    own = all(parameter.op == "get_attr" and len(parameter.users) == 1 for parameter in parameters)
    return query if own else None


def _type(node: fx.Node) -> ValueType:
    found = value_type(node)
    assert found is not None, node.format_node()
    return found


def _shape(node: fx.Node) -> Shape:
    return _type(node).shape


def _broadcast(left: Shape, right: Shape) -> Shape:
    """The shape that two shapes broadcast to; where a symbolic size meets a known one above 1, the known one."""
    rank = max(len(left), len(right))
    padded = [(1,) * (rank - len(shape)) + shape for shape in (left, right)]
    return tuple(b if a == 1 or (isinstance(a, str) and b != 1) else a for a, b in zip(*padded, strict=True))
