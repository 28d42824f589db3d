"""QLinearAveragePool and QLinearGlobalAveragePool: codes of means over windows.

    average         v = f(sum / count), the sum of f((x - zx) sx) taken in float32 one element after another, rows first
                    codes = rint(f(f(v / sy) + zy))          (the zero point is added before rounding)
    global average  requantize(sum of (x - zx), M)           M = f(sx / f(sy f(count)))

An average over a single window that is the whole input, without padding, is computed as the global average is. Padding
adds nothing to the sum; where it counts, count is the size of the window.
(`QLinearPool2DTask` and its siblings, `MlasQLinearGlobalAveragePoolNchw`, onnxruntime 1.31.1. Channels last, as level
ALL may have it, computes the same.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional

from fxquant.numerics.codes import Grid
from fxquant.numerics.kernels.float32 import round_to_int32
from fxquant.numerics.kernels.requantize import requantize, wrap_int32
from fxquant.numerics.rounding import dequantize

_SMALLEST_MULTIPLIER, _LARGEST_MULTIPLIER = 2.0**-32, 2.0**8  # of M: the latter excluded


@dataclass(frozen=True)
class PoolWindows:
    """The windows of an average pooling along its spatial axes.

    Arguments:
        kernel, stride: one int for each axis.
        pads: padding at the beginning of each axis, then at the end of each.
        count_padding: whether the divisor is the whole window's size where a window reaches into the padding.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pads: tuple[int, ...]
    count_padding: bool = False


def average_pool(x: torch.Tensor, grid: Grid, out: Grid, windows: PoolWindows) -> torch.Tensor:
    """Codes (int64) of the means over windows of `x` (int64 codes, [..., *spatial], one to three spatial axes)."""
    if _is_global(x, windows):
        return global_average_pool(x, grid, out, len(windows.kernel))
    real = _padded(dequantize(x, grid.scale, grid.zero_point), windows)
    total = torch.zeros_like(next(_elements(real, windows)))
    for element in _elements(real, windows):
        total = total + element
    mean = total / _count(x, total, windows)
    return round_to_int32(mean / out.scale + out.zero_point.to(torch.float32)).clamp(out.qmin, out.qmax)


def _is_global(x: torch.Tensor, windows: PoolWindows) -> bool:
    return tuple(x.shape[-len(windows.kernel) :]) == windows.kernel and not any(windows.pads)


def _padded(x: torch.Tensor, windows: PoolWindows) -> torch.Tensor:
    axes = len(windows.kernel)
    pairs = zip(windows.pads[:axes], windows.pads[axes:], strict=True)
    return functional.pad(x, [size for pair in reversed(list(pairs)) for size in pair])


def _elements(x: torch.Tensor, windows: PoolWindows) -> Iterator[torch.Tensor]:
    """The first element of every window, then the second ... the last axis fastest."""
    axes = len(windows.kernel)
    sizes = x.shape[-axes:]
    for offsets in itertools.product(*(range(size) for size in windows.kernel)):
        taken: tuple[Any, ...] = tuple(
            slice(offset, offset + size - kernel + 1, stride)
            for offset, size, kernel, stride in zip(offsets, sizes, windows.kernel, windows.stride, strict=True)
        )
        yield x[(..., *taken)]


def _count(x: torch.Tensor, total: torch.Tensor, windows: PoolWindows) -> torch.Tensor:
    """The divisor (float32) of each window, of shape (*spatial of the output)."""
    axes = len(windows.kernel)
    if windows.count_padding:
        return total.new_tensor(float(math.prod(windows.kernel)))
    inside = _padded(torch.ones(x.shape[-axes:], dtype=torch.float32, device=x.device), windows)
    return torch.stack(list(_elements(inside, windows))).sum(0)


def global_average_pool(x: torch.Tensor, grid: Grid, out: Grid, axes: int) -> torch.Tensor:
    """Codes (int64) of the means over the last `axes` axes, which stay with size 1, of `x` (int64 codes)."""
    dims = tuple(range(-axes, 0))
    accumulator = wrap_int32((x - grid.zero_point).sum(dims, keepdim=True))
    count = grid.scale.new_tensor(float(math.prod(x.shape[-axes:])))
    multiplier = grid.scale / (out.scale * count)
    return requantize(accumulator, multiplier, out)


def global_overflow(grid: Grid, out: Grid, fewest: int, most: int) -> str:
    """Why the global average of `fewest` to `most` elements fails: M is outside what onnxruntime runs."""
    ratio = float(grid.scale) / float(out.scale)
    if ratio / most >= _SMALLEST_MULTIPLIER and ratio / fewest < _LARGEST_MULTIPLIER:
        return ""
    return f"its input's scale is {ratio:.4g} times its output's, which QLinearGlobalAveragePool does not run"
