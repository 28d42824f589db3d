"""What repeats or reorders a tensor's elements: a Gather with a constant index where the axis has a known size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from fxquant.ops._arguments import MAX_INT, axis_of, bind, define, identity, ints, output_types
from fxquant.ops._emit import reshape, unsqueeze
from fxquant.ops._padding import onnx_pads
from fxquant.ops._sizes import runtime_size
from fxquant.ops.base import OpDef, Role, Writer

aten = torch.ops.aten
KEEPS = Role.GRID_PRESERVING


def gather(w: Writer, x: ir.Value, index: np.ndarray[Any, Any], axis: int) -> ir.Value:
    """Gather with a constant index."""
    result: ir.Value = w.op("Gather", [x, w.constant(index.astype(np.int64))], axis=axis)
    return result


def known_size(node: fx.Node, w: Writer, x: fx.Node, axis: int) -> int:
    """Size of an axis of `x`; refuses a symbolic one."""
    size = w.shape(x)[axis]
    if not isinstance(size, int):
        raise w.refuse(node, f"it rearranges axis {axis}, whose size {size} is not known now")
    return size


def _emit_roll(node: fx.Node, w: Writer) -> ir.Value:
    """One Gather, which fuses on codes, where the rolled axes are neighbours of known size; else one for each axis."""
    bound = bind(node)
    x, shifts, dims = bound["self"], bound["shifts"], bound["dims"]
    if not dims:
        return _same_shape(w, x, _rolled(w, reshape(w, w.value(x), [-1]), shifts[0], 0, None))
    axes = [axis_of(dim, len(w.shape(x))) for dim in dims]
    if can_merge(w.shape(x), axes):
        return _roll_merged(w, x, shifts, axes)
    value = w.value(x)
    for shift, axis in zip(shifts, axes, strict=True):
        size = w.shape(x)[axis]
        value = _rolled(w, value, shift, axis, size if isinstance(size, int) else None)
    return value if value is not w.value(x) else identity(w, value)


def can_merge(shape: Sequence[int | str], axes: Sequence[int]) -> bool:
    """Whether `axes` are several neighbours of known size, among others of which the sizes behind them are known."""
    first, last = min(axes), max(axes)
    neighbours = sorted(axes) == list(range(first, last + 1))
    return len(axes) > 1 and neighbours and all(isinstance(size, int) and size for size in shape[first:])


def _roll_merged(w: Writer, x: fx.Node, shifts: Sequence[int], axes: Sequence[int]) -> ir.Value:
    shape, first, last = w.shape(x), min(axes), max(axes)
    sizes = [size for size in shape[first : last + 1] if isinstance(size, int)]
    behind = [size for size in shape[last + 1 :] if isinstance(size, int)]
    order = np.arange(np.prod(sizes)).reshape(sizes)
    order = np.roll(order, list(shifts), [axis - first for axis in axes]).reshape(-1)
    merged = reshape(w, w.value(x), [0] * first + [len(order)] + behind)
    return reshape(w, gather(w, merged, order, first), [0] * first + sizes + behind)


def _rolled(w: Writer, x: ir.Value, shift: int, axis: int, size: int | None) -> ir.Value:
    if size is not None:
        return gather(w, x, np.roll(np.arange(size), shift), axis) if size and shift % size else x
    if shift == 0:
        return x
    tail = w.op("Slice", [x, ints(w, -shift), ints(w, MAX_INT), ints(w, axis)])
    head = w.op("Slice", [x, ints(w, 0), ints(w, -shift), ints(w, axis)])
    result: ir.Value = w.op("Concat", [tail, head], axis=axis)
    return result


def _same_shape(w: Writer, x: fx.Node, value: ir.Value) -> ir.Value:
    result: ir.Value = w.op("Reshape", [value, w.op("Shape", [w.value(x)])])
    return result


def _emit_flip(node: fx.Node, w: Writer) -> ir.Value:
    """A Slice that steps backwards."""
    bound = bind(node)
    axes = [axis_of(dim, len(w.shape(node))) for dim in bound["dims"]]
    if not axes:
        return identity(w, w.value(bound["self"]))
    last, before, steps = [-1] * len(axes), [-MAX_INT] * len(axes), [-1] * len(axes)
    inputs = [w.value(bound["self"]), ints(w, *last), ints(w, *before), ints(w, *axes), ints(w, *steps)]
    result: ir.Value = w.op("Slice", inputs)
    return result


def _emit_repeat(node: fx.Node, w: Writer) -> ir.Value:
    """repeat and tile: the shorter of shape and repeats is filled with 1 in front."""
    x, repeats = list(bind(node).values())
    rank = len(w.shape(x))
    value = w.value(x)
    if len(repeats) > rank:
        value = unsqueeze(w, value, list(range(len(repeats) - rank)))
    counts = [1] * (rank - len(repeats)) + list(repeats)
    result: ir.Value = w.op("Tile", [value, w.sizes(counts)])
    return result


def _emit_repeat_interleave(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    x, repeats, dim = bound["self"], bound["repeats"], bound["dim"]
    if dim is None:
        return _interleaved(w, reshape(w, w.value(x), [-1]), 1, repeats, 0)
    axis = axis_of(dim, len(w.shape(x)))
    size = w.shape(x)[axis]
    if isinstance(size, int) and isinstance(repeats, int):
        return gather(w, w.value(x), np.repeat(np.arange(size), repeats), axis)
    return _interleaved(w, w.value(x), len(w.shape(x)), repeats, axis)


def interleave_role(node: fx.Node) -> Role:
    """One Gather fuses on codes; what a symbolic size needs does not."""
    bound = bind(node)
    shape = output_types(bound["self"])[0].shape
    is_known = bound["dim"] is not None and isinstance(shape[axis_of(bound["dim"], len(shape))], int)
    return KEEPS if is_known and isinstance(bound["repeats"], int) else Role.FLOAT


def roll_role(node: fx.Node) -> Role:
    """One Gather fuses on codes; a chain of them, and what a flat roll needs, does not."""
    bound = bind(node)
    shape = output_types(bound["self"])[0].shape
    axes = [axis_of(dim, len(shape)) for dim in bound["dims"]]
    return KEEPS if len(axes) == 1 or (axes and can_merge(shape, axes)) else Role.FLOAT


def _interleaved(w: Writer, x: ir.Value, rank: int, repeats: Any, axis: int) -> ir.Value:
    """A new axis behind `axis`, tiled, then merged with it."""
    counts = [1] * (rank + 1)
    tiled = w.op("Tile", [unsqueeze(w, x, [axis + 1]), w.sizes(counts[: axis + 1] + [repeats] + counts[axis + 2 :])])
    head, tail = ints(w, *[0] * axis, -1), [ints(w, MAX_INT)]
    if axis + 1 == rank:
        result: ir.Value = w.op("Reshape", [tiled, head])
        return result
    rest = w.op("Slice", [w.op("Shape", [tiled]), ints(w, axis + 2), *tail])
    result = w.op("Reshape", [tiled, w.op("Concat", [head, rest], axis=0)])
    return result


def _emit_unfold(node: fx.Node, w: Writer) -> ir.Value:
    """Windows of an axis: a Gather with one row of indices a window, whose elements then move to the last axis."""
    x, dim, size, step = list(bind(node).values())
    rank = len(w.shape(x))
    if rank == 0:
        return unsqueeze(w, w.value(x), [0])
    axis = axis_of(dim, rank)
    length = known_size(node, w, x, axis)
    starts = np.arange(0, length - size + 1, step)
    windows = gather(w, w.value(x), starts[:, None] + np.arange(size), axis)
    if axis + 1 == rank:
        return windows
    perm = [index for index in range(rank + 1) if index != axis + 1] + [axis + 1]
    result: ir.Value = w.op("Transpose", [windows], perm=perm)
    return result


def _emit_pixel_shuffle(node: fx.Node, w: Writer) -> ir.Value:
    """DepthToSpace in CRD order takes rank 4 only: other leading axes are merged around it."""
    bound = bind(node)
    x, factor = w.value(bound["self"]), bound["upscale_factor"]
    shape = w.shape(bound["self"])
    if len(shape) != 4:
        inner = [known_size(node, w, bound["self"], len(shape) - 3 + axis) for axis in range(3)]
        x = reshape(w, x, [-1, *inner])
    result: ir.Value = w.op("DepthToSpace", [x], blocksize=factor, mode="CRD")
    return result if len(shape) == 4 else _with_leading(node, w, bound["self"], result)


def _with_leading(node: fx.Node, w: Writer, x: fx.Node, value: ir.Value) -> ir.Value:
    """Axes in front of the last three, as `x` has them, put back."""
    tail = w.shape(node)[-3:]
    lead = [runtime_size(w, x, axis) for axis in range(len(w.shape(x)) - 3)]
    known = ints(w, *(size if isinstance(size, int) else -1 for size in tail))
    result: ir.Value = w.op("Reshape", [value, w.op("Concat", [*lead, known], axis=0) if lead else known])
    return result


def _emit_pixel_unshuffle(node: fx.Node, w: Writer) -> ir.Value:
    """ONNX's SpaceToDepth orders channels otherwise; so Reshape, Transpose, Reshape."""
    bound = bind(node)
    x, r = bound["self"], bound["downscale_factor"]
    first = len(w.shape(x)) - 3
    c, h, width = (known_size(node, w, x, first + axis) for axis in range(3))
    blocks = reshape(w, w.value(x), [-1, c, h // r, r, width // r, r])
    moved = w.op("Transpose", [blocks], perm=[0, 1, 3, 5, 2, 4])
    if first == 1:
        return reshape(w, moved, [-1, c * r * r, h // r, width // r])
    return _with_leading(node, w, x, moved)


def _emit_channel_shuffle(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    channels = known_size(node, w, bound["self"], 1)
    order = np.arange(channels).reshape(bound["groups"], -1).T.reshape(-1)
    return gather(w, w.value(bound["self"]), order, 1)


def _emit_im2col(node: fx.Node, w: Writer) -> ir.Value:
    """Windows of both spatial axes by two Gathers, then channels and kernel merged: [N, C kh kw, windows]."""
    bound = bind(node)
    x = bound["self"]
    rank = len(w.shape(x))
    value = w.value(x) if rank == 4 else unsqueeze(w, w.value(x), [0])
    pads = [size for size in bound["padding"][::-1] for _ in range(2)]
    if any(pads):
        value = w.op("Pad", [value, w.sizes(onnx_pads(pads, 4)), w.operand(0.0, w.dtype(node))], mode="constant")
    for axis, spatial in ((2, 0), (4, 1)):
        size = known_size(node, w, x, rank - 2 + spatial) + 2 * bound["padding"][spatial]
        windows = _window_index(bound, spatial, size)
        value = gather(w, value, windows, axis)
    value = w.op("Transpose", [value], perm=[0, 1, 2, 4, 3, 5])
    channels = known_size(node, w, x, rank - 3) * bound["kernel_size"][0] * bound["kernel_size"][1]
    return reshape(w, value, [0, channels, -1] if rank == 4 else [channels, -1])


def _window_index(bound: dict[str, Any], spatial: int, size: int) -> np.ndarray[Any, Any]:
    kernel, dilation, stride = (bound[key][spatial] for key in ("kernel_size", "dilation", "stride"))
    starts = np.arange(0, size - dilation * (kernel - 1), stride)
    index: np.ndarray[Any, Any] = dilation * np.arange(kernel)[:, None] + starts
    return index


def _emit_col2im(node: fx.Node, w: Writer) -> ir.Value:
    bound = bind(node)
    x = bound["self"]
    batched = len(w.shape(x)) == 3
    value = w.value(x) if batched else unsqueeze(w, w.value(x), [0])
    pads = list(bound["padding"])
    result: ir.Value = w.op(
        "Col2Im",
        [value, w.sizes(bound["output_size"]), w.sizes(bound["kernel_size"])],
        dilations=bound["dilation"],
        strides=bound["stride"],
        pads=pads + pads,
    )
    return result if batched else w.op("Squeeze", [result, ints(w, 0)])


def _emit_meshgrid(node: fx.Node, w: Writer) -> tuple[ir.Value, ...]:
    """Each input along an axis of its own; indexing 'xy' swaps the first two."""
    bound = bind(node)
    tensors: Sequence[fx.Node] = bound["tensors"]
    axes = list(range(len(tensors)))
    if bound.get("indexing", "ij") == "xy" and len(axes) >= 2:
        axes[:2] = [1, 0]
    by_axis = dict(zip(axes, tensors, strict=True))
    sizes = [w.op("Shape", [_vector(w, by_axis[axis])]) for axis in range(len(tensors))]
    shape = w.op("Concat", sizes, axis=0)
    placed = [_along(w, tensor, axis, len(axes)) for axis, tensor in zip(axes, tensors, strict=True)]
    return tuple(w.op("Expand", [value, shape]) for value in placed)


def _vector(w: Writer, x: fx.Node) -> ir.Value:
    return w.value(x) if w.shape(x) else unsqueeze(w, w.value(x), [0])


def _along(w: Writer, x: fx.Node, axis: int, rank: int) -> ir.Value:
    others = [index for index in range(rank) if index != axis]
    return unsqueeze(w, _vector(w, x), others) if others else _vector(w, x)


REARRANGE: tuple[OpDef, ...] = (
    define("roll", [aten.roll.default], roll_role, _emit_roll, "Gather"),
    define("flip", [aten.flip.default], KEEPS, _emit_flip, "Slice"),
    define("repeat", [aten.repeat.default, aten.tile.default], KEEPS, _emit_repeat, "Tile"),
    define("repeat_interleave", [aten.repeat_interleave.self_int], interleave_role, _emit_repeat_interleave, "Gather"),
    define("unfold", [aten.unfold.default], KEEPS, _emit_unfold, "Gather"),
    define("pixel_shuffle", [aten.pixel_shuffle.default], KEEPS, _emit_pixel_shuffle, "DepthToSpace"),
    define("pixel_unshuffle", [aten.pixel_unshuffle.default], KEEPS, _emit_pixel_unshuffle),
    define(
        "channel_shuffle",
        [aten.channel_shuffle.default, aten.native_channel_shuffle.default],
        KEEPS,
        _emit_channel_shuffle,
        "Gather",
    ),
    define("im2col", [aten.im2col.default], Role.FLOAT, _emit_im2col),
    define("col2im", [aten.col2im.default], Role.FLOAT, _emit_col2im, "Col2Im", since_opset=18),
    define("meshgrid", [aten.meshgrid.default, aten.meshgrid.indexing], Role.FLOAT, _emit_meshgrid, "Expand"),
)
