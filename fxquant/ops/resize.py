"""Interpolation as ONNX's Resize: nearest on codes, linear and cubic in float; antialiased as two matrix products.

A scale factor that the model gave is what torch computes coordinates with, and so it is what Resize gets. Otherwise it
gets the output size, or, so that a symbolic batch needs no runtime shape, the factor that yields it: onnxruntime
computes with output / input either way. Resize's `axes` attribute stays unused: level ALL of onnxruntime 1.31, which
puts channels last, cannot permute its sizes and refuses the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from fxquant.ops._arguments import bind, bind_first, define, ints, static_shape
from fxquant.ops._sizes import runtime_size
from fxquant.ops.base import Emitter, OpDef, Role, Writer

aten = torch.ops.aten


@dataclass(frozen=True)
class Sampling:
    """How Resize interpolates: its mode, and the coordinates when corners are not aligned."""

    mode: str
    coordinates: str = "half_pixel"
    nearest: str | None = None
    cubic: float | None = None


NEAREST = Sampling("nearest", "asymmetric", "floor")
NEAREST_EXACT = Sampling("nearest", "half_pixel", "round_prefer_ceil")
LINEAR = Sampling("linear")
CUBIC = Sampling("cubic", cubic=-0.75)


def _factors(bound: dict[str, Any]) -> list[float] | None:
    """The scale factors that the call gives, one for each spatial axis; None if it gives none, or not all."""
    if "scale_factors" in bound:
        given = bound["scale_factors"]
    else:
        given = [value for key, value in bound.items() if key.startswith("scales")]
    if not given or any(value is None or isinstance(value, fx.Node) for value in given):
        return None
    return [float(value) for value in given]


def _emit_resize(sampling: Sampling) -> Emitter:
    def emit(node: fx.Node, w: Writer) -> ir.Value:
        bound = bind(node)
        corners = bool(bound.get("align_corners", False))
        factors = None if corners else _factors(bound)
        factors = factors or _exact_factors(node, w)
        scales, sizes = (_scales(w, factors), None) if factors else (None, _sizes(node, w, bound))
        result: ir.Value = w.op(
            "Resize",
            [w.value(bind_first(node)), None, scales, sizes],
            mode=sampling.mode,
            coordinate_transformation_mode="align_corners" if corners else sampling.coordinates,
            nearest_mode=sampling.nearest,
            cubic_coeff_a=sampling.cubic,
        )
        return result

    return emit


def _scales(w: Writer, factors: Sequence[float]) -> ir.Value:
    return w.constant(np.array([1.0, 1.0, *factors], dtype=np.float32))


def _exact_factors(node: fx.Node, w: Writer) -> list[float] | None:
    """Output / input of each spatial axis in float32, where onnxruntime makes just this output size of it.

    None where a size is symbolic, where all are known (the sizes themselves serve), or where rounding is in the way.
    """
    shape = w.shape(node)
    source, target = static_shape(w.shape(bind_first(node))[2:]), static_shape(shape[2:])
    if source is None or target is None or static_shape(shape) is not None:
        return None
    factors = np.array(target, np.float32) / np.array(source, np.float32)
    for kind in (np.float32, np.float64):  # onnxruntime multiplies in the first, onnx's shape inference in the second
        made = factors.astype(kind) * np.array(source, kind)
        if np.floor(made).tolist() != list(target):
            return None
    return [float(factor) for factor in factors]


def _sizes(node: fx.Node, w: Writer, bound: dict[str, Any]) -> ir.Value:
    """The output's sizes, of all axes."""
    shape, given = w.shape(node), bound["output_size"]
    known, spatial = static_shape(shape), static_shape(shape[2:])
    if known is not None:
        return ints(w, *known)
    if spatial is None and not given:
        raise w.refuse(node, f"its output size {shape} is not known now")
    x = bind_first(node)
    lead = [ints(w, size) if isinstance(size, int) else runtime_size(w, x, axis) for axis, size in enumerate(shape[:2])]
    result: ir.Value = w.op("Concat", [*lead, ints(w, *spatial) if spatial is not None else w.sizes(given)], axis=0)
    return result


def _emit_antialiased(node: fx.Node, w: Writer) -> ir.Value:
    """M_h^T x M_w with torch's own resampling matrices: Resize's `antialias` was 0.06 to 2 off (onnxruntime 1.31)."""
    bound, x = bind(node), bind_first(node)
    source, target = static_shape(w.shape(x)[2:]), static_shape(w.shape(node)[2:])
    if source is None or target is None:
        raise w.refuse(node, f"it resizes {w.shape(x)} to {w.shape(node)}, which is not known now")
    rows, columns = (_matrix(node, bound, axis, source[axis], target[axis]) for axis in (0, 1))
    tall = w.op("MatMul", [w.constant(np.ascontiguousarray(rows.T)), w.value(x)])
    result: ir.Value = w.op("MatMul", [tall, w.constant(columns)])
    return result


def _matrix(node: fx.Node, bound: dict[str, Any], axis: int, size: int, wanted: int) -> np.ndarray[Any, Any]:
    """The resampling of one axis, [size, wanted]: what torch makes of the unit matrix, resizing its columns alone."""
    packet = getattr(aten, str(node.target).split(".")[1])
    unit = torch.eye(size)[None, None]
    factors = _factors(bound)
    scales = (None, None) if factors is None else (1.0, factors[axis])
    resampled: torch.Tensor = packet.default(unit, [size, wanted], bound["align_corners"], *scales)
    matrix: np.ndarray[Any, Any] = resampled[0, 0].numpy()
    return matrix


def _nearest(name: str, stem: str, sampling: Sampling) -> OpDef:
    packets = [getattr(aten, f"{stem}{axes}d") for axes in (1, 2, 3)]
    targets = [target for packet in packets for target in (packet.default, packet.vec)]
    return define(name, targets, Role.GRID_PRESERVING, _emit_resize(sampling), "Resize")


def _smooth(name: str, emit: Emitter, *packets: Any) -> OpDef:
    targets = [target for packet in packets for target in (packet.default, packet.vec)]
    return define(name, targets, Role.FLOAT, emit, "Resize")


_LINEARS = (aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_trilinear3d)
_ANTIALIASED = (aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa)

RESIZE: tuple[OpDef, ...] = (
    _nearest("upsample_nearest", "upsample_nearest", NEAREST),
    _nearest("upsample_nearest_exact", "_upsample_nearest_exact", NEAREST_EXACT),
    _smooth("upsample_linear", _emit_resize(LINEAR), *_LINEARS),
    _smooth("upsample_cubic", _emit_resize(CUBIC), aten.upsample_bicubic2d),
    _smooth("upsample_antialiased", _emit_antialiased, *_ANTIALIASED),
)
