"""Attention where decompose-attention did not take it apart, and the softmax that survives fully masked rows.

    softmax(scale q k^T + mask) v    q: [..., L, E], k: [..., S, E], v: [..., S, Ev]

A boolean mask puts -inf where it is False. A row that is masked everywhere gives zeros, as in torch (`_safe_softmax`).
Both run in float.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from fxquant.ops._arguments import ints, static_shape
from fxquant.ops._emit import argument, reduce, squeeze, unsqueeze
from fxquant.ops.base import OpDef, Role, Writer
from fxquant.spec import Limits

aten = torch.ops.aten


def attention_scale(node: fx.Node, head_size: int) -> float:
    """The factor on q k^T of a scaled_dot_product_attention node: 1 / sqrt(E) unless given."""
    given = argument(node, "scale")
    return 1.0 / math.sqrt(head_size) if given is None else float(given)


def _safe_softmax(writer: Writer, x: ir.Value, axis: int, dtype: torch.dtype) -> ir.Value:
    """Softmax; a row of -inf gives zeros instead of NaN."""
    top = reduce(writer, "ReduceMax", x, [axis], keepdim=True)
    masked = writer.op("Equal", [top, writer.operand(-math.inf, like=dtype)])
    zero = writer.operand(0.0, like=dtype)
    value: ir.Value = writer.op("Where", [masked, zero, writer.op("Softmax", [x], axis=axis)])
    return value


def _emit_safe_softmax(node: fx.Node, writer: Writer) -> ir.Value:
    x, dtype = writer.operand(node.args[0]), writer.dtype(node)
    source = argument(node, "self")
    axis = argument(node, "dim") % max(len(writer.shape(source)), 1)
    return _safe_softmax(writer, x if writer.dtype(source) == dtype else writer.cast(x, dtype), axis, dtype)


def _emit_attention(node: fx.Node, writer: Writer) -> ir.Value:
    if argument(node, "dropout_p"):
        raise writer.refuse(
            node, f"dropout_p={argument(node, 'dropout_p')} is active", "Capture the model in eval mode."
        )
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    head_size, rank, dtype = writer.shape(query)[-1], len(writer.shape(key)), writer.dtype(node)
    if not isinstance(head_size, int):
        raise writer.refuse(node, f"the head size {head_size} is not known", "Capture with a fixed head size.")
    scale = writer.operand(attention_scale(node, head_size), like=dtype)
    k = writer.op("Transpose", [_heads(node, key, writer)], perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = writer.op("MatMul", [writer.op("Mul", [writer.value(query), scale]), k])
    softmax = _masked_softmax(node, scores, writer)
    result: ir.Value = writer.op("MatMul", [softmax, _heads(node, value, writer)])
    return result


def _heads(node: fx.Node, x: fx.Node, writer: Writer) -> ir.Value:
    """Keys or values with their heads repeated as grouped queries need them."""
    if not argument(node, "enable_gqa"):
        return writer.value(x)
    counts = static_shape([writer.shape(argument(node, "query"))[-3], writer.shape(x)[-3]])
    if counts is None:
        raise writer.refuse(node, "enable_gqa with a symbolic number of heads", "Capture with fixed ones.")
    index = np.repeat(np.arange(counts[1]), counts[0] // counts[1])
    value: ir.Value = writer.op("Gather", [writer.value(x), writer.constant(index)], axis=len(writer.shape(x)) - 3)
    return value


def _masked_softmax(node: fx.Node, scores: ir.Value, writer: Writer) -> ir.Value:
    mask, dtype = argument(node, "attn_mask"), writer.dtype(node)
    axis = max(len(writer.shape(argument(node, name))) for name in ("query", "key")) - 1
    hidden = writer.operand(-math.inf, like=dtype)
    if argument(node, "is_causal"):
        scores = writer.op("Where", [_causal(node, writer), scores, hidden])
    if mask is None:
        value: ir.Value = writer.op("Softmax", [scores], axis=axis)
        return value
    if writer.dtype(mask) == torch.bool:
        masked = writer.op("Where", [writer.value(mask), scores, hidden])
    else:
        masked = writer.op("Add", [scores, writer.value(mask)])
    axis = max(axis, len(writer.shape(mask)) - 1)
    return _safe_softmax(writer, masked, axis, dtype)


def _causal(node: fx.Node, writer: Writer) -> ir.Value:
    """[L, S] of booleans: query i sees keys 0 to i."""
    query, key = argument(node, "query"), argument(node, "key")
    rows = unsqueeze(writer, _positions(query, writer), [1])
    value: ir.Value = writer.op("LessOrEqual", [unsqueeze(writer, _positions(key, writer), [0]), rows])
    return value


def _positions(x: fx.Node, writer: Writer) -> ir.Value:
    """0, 1 ... up to the size of the last axis but one."""
    shape = writer.shape(x)
    size = shape[-2]
    if isinstance(size, int):
        return writer.constant(np.arange(size))
    axis = len(shape) - 2
    count = writer.op("Gather", [writer.op("Shape", [writer.value(x)]), ints(writer, axis)], axis=0)
    zero, one = writer.operand(0), writer.operand(1)
    value: ir.Value = writer.op("Range", [zero, squeeze(writer, count, [0]), one])
    return value


ATTENTION: tuple[OpDef, ...] = (
    OpDef(
        name="scaled_dot_product_attention",
        targets=(aten.scaled_dot_product_attention.default,),
        role=Role.FLOAT,
        emit=_emit_attention,
        onnx_types=("Attention",),
    ),
    OpDef(
        name="safe_softmax",
        targets=(aten._safe_softmax.default,),
        role=Role.FLOAT,
        emit=_emit_safe_softmax,
        onnx_types=("Softmax",),
        output_range=Limits(0.0, 1.0),
    ),
)
