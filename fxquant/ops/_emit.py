"""Small ONNX forms that several families of emitters share, above all those that differ between opsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from fxquant.ops.base import Size, Writer


def argument(node: fx.Node, name: str) -> Any:
    """Argument `name` of a call of an ATen overload, be it given by position, by keyword or by the schema's default."""
    assert isinstance(node.target, torch._ops.OpOverload), node.format_node()
    for index, parameter in enumerate(node.target._schema.arguments):
        if parameter.name == name:
            if index < len(node.args):
                return node.args[index]
            return node.kwargs.get(name, parameter.default_value)
    raise KeyError(f"{node.target} has no argument '{name}'")


def optional_value(node: fx.Node, name: str, writer: Writer) -> ir.Value | None:
    """The ONNX value of a tensor argument that may be None or left out."""
    given = argument(node, name)
    return writer.value(given) if isinstance(given, fx.Node) else None


def called_module(node: fx.Node) -> torch.nn.Module:
    """The module that a call_module node calls."""
    owner = node.graph.owning_module
    assert owner is not None and node.op == "call_module", node.format_node()
    return owner.get_submodule(str(node.target))


def full_rank(value: int | Sequence[int], axes: int) -> list[int]:
    """An int, or a list of one, as a list of `axes` ints."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    return items * axes if len(items) == 1 else items  # type: ignore[return-value]  # a list of ints either way


def axes_of(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """Axes as sorted non-negative ints; None or an empty list means all of them, as in ATen's reductions."""
    items = [dims] if isinstance(dims, int) else list(dims or range(rank))
    return sorted({dim % max(rank, 1) for dim in items})


def reduce(writer: Writer, op_type: str, x: ir.Value, axes: Sequence[int], *, keepdim: bool) -> ir.Value:
    """A Reduce* node: its axes are an input from opset 18 on (ReduceSum: from 13 on), an attribute before."""
    result: ir.Value
    if writer.opset >= 18 or op_type == "ReduceSum":
        result = writer.op(op_type, [x, writer.sizes(list(axes))], keepdims=int(keepdim))
    else:
        result = writer.op(op_type, [x], axes=list(axes), keepdims=int(keepdim))
    return result


def unsqueeze(writer: Writer, x: ir.Value, axes: Sequence[int]) -> ir.Value:
    """An Unsqueeze node."""
    result: ir.Value = writer.op("Unsqueeze", [x, writer.sizes(list(axes))])
    return result


def squeeze(writer: Writer, x: ir.Value, axes: Sequence[int]) -> ir.Value:
    """A Squeeze node."""
    result: ir.Value = writer.op("Squeeze", [x, writer.sizes(list(axes))])
    return result


def reshape(writer: Writer, x: ir.Value, sizes: Sequence[Size]) -> ir.Value:
    """A Reshape node; 0 keeps the axis at that place and one -1 is inferred, as ONNX has it."""
    result: ir.Value = writer.op("Reshape", [x, writer.sizes(sizes)])
    return result


def reshape_like(writer: Writer, x: ir.Value, shape: Sequence[int | str], reference: ir.Value) -> ir.Value:
    """Reshape to the shape of `reference`, which is `shape`; a constant if at most one size of it is symbolic."""
    symbolic = [size for size in shape if isinstance(size, str)]
    if len(symbolic) <= 1 and 0 not in shape:
        return reshape(writer, x, [-1 if isinstance(size, str) else size for size in shape])
    result: ir.Value = writer.op("Reshape", [x, writer.op("Shape", [reference])])
    return result


def filled(writer: Writer, shape: Sequence[int], number: float, dtype: torch.dtype) -> ir.Value:
    """A constant tensor of one number."""
    kind = ir.tensor_adapters.from_torch_dtype(dtype).numpy()
    return writer.constant(np.full(tuple(shape), number, dtype=kind))
