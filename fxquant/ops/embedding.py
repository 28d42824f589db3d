"""Embedding: rows of a table.

The codes of the output are codes of the table: onnxruntime gathers them as integers where the table is stored in the
output's own grid (u8, one scale), and otherwise dequantizes the table once and gathers floats. `padding_idx` and its
like change gradients only.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import fx

from fxquant.ops.base import OpDef, Role, Writer


def _emit_embedding(node: fx.Node, writer: Writer) -> ir.Value:
    table, indices = node.args[:2]
    assert isinstance(table, fx.Node)
    value: ir.Value = writer.op("Gather", [writer.weight(table), writer.operand(indices)], axis=0)
    return value


EMBEDDING: tuple[OpDef, ...] = (
    OpDef(
        name="embedding",
        targets=(torch.ops.aten.embedding.default,),
        role=Role.GRID_PRESERVING,
        emit=_emit_embedding,
        onnx_types=("Gather",),
        weight=0,
    ),
)
