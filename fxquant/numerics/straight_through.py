"""Fake quantization on the CPU in as few passes over memory as its gradient needs.

Where one scale serves the tensor, the grid's clip is a clip of x itself: rint(f(x / s)) grows with x, so that it lies
within [low, high] just where first < x < last, for two float32 numbers that `open_interval` finds. All x are compared
with them at once, and where none lies outside, backward needs nothing at all. Masks are bytes, written and read by the
kernels that vectorise: comparing into bool, or multiplying by it, takes ten times as long as an addition (torch 2.13).
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch.nn import functional

# Bounds beyond it are not all whole numbers in float32, and scales beyond these have quotients that overflow.
_LARGEST_BOUND = 2.0**22
_SCALES = 2.0**-100, 2.0**90


# Lowest and highest output of an activation (relu, relu6), whose gradient passes strictly between them alone.
Clip = tuple[float, float]
# Lowest and highest code less the zero point: tensors where channels differ, or where reading them may wait.
Bounds = tuple[torch.Tensor, torch.Tensor] | tuple[float, float]


def grid_bounds(x: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int) -> Bounds:
    """Bounds of the grid that `x` is quantized on: numbers on the CPU where one pair serves all of `x`."""
    if is_plain_cpu(x) and zero_point.numel():
        zeros = {int(zero) for zero in (zero_point.aminmax() if zero_point.numel() > 1 else (zero_point,))}
        low, high = qmin - min(zeros), qmax - min(zeros)
        if len(zeros) == 1 and -_LARGEST_BOUND <= low and high <= _LARGEST_BOUND:
            return float(low), float(high)
    zero = zero_point.to(torch.float32)
    return qmin - zero, qmax - zero


def is_plain_cpu(x: torch.Tensor) -> bool:
    """Whether asking for `x`'s values costs nothing: no device to wait for, no compiler that traces, no subclass."""
    return x.is_cpu and type(x) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def clip_activation(x: torch.Tensor, clip: Clip) -> torch.Tensor:
    """The relu or hardtanh that has these bounds."""
    return torch.relu(x) if clip == (0.0, math.inf) else functional.hardtanh(x, *clip)


def absorbs(clip: Clip, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int) -> bool:
    """Whether quantizing on this grid, of one scale on the CPU, cuts off all that the clip would.

    It does if the clip's bounds have the grid's lowest and highest codes: rint(f(bound / s)), numerics/grids.py.
    """
    if scale.numel() != 1 or not _SCALES[0] <= (step := float(scale)) <= _SCALES[1]:
        return False
    low, high = (np.rint(np.float32(bound) / np.float32(step)) + int(zero_point) for bound in clip)
    return bool(low <= qmin and qmax <= high)


def on_grid(
    x: torch.Tensor, scale: torch.Tensor, bounds: Bounds, clip: Clip | None, wants_mask: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x_hat, and where the gradient passes: a bool tensor, or None for everywhere (or if it is not wanted).

    `clip` is one that the grid absorbs, so that one ordinary scale serves all of `x`; only the gradient heeds it.
    """
    low, high = bounds
    if isinstance(low, torch.Tensor) or isinstance(high, torch.Tensor):
        return _on_any_grid(x, scale, bounds, wants_mask)
    if not wants_mask:
        return x.div(scale).round_().clamp_(low, high).mul_(scale), None
    if scale.numel() == 1 and _SCALES[0] <= (step := float(scale)) <= _SCALES[1]:
        return _on_one_scale(x, scale, (low, high), open_interval(step, low, high), clip)
    grid = x.div(scale).round_()
    if _extremes_lie_within(grid, low - 0.5, high + 0.5):
        return grid.mul_(scale), None
    return _on_any_grid(x, scale, bounds, wants_mask)


def _on_any_grid(
    x: torch.Tensor, scale: torch.Tensor, bounds: Bounds, wants_mask: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    grid = x.div(scale).round_()
    clamped = torch.clamp(grid, *bounds)
    inside = grid.eq(clamped) if wants_mask else None
    return clamped.mul_(scale), inside


def _on_one_scale(
    x: torch.Tensor, scale: torch.Tensor, bounds: tuple[float, float], interval: tuple[float, float], clip: Clip | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    first, last = interval
    if clip is None:
        within = _extremes_lie_within(x, first, last)
        if within is None:
            return _on_any_grid(x, scale, bounds, wants_mask=True)
        if within:
            return x.div(scale).round_().mul_(scale), None
    else:
        first, last = max(first, clip[0]), min(last, clip[1])
    out = torch.empty_like(x)
    torch.ops.aten.hardtanh_backward.grad_input(_one(x.dtype), x, first, last, grad_input=out)  # 1 inside, 0 outside
    inside = out.to(torch.bool)
    return torch.div(x, scale, out=out).round_().clamp_(*bounds).mul_(scale), inside


def _extremes_lie_within(x: torch.Tensor, first: float, last: float) -> bool | None:
    """Whether first < x < last everywhere; None if there is a NaN."""
    if x.numel() == 0:
        return True
    lowest, highest = (float(extreme) for extreme in x.aminmax())
    return None if math.isnan(lowest) else first < lowest and highest < last


@functools.cache
def _one(dtype: torch.dtype) -> torch.Tensor:
    return torch.ones((), dtype=dtype)


@functools.lru_cache(maxsize=4096)
def open_interval(scale: float, low: float, high: float) -> tuple[float, float]:
    """The float32 numbers next to those x for which low <= rint(f(x / scale)) <= high; low <= 0 <= high.

    `scale` is a float32 number of ordinary size.
    """
    return -_first_above(scale, -low), _first_above(scale, high)


def _first_above(scale: float, code: float) -> float:
    """The smallest float32 x with rint(f(x / scale)) > code."""
    step, x = np.float32(scale), np.float32((code + 0.5) * scale)
    while np.rint(x / step) > code:
        x = np.nextafter(x, np.float32(0.0))
    while np.rint(x / step) <= code:
        x = np.nextafter(x, np.float32(math.inf))
    return float(x)


def next_float32(value: float, towards: float) -> float:
    """The neighbour of the nearest float32 in that direction."""
    return float(np.nextafter(np.float32(value), np.float32(towards)))


def pass_straight(grad: torch.Tensor, inside: torch.Tensor | None) -> torch.Tensor:
    """`grad` where `inside` (None: everywhere), and 0 elsewhere."""
    if inside is None:
        return grad
    if is_plain_cpu(grad) and grad.shape == inside.shape:
        return inside.view(torch.uint8).to(grad.dtype).mul_(grad)
    return grad * inside
