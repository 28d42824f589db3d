"""Padding: constant, reflect, replicate, circular. torch lists (before, after) pairs from the last axis on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from fxquant.ops._arguments import MAX_INT, bind, computable, define, finish, ints, operand
from fxquant.ops.base import Emitter, OpDef, Role, Writer

aten = torch.ops.aten

_MODES = {"reflect": "reflect", "replicate": "edge"}


def onnx_pads(pad: Sequence[Any], rank: int) -> list[Any]:
    """torch's pairs as ONNX's list: all befores, then all afters, axis by axis."""
    befores, afters = [0] * rank, [0] * rank
    for index in range(len(pad) // 2):
        befores[rank - 1 - index], afters[rank - 1 - index] = pad[2 * index], pad[2 * index + 1]
    return befores + afters


def _constant_pad(node: fx.Node, w: Writer, pad: Sequence[Any], value: Any) -> ir.Value:
    dtype = computable(w.dtype(node))
    x = operand(w, bind(node)["self"], dtype)
    pads = w.sizes(onnx_pads(pad, len(w.shape(node))))
    number = operand(w, 0 if value is None else value, dtype)
    return finish(node, w, w.op("Pad", [x, pads, number], mode="constant"), dtype)


def _copying_pad(node: fx.Node, w: Writer, pad: Sequence[Any], mode: str) -> ir.Value:
    """What is cut off (a negative pad) goes first; then the rest is read from what is left."""
    rank = len(w.shape(node))
    if any(isinstance(size, fx.Node) for size in pad):
        raise w.refuse(node, f"its {mode} padding {list(pad)} is not known now")
    pads = onnx_pads(pad, rank)
    x = _cropped(w, w.value(bind(node)["self"]), pads)
    grown = [max(size, 0) for size in pads]
    if mode == "circular":
        return _circular(w, x, grown)
    result: ir.Value = w.op("Pad", [x, w.sizes(grown)], mode=_MODES[mode])
    return result


def _cropped(w: Writer, x: ir.Value, pads: list[int]) -> ir.Value:
    rank = len(pads) // 2
    for axis in range(rank):
        before, after = min(pads[axis], 0), min(pads[rank + axis], 0)
        if before or after:
            x = w.op("Slice", [x, ints(w, -before), ints(w, after or MAX_INT), ints(w, axis)])
    return x


def _circular(w: Writer, x: ir.Value, pads: list[int]) -> ir.Value:
    rank = len(pads) // 2
    for axis in range(rank):
        before, after = pads[axis], pads[rank + axis]
        parts = [w.op("Slice", [x, ints(w, -before), ints(w, MAX_INT), ints(w, axis)])] if before else []
        parts += [x]
        parts += [w.op("Slice", [x, ints(w, 0), ints(w, after), ints(w, axis)])] if after else []
        x = w.op("Concat", parts, axis=axis) if len(parts) > 1 else x
    return x


def _emit_pad(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    if bound["mode"] == "constant":
        return _constant_pad(node, w, bound["pad"], bound["value"])
    return _copying_pad(node, w, bound["pad"], bound["mode"])


def _emit_constant_pad(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    return _constant_pad(node, w, bound["pad"], bound["value"])


def _padding(mode: str) -> Emitter:
    def emit(node: fx.Node, w: Writer) -> ir.Value:
        return _copying_pad(node, w, bind(node)["padding"], mode)

    return emit


_REFLECTS = (aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default)
_REPLICATES = (aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default)

PADDING: tuple[OpDef, ...] = (
    define("pad", [aten.pad.default], Role.FLOAT, _emit_pad, "Pad"),
    define("constant_pad", [aten.constant_pad_nd.default], Role.FLOAT, _emit_constant_pad, "Pad"),
    define("reflection_pad", _REFLECTS, Role.FLOAT, _padding("reflect"), "Pad"),
    define("replication_pad", _REPLICATES, Role.FLOAT, _padding("replicate"), "Pad"),
)
