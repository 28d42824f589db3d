"""Tensors made from nothing but sizes and numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from fxquant.ops._arguments import (
    as_dtype,
    bind,
    computable,
    define,
    finish,
    identity,
    ints,
    is_float_size,
    is_size,
    operand,
    static_shape,
)
from fxquant.ops.base import Emitter, OpDef, Role, Writer

aten = torch.ops.aten


def _constant(w: Writer, tensor: torch.Tensor) -> ir.Value:
    return w.constant(tensor.numpy())


def _filled(node: fx.Node, w: Writer, value: Any, sizes: ir.Value | None = None) -> ir.Value:
    """One number expanded to the node's shape: an initializer of its full size would swell the file."""
    number = operand(w, value, w.dtype(node))
    known = static_shape(w.shape(node))
    if known == ():
        return identity(w, number)
    if known is not None:
        sizes = ints(w, *known)
    result: ir.Value = w.op("Expand", [number, sizes])
    return result


def _from_sizes(value: float) -> Emitter:
    def emit(node: fx.Node, w: Writer) -> ir.Value:
        return _filled(node, w, value, w.sizes(bind(node)["size"]))

    return emit


def _emit_full(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    return _filled(node, w, bound["fill_value"], w.sizes(bound["size"]))


def _like(value: float) -> Emitter:
    def emit(node: fx.Node, w: Writer) -> ir.Value:
        return _filled_like(node, w, value)

    return emit


def _emit_full_like(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    return _filled_like(node, w, bound["fill_value"] if "fill_value" in bound else bound["value"])


def _filled_like(node: fx.Node, w: Writer, value: Any) -> ir.Value:
    if static_shape(w.shape(node)) is not None:
        return _filled(node, w, value)
    return _filled(node, w, value, w.op("Shape", [w.value(bind(node)["self"])]))


def _known(compute: Callable[..., torch.Tensor], *names: str) -> Emitter:
    """The emitter of what torch computes from numbers that are known now."""

    def emit(node: fx.Node, w: Writer) -> ir.Value:
        bound = bind(node)
        values = [bound[name] for name in names]
        if any(isinstance(value, fx.Node) for value in values):
            raise w.refuse(node, f"its {', '.join(names)} are not known now")
        return _constant(w, compute(*values, dtype=w.dtype(node)))

    return emit


def _emit_arange(node: fx.Node, w: Writer) -> ir.Value:
    """A constant where all three are known, else Range, in int64 or double for what Range lacks."""
    bound = bind(node)
    start, end, step = bound.get("start", 0), bound["end"], bound.get("step", 1)
    dtype = w.dtype(node)
    if not any(isinstance(value, fx.Node) for value in (start, end, step)):
        return _constant(w, torch.arange(start, end, step, dtype=dtype))
    whole = not any(is_float_size(value) for value in (start, end, step))
    work = torch.int64 if whole else torch.float64
    return as_dtype(w, w.op("Range", [operand(w, value, work) for value in (start, end, step)]), work, dtype)


def _emit_scalar_tensor(node: fx.Node, w: Writer) -> ir.Value:
    value = next(iter(bind(node).values()))
    if is_size(value) or not isinstance(value, fx.Node):
        return identity(w, operand(w, value, w.dtype(node)))
    raise w.refuse(node, "its value is a tensor")


def _triangle(upper: bool) -> Emitter:
    """Trilu is an operator from opset 14 on; below, a mask of the last two axes, if their sizes are known."""

    def emit(node: fx.Node, w: Writer) -> ir.Value:
        bound = bind(node)
        dtype = torch.int64 if w.dtype(node) == torch.bool else computable(w.dtype(node))
        dtype = torch.int64 if dtype == torch.int32 else dtype
        x = operand(w, bound["self"], dtype)
        if w.opset >= 14:
            diagonal = w.operand(bound["diagonal"], torch.int64)
            return finish(node, w, w.op("Trilu", [x, diagonal], upper=int(upper)), dtype)
        sizes = static_shape(w.shape(node)[-2:])
        if sizes is None:
            raise w.refuse(node, f"ONNX has Trilu from opset 14 on, and the export is at opset {w.opset}")
        mask = (np.triu if upper else np.tril)(np.ones(sizes, dtype=np.bool_), bound["diagonal"])
        return finish(node, w, w.op("Where", [w.constant(mask), x, w.operand(0, dtype)]), dtype)

    return emit


def _indices(name: str) -> Emitter:
    def emit(node: fx.Node, w: Writer) -> ir.Value:
        bound = bind(node)
        compute = torch.tril_indices if name == "tril" else torch.triu_indices
        return _constant(w, compute(bound["row"], bound["col"], bound["offset"], dtype=w.dtype(node)))

    return emit


def _eye(n: int, m: int | None = None, *, dtype: torch.dtype) -> torch.Tensor:
    return torch.eye(n, n if m is None else m, dtype=dtype)


def _creation(name: str, targets: Sequence[Any], emit: Emitter, *onnx_types: str) -> OpDef:
    return define(name, targets, Role.FLOAT, emit, *onnx_types)


CREATION: tuple[OpDef, ...] = (
    _creation("arange", [aten.arange.default, aten.arange.start, aten.arange.start_step], _emit_arange, "Range"),
    _creation("zeros", [aten.zeros.default, aten.new_zeros.default], _from_sizes(0), "Expand"),
    _creation("empty", [aten.empty.memory_format, aten.new_empty.default], _from_sizes(0), "Expand"),
    _creation("ones", [aten.ones.default, aten.new_ones.default], _from_sizes(1), "Expand"),
    _creation("full", [aten.full.default, aten.new_full.default], _emit_full, "Expand"),
    _creation("zeros_like", [aten.zeros_like.default, aten.empty_like.default], _like(0), "Expand"),
    _creation("ones_like", [aten.ones_like.default], _like(1), "Expand"),
    _creation("full_like", [aten.full_like.default, aten.fill.Scalar, aten.fill.Tensor], _emit_full_like, "Expand"),
    _creation("eye", [aten.eye.default], _known(_eye, "n")),
    _creation("eye_of_two_sizes", [aten.eye.m], _known(_eye, "n", "m")),
    _creation("linspace", [aten.linspace.default], _known(torch.linspace, "start", "end", "steps")),
    _creation("scalar_tensor", [aten.scalar_tensor.default], _emit_scalar_tensor),
    _creation("upper_triangle", [aten.triu.default], _triangle(upper=True), "Trilu"),
    _creation("lower_triangle", [aten.tril.default], _triangle(upper=False), "Trilu"),
    _creation("upper_triangle_indices", [aten.triu_indices.default], _indices("triu")),
    _creation("lower_triangle_indices", [aten.tril_indices.default], _indices("tril")),
)
