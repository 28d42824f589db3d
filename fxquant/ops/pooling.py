"""Pooling: max, average, adaptive, over one to three spatial axes, with or without a batch.

torch and ONNX differ in `ceil_mode`: torch drops a last window that would start in the padding at the end, and never
counts what ceil_mode adds beyond the padding. The windows are therefore written as explicit padding at the end, and
ceil_mode = 0; sizes that are not known then are refused:

    span = dilation (kernel - 1) + 1
    out = ceil((size + 2 padding - span) / stride) + 1, less 1 if (out - 1) stride >= size + padding
    end = max(padding, (out - 1) stride + span - size - padding)

Adaptive pooling is AveragePool or MaxPool along the axes whose windows are all alike. Along the others, whose sizes
must be known, each window is a Slice and a ReduceMean or ReduceMax, joined by Concat: windows are boxes, and the mean
(or maximum) over a box is that over its axes in turn. Such a pooling is a float island.

Max pooling keeps its input's grid (same codes); average pooling is QLinearAveragePool or QLinearGlobalAveragePool
between Q/DQ.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from fxquant.numerics.codes import Grid
from fxquant.numerics.kernels.elementwise import overflow
from fxquant.numerics.kernels.pooling import PoolWindows, average_pool, global_average_pool, global_overflow
from fxquant.ops._arguments import bind, ints, output_types, static_shape
from fxquant.ops._emit import argument, full_rank, reduce, squeeze, unsqueeze
from fxquant.ops.base import OpDef, Role, Writer
from fxquant.ops.kernels import GeneralKernel

aten = torch.ops.aten
_MOST_ELEMENTS = 2**24  # of an input of unknown size
_MAX = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
_AVERAGE = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
_ADAPTIVE_AVERAGE = (
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
)
_ADAPTIVE_MAX = (aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
_FAMILIES = (_MAX, _AVERAGE, _ADAPTIVE_AVERAGE, _ADAPTIVE_MAX)
_SPATIAL: dict[Any, int] = {target: axes for family in _FAMILIES for axes, target in enumerate(family, 1)}


@dataclass(frozen=True)
class Windows:
    """The windows of a pooling operation along each spatial axis, as torch means them."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool

    def end_padding(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Padding at the end of each axis for inputs of these sizes, with which ceil_mode is not needed."""
        return tuple(self._end(axis, size) for axis, size in enumerate(sizes))

    def _end(self, axis: int, size: int) -> int:
        padding, stride = self.padding[axis], self.stride[axis]
        if not self.ceil_mode:
            return padding
        span = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        out = -((span - size - 2 * padding) // stride) + 1
        out -= (out - 1) * stride >= size + padding
        return max(padding, (out - 1) * stride + span - size - padding)


def _windows(node: fx.Node) -> Windows:
    axes = _SPATIAL[node.target]
    kernel = full_rank(argument(node, "kernel_size"), axes)
    stride = full_rank(argument(node, "stride") or kernel, axes)
    padding = full_rank(argument(node, "padding"), axes)
    dilation = full_rank(argument(node, "dilation"), axes) if node.target in _MAX else [1] * axes
    return Windows(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), bool(argument(node, "ceil_mode")))


def _batched(node: fx.Node, writer: Writer) -> tuple[ir.Value, bool]:
    """The input with a batch axis, and whether it was added here."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    missing = len(writer.shape(x)) == _SPATIAL[node.target] + 1
    return (unsqueeze(writer, writer.value(x), [0]) if missing else writer.value(x)), missing


def _unbatched(writer: Writer, value: ir.Value, missing: bool) -> ir.Value:
    return squeeze(writer, value, [0]) if missing else value


def _spatial_sizes(node: fx.Node, writer: Writer) -> tuple[int | str, ...]:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return writer.shape(x)[-_SPATIAL[node.target] :]


def _emit_max_pool(node: fx.Node, writer: Writer) -> ir.Value:
    x, missing = _batched(node, writer)
    windows, sizes = _windows(node), static_shape(_spatial_sizes(node, writer))
    if windows.ceil_mode and sizes is None:
        raise _unknown_ceiling(node, writer)
    end = windows.padding if sizes is None else windows.end_padding(sizes)
    value = writer.op(
        "MaxPool",
        [x],
        kernel_shape=list(windows.kernel),
        strides=list(windows.stride),
        pads=[*windows.padding, *end],
        dilations=list(windows.dilation),
    )
    return _unbatched(writer, value, missing)


def _emit_average_pool(node: fx.Node, writer: Writer) -> ir.Value:
    divisor = bind(node).get("divisor_override")
    if divisor is not None:
        reason = f"divisor_override={divisor}: ONNX's AveragePool divides by the size of the window"
        raise writer.refuse(node, reason, "Pool without divisor_override and multiply by kernel size / divisor.")
    x, missing = _batched(node, writer)
    windows, sizes = _windows(node), static_shape(_spatial_sizes(node, writer))
    if windows.ceil_mode and sizes is None:
        raise _unknown_ceiling(node, writer)
    start, end = windows.padding, windows.padding if sizes is None else windows.end_padding(sizes)
    count_padding = bool(argument(node, "count_include_pad")) and any(windows.padding)
    if count_padding and end != windows.padding:
        x = _padded(writer, x, windows.padding, node)
        start, end = (0,) * len(end), tuple(more - given for more, given in zip(end, windows.padding, strict=True))
        count_padding = False
    value = writer.op(
        "AveragePool",
        [x],
        kernel_shape=list(windows.kernel),
        strides=list(windows.stride),
        pads=[*start, *end],
        count_include_pad=int(count_padding),
    )
    return _unbatched(writer, value, missing)


def _padded(writer: Writer, x: ir.Value, padding: Sequence[int], node: fx.Node) -> ir.Value:
    """Zeros that count as elements, before what ceil_mode adds, which does not."""
    pads = [0, 0, *padding, 0, 0, *padding]
    value: ir.Value = writer.op("Pad", [x, writer.sizes(pads), writer.operand(0.0, like=writer.dtype(node))])
    return value


def _why_no_average(node: fx.Node) -> str:
    """Why an average pooling has no integer kernel, as far as sizes are known."""
    if bind(node).get("divisor_override") is not None:
        return "AveragePool has no divisor_override"
    windows, sizes = _windows(node), static_shape(_input_sizes(node))
    counts_padding = bool(argument(node, "count_include_pad")) and any(windows.padding)
    if not counts_padding or sizes is None or windows.end_padding(sizes) == windows.padding:
        return ""
    return "its padding is a node of its own, as ceil_mode adds to it what does not count"


def _input_sizes(node: fx.Node) -> tuple[int | str, ...]:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return output_types(x)[0].shape[-_SPATIAL[node.target] :]


def _average_codes(node: fx.Node, args: Sequence[Any], out: Grid) -> torch.Tensor:
    x, windows = args[0], _windows(node)
    pads = (*windows.padding, *windows.end_padding(x.centred.shape[-len(windows.kernel) :]))
    counts_padding = bool(argument(node, "count_include_pad")) and any(windows.padding)
    pool = PoolWindows(windows.kernel, windows.stride, pads, counts_padding)
    return average_pool(x.integers, x.grid, out, pool)


def _unknown_ceiling(node: fx.Node, writer: Writer) -> Exception:
    sizes = _spatial_sizes(node, writer)
    remedy = "Capture with fixed spatial sizes, or pool with ceil_mode=False."
    return writer.refuse(node, f"ceil_mode with spatial sizes {sizes}, which are not known", remedy)


def _adaptive_bounds(size: int, count: int) -> list[tuple[int, int]]:
    """First and one-past-last element of each window."""
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def adaptive_windows(size: int, count: int) -> tuple[int, int] | None:
    """(kernel, stride) of adaptive pooling from `size` to `count`, or None if its windows are not all alike.

    Window i is [floor(i size / count), ceil((i + 1) size / count)), as torch has it.
    """
    bounds = _adaptive_bounds(size, count)
    kernels = {end - start for start, end in bounds}
    strides = {after - before for (before, _), (after, _) in pairwise(bounds)} or {1}
    return (kernels.pop(), strides.pop()) if len(kernels) == len(strides) == 1 and 0 not in strides else None


def _adaptive(node: fx.Node, writer: Writer, pool: str) -> ir.Value:
    x, missing = _batched(node, writer)
    sizes = _spatial_sizes(node, writer)
    counts = full_rank(argument(node, "output_size"), len(sizes))
    known = static_shape(sizes)
    if all(count == 1 for count in counts) and (known is None or pool == "AveragePool"):
        return _unbatched(writer, writer.op(f"Global{pool}", [x]), missing)
    if known is None or static_shape(counts) is None or 0 in counts:
        reason = f"adaptive pooling of {sizes} into {tuple(counts)} has windows of sizes that are not known"
        raise writer.refuse(node, reason, "Capture with fixed spatial sizes and a positive output size.")
    windows = [adaptive_windows(*pair) for pair in zip(known, counts, strict=True)]
    if any(window is not None and window != (1, 1) for window in windows) or None not in windows:
        kernel, strides = zip(*(window or (1, 1) for window in windows), strict=True)
        x = writer.op(pool, [x], kernel_shape=list(kernel), strides=list(strides))
    for axis, window in enumerate(windows):
        if window is None:
            x = _uneven(writer, x, axis + 2, _adaptive_bounds(known[axis], counts[axis]), pool)
    return _unbatched(writer, x, missing)


def _uneven(writer: Writer, x: ir.Value, axis: int, bounds: Sequence[tuple[int, int]], pool: str) -> ir.Value:
    """Pool along one axis, over windows of different sizes."""
    kind = "ReduceMean" if pool == "AveragePool" else "ReduceMax"
    parts = []
    for start, end in bounds:
        part = writer.op("Slice", [x, ints(writer, start), ints(writer, end), ints(writer, axis)])
        parts.append(part if end - start == 1 else reduce(writer, kind, part, [axis], keepdim=True))
    value: ir.Value = writer.op("Concat", parts, axis=axis)
    return value


def _is_uneven(node: fx.Node) -> bool:
    """Whether the windows of an adaptive pooling differ in size along some axis, as far as sizes are known."""
    pairs = zip(_input_sizes(node), full_rank(argument(node, "output_size"), _SPATIAL[node.target]), strict=True)
    return any(
        isinstance(size, int) and isinstance(count, int) and adaptive_windows(size, count) is None
        for size, count in pairs
    )


def _adaptive_role(role: Role) -> Callable[[fx.Node], Role]:
    return lambda node: Role.FLOAT if _is_uneven(node) else role


def _adaptive_types(even: tuple[str, ...], uneven: str) -> Callable[[fx.Node], tuple[str, ...]]:
    return lambda node: (uneven,) if _is_uneven(node) else even


def _why_no_adaptive_average(node: fx.Node) -> str:
    return "its windows differ in size: each is a mean of its own" if _is_uneven(node) else ""


def _adaptive_average_codes(node: fx.Node, args: Sequence[Any], out: Grid) -> torch.Tensor:
    x, axes = args[0], _SPATIAL[node.target]
    counts = full_rank(argument(node, "output_size"), axes)
    if all(count == 1 for count in counts):
        return global_average_pool(x.integers, x.grid, out, axes)
    windows = [adaptive_windows(*pair) for pair in zip(x.centred.shape[-axes:], counts, strict=True)]
    kernel, stride = zip(*(window for window in windows if window is not None), strict=True)
    return average_pool(x.integers, x.grid, out, PoolWindows(kernel, stride, (0,) * (2 * axes)))


def _mean_overflows(node: fx.Node, operands: Sequence[Grid], out: Grid) -> str:
    """Of the kernel for global averages, which a window of the whole input is too; of sizes that are not known, any."""
    (grid,) = operands
    sizes = static_shape(_input_sizes(node))
    count = 0 if sizes is None else math.prod(sizes)
    means = global_overflow(grid, out, count or 1, count or _MOST_ELEMENTS)
    return means or overflow(grid.reach, out)


def _emit_adaptive_average_pool(node: fx.Node, writer: Writer) -> ir.Value:
    return _adaptive(node, writer, "AveragePool")


def _emit_adaptive_max_pool(node: fx.Node, writer: Writer) -> tuple[ir.Value]:
    """Its values; the indices, its second output, must have no reader."""
    for user in node.users:
        if user.target is not operator.getitem or (user.args[1] != 0 and user.users):
            raise writer.refuse(node, "the indices of adaptive max pooling have no ONNX form", "Use its values only.")
    return (_adaptive(node, writer, "MaxPool"),)


POOLING: tuple[OpDef, ...] = (
    OpDef(name="max_pool", targets=_MAX, role=Role.GRID_PRESERVING, emit=_emit_max_pool, onnx_types=("MaxPool",)),
    OpDef(
        name="avg_pool",
        targets=_AVERAGE,
        role=Role.COMPUTE,
        emit=_emit_average_pool,
        onnx_types=("AveragePool",),
        kernel=GeneralKernel("QLinearAveragePool", _why_no_average, _average_codes, overflows=_mean_overflows),
    ),
    OpDef(
        name="adaptive_avg_pool",
        targets=_ADAPTIVE_AVERAGE,
        role=Role.COMPUTE,
        emit=_emit_adaptive_average_pool,
        onnx_types=("GlobalAveragePool", "AveragePool"),
        kernel=GeneralKernel(
            "QLinearAveragePool", _why_no_adaptive_average, _adaptive_average_codes, overflows=_mean_overflows
        ),
        role_of=_adaptive_role(Role.COMPUTE),
        types_of=_adaptive_types(("GlobalAveragePool", "AveragePool"), "ReduceMean"),
    ),
    OpDef(
        name="adaptive_max_pool",
        targets=_ADAPTIVE_MAX,
        role=Role.GRID_PRESERVING,
        emit=_emit_adaptive_max_pool,
        onnx_types=("MaxPool", "GlobalMaxPool"),
        role_of=_adaptive_role(Role.GRID_PRESERVING),
        types_of=_adaptive_types(("MaxPool", "GlobalMaxPool"), "ReduceMax"),
    ),
)
