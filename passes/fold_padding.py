"""Fold zero pads into the convolutions behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage, input_slots, value_type
from fxquant.graph.rewriter import Rewriter
from fxquant.numerics.padded_convolution import PADDED_CONVOLUTION

from .layers import CONVOLUTIONS, user_list

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldPadding(Pass):
    """Let a convolution pad its input itself where a pad with zeros stands in front of it: onnxruntime pads in float
    only.

    1. The same amount at both ends of every axis: added to the padding of aten.convolution.
    2. Different amounts, as TensorFlow's 'same' padding has them: the convolution becomes fxquant.padded_convolution,
       which ONNX's Conv and its integer kernel can express; one that is padded_convolution already takes the sums.
    3. Several pads in a row fold one after the other, the last one first.

    Declines, with the reason: the pad has other users or is read by something else than a convolution (an average
    pooling with count_include_pad among them); it is not constant 0; it crops; its amounts are computed; it pads the
    batch or the channels; the convolution is transposed. Contract: PRESERVES.
    """

    name: ClassVar[str] = "fold-padding"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Visit the pads from the last to the first (case 3)."""
        for node in reversed(list(program.graph.nodes)):
            if node.op == "call_function" and node.target in (aten.constant_pad_nd.default, aten.pad.default):
                reason = _fold(rewriter, node)
                if reason is not None:
                    rewriter.miss(node, f"{node.name} not folded: {reason}")


def _fold(rewriter: Rewriter, pad: fx.Node) -> str | None:
    """Fold one pad; the reason if it cannot be done."""
    pairs = _pairs(pad)
    if isinstance(pairs, str):
        return pairs
    if len(pad.users) != 1:
        return user_list(pad)
    conv = next(iter(pad.users))
    if conv.target not in CONVOLUTIONS or conv.args[0] is not pad or input_slots(conv).count(pad) != 1:
        return f"{conv.name} behind it is no convolution that takes it as its input"
    if conv.args[6]:
        return f"{conv.name} is transposed, and its padding crops"
    begin, end = _own_padding(conv)
    found, spatial = value_type(pad), len(begin)
    if found is None or len(found.shape) != spatial + 2 or any(any(pair) for pair in pairs[spatial:]):
        return f"it pads the batch or the channels of {conv.name}"
    inner = [*pairs[:spatial], *[(0, 0)] * (spatial - len(pairs))][::-1]
    begin = [own + pair[0] for own, pair in zip(begin, inner, strict=True)]
    end = [own + pair[1] for own, pair in zip(end, inner, strict=True)]
    _set_padding(rewriter, conv, begin, end)
    rewriter.replace_input(conv, pad, pad.all_input_nodes[0])
    rewriter.erase(pad)
    return None


def _pairs(pad: fx.Node) -> list[tuple[int, int]] | str:
    """(begin, end) of each axis that a zero pad names, the last axis first; else why it is no zero pad."""
    names = [argument.name for argument in pad.target._schema.arguments]  # type: ignore[union-attr]  # an OpOverload
    given: dict[str, Any] = {**dict(zip(names, pad.args, strict=False)), **pad.kwargs}
    if given.get("mode", "constant") != "constant":
        return f"its mode is {given['mode']}"
    if given.get("value"):
        return f"it pads with {given['value']}, and a convolution with 0"
    amounts = list(given["pad"])
    if not all(isinstance(amount, int) for amount in amounts):
        return "its amounts are computed"
    if min(amounts, default=0) < 0:
        return f"it crops ({amounts})"
    return list(zip(amounts[::2], amounts[1::2], strict=True))


def _own_padding(conv: fx.Node) -> tuple[list[int], list[int]]:
    own: Any = conv.args[4]
    if conv.target is PADDED_CONVOLUTION:
        return list(own[: len(own) // 2]), list(own[len(own) // 2 :])
    return list(own), list(own)


def _set_padding(rewriter: Rewriter, conv: fx.Node, begin: list[int], end: list[int]) -> None:
    if begin == end:  # case 1
        if conv.target is PADDED_CONVOLUTION:
            rewriter.set_target(conv, aten.convolution.default)
        rewriter.set_arg(conv, 4, begin)
        return
    if conv.target is not PADDED_CONVOLUTION:  # case 2
        rewriter.set_target(conv, PADDED_CONVOLUTION)
    rewriter.set_arg(conv, 4, [*begin, *end])
