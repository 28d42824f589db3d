"""Quantize and dequantize on a grid that is learned: gradients by the value, and by scale and zero point.

With u = x / s, n = qmin - z, p = qmax - z and G = dL/dx_hat (LSQ, arXiv:1902.08153; LSQ+, arXiv:2004.09576):

    inside the grid (n <= rint(u) <= p)    dx = G    ds = G (rint(u) - u)    dz = 0
    outside                                dx = 0    ds = G n or G p         dz = -G s

which is autograd of s (clip(rint(x / s) + z, qmin, qmax) - z), rounding passed straight through. Only x is kept: the
rest is computed again, part by part where one grid is for the whole tensor on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxquant.numerics.straight_through import is_plain_cpu, open_interval

aten = torch.ops.aten
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
_PART = 2**16  # elements: four such tensors of float32 fit in a core's own cache


def learned_fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int
) -> torch.Tensor:
    """x_hat for `x` (any float dtype; computed in float32), differentiable by `x`, `scale` and `zero_point`.

    Arguments:
        scale, zero_point: float32, the latter of whole numbers; both broadcast against `x`.
    """
    out = _learned_fake_quantize(x.to(torch.float32), scale, zero_point, qmin, qmax)
    return out.to(x.dtype)


def grid_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    step: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    codes: tuple[int, int],
    *,
    wants_zero_point: bool = True,
) -> Gradients:
    """dx, ds and dz, the latter two of the shape of `scale`, differentiable by all but `x` where that is asked.

    Arguments:
        grad: G.
        x, step: u = x / step.
        scale, zero_point: as in learned_fake_quantize.
        codes: qmin and qmax.
        wants_zero_point: whether there is to be a dz; it takes two passes of its own.
    """
    bounds = _as_numbers(x, zero_point, *codes)
    if bounds is not None and step.numel() == 1 and not torch.is_grad_enabled():
        return _of_one_grid(grad, x, step.view(()), scale, bounds, wants_zero_point)
    with torch.no_grad():
        units = x.div(step)
        grid = units.round()
        clamped = grid.clamp(codes[0] - zero_point, codes[1] - zero_point)
        inside = grid.eq(clamped)
        slope = clamped.sub_(units.where(inside, units.new_zeros(())))
    if torch.is_grad_enabled():
        slope = slope - ~inside * (zero_point - zero_point.detach())  # n and p depend on it
    by_x = grad * inside
    by_scale = (grad * slope).sum_to_size(scale.shape)
    return by_x, by_scale, ((by_x - grad) * scale).sum_to_size(scale.shape) if wants_zero_point else None


def _of_one_grid(
    grad: torch.Tensor,
    x: torch.Tensor,
    step: torch.Tensor,
    scale: torch.Tensor,
    bounds: tuple[float, float],
    wants_zero_point: bool,
) -> Gradients:
    """Part by part, so that what is between stays in the cache."""
    if grad.stride() != x.stride() or not _is_dense(x):
        grad, x = grad.contiguous(), x.contiguous()
    by_x = torch.empty_like(x)
    starts = range(0, max(x.numel(), 1), _PART)
    lines = [one.as_strided((x.numel(),), (1,)) for one in (grad, x, by_x)]
    spare = x.new_empty(2, min(x.numel(), _PART))
    passes = open_interval(1.0, *bounds)
    slopes, stopped = [], []
    for g, part, passed in zip(*([line[start : start + _PART] for start in starts] for line in lines), strict=True):
        units, codes = spare[0, : len(part)], spare[1, : len(part)]
        torch.div(part, step, out=units)
        aten.hardtanh_backward.grad_input(g, units, *passes, grad_input=passed)
        torch.clamp(units, *bounds, out=codes).round_()
        aten.hardtanh_backward.grad_input(units, units, *passes, grad_input=units)  # infinite ones become 0
        slopes.append(torch.dot(g, codes.sub_(units)))
        if wants_zero_point:
            stopped.append(torch.sub(g, passed, out=units).sum())
    by_zero_point = (_total(stopped) * -scale).view_as(scale) if wants_zero_point else None
    return by_x, _total(slopes).view_as(scale), by_zero_point


def _total(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _is_dense(x: torch.Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _as_numbers(x: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int) -> tuple[float, float] | None:
    """Bounds of the centred codes, if `x` has one grid, whose numbers can be read without waiting for a device."""
    if zero_point.numel() != 1 or not is_plain_cpu(x):
        return None
    zero = float(zero_point.detach())
    return qmin - zero, qmax - zero


class _LearnedFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.codes = qmin, qmax
        bounds: Any = _as_numbers(x, zero_point, qmin, qmax) or (qmin - zero_point, qmax - zero_point)
        return x.div(scale).round_().clamp_(*bounds).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        found = grid_gradients(
            grads[0], x.detach(), scale.detach(), scale, zero_point, ctx.codes, wants_zero_point=needs[2]
        )
        return (*(one if need else None for one, need in zip(found, needs, strict=True)), None, None)


_learned_fake_quantize: Callable[..., torch.Tensor] = _LearnedFakeQuantize.apply  # torch leaves apply untyped
