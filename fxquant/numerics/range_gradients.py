"""Gradients of a learned range's parameters, in closed form (the formulas: trained_ranges.py).

Each function gives back the values that it is handed, with a gradient for the parameters. What passes is what leads
back from a bound: at a bound, or beyond it, descent must point inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Bound = torch.Tensor | float


def _led_back(grad: torch.Tensor, x: torch.Tensor, low: Bound, high: Bound) -> torch.Tensor:
    """`grad`, and 0 where `x` is at a bound, or beyond it, and descent does not lead back."""
    return grad * (((x > low) | (grad < 0)) & ((x < high) | (grad > 0)))


class _ByScale(torch.autograd.Function):
    """`scale`, with the gradient of `plain`, times `slope`, for the parameter."""

    @staticmethod
    def forward(
        ctx: Any,
        parameter: torch.Tensor,
        scale: torch.Tensor,
        plain: torch.Tensor,
        slope: Bound,
        smallest: torch.Tensor,
        largest: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(plain, smallest, slope if isinstance(slope, torch.Tensor) else None)
        ctx.slope, ctx.largest = None if isinstance(slope, torch.Tensor) else slope, largest
        return scale.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plain, smallest, slope = ctx.saved_tensors
        passed = _led_back(grads[0], plain, smallest, ctx.largest)
        return passed * (ctx.slope if slope is None else slope), None, None, None, None, None


class _ByScaleAndLow(torch.autograd.Function):
    """Scale and zero point, which follows from the scale and the `anchor`, an end of the grid."""

    @staticmethod
    def forward(
        ctx: Any,
        own_scale: torch.Tensor,
        own_low: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        anchor: torch.Tensor,
        smallest: torch.Tensor,
        largest: float,
        lower: torch.Tensor,
        upper: torch.Tensor,
        factor: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(own_scale, own_low, scale, anchor, smallest, lower, upper)
        ctx.largest, ctx.factor = largest, factor
        return scale.clone(), zero_point.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        own_scale, own_low, scale, anchor, smallest, lower, upper = ctx.saved_tensors
        by_low = grads[1].double() / -scale
        by_scale = grads[0] - by_low * anchor / scale
        by_scale = _led_back(by_scale, own_scale, smallest, ctx.largest) * ctx.factor
        by_low = _led_back(by_low, own_low, lower, upper) * (own_scale < ctx.largest) * ctx.factor
        return by_scale.to(own_scale.dtype), by_low.to(own_low.dtype), *(None,) * 8


class _ByEnds(torch.autograd.Function):
    """Scale and zero point, which follow from both ends: `plain`, whose derivatives by them are given."""

    @staticmethod
    def forward(
        ctx: Any,
        own_low: torch.Tensor,
        own_high: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        low: torch.Tensor,
        plain: torch.Tensor,
        scale_by_low: torch.Tensor,
        scale_by_high: torch.Tensor,
        smallest: torch.Tensor,
        lowest: float,
        highest: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(own_low, own_high, scale, low, plain, scale_by_low, scale_by_high, smallest)
        ctx.ends = lowest, highest
        return scale.clone(), zero_point.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        own_low, own_high, scale, low, plain, scale_by_low, scale_by_high, smallest = ctx.saved_tensors
        through_zero_point = grads[1].double() / -scale
        by_scale = grads[0] - through_zero_point * low / scale
        by_scale = by_scale * ((plain > smallest) | (by_scale < 0))
        by_low = _led_back(by_scale * scale_by_low + through_zero_point, own_low, ctx.ends[0], 0.0)
        by_high = _led_back(by_scale * scale_by_high, own_high, 0.0, ctx.ends[1])
        return by_low.to(own_low.dtype), by_high.to(own_high.dtype), *(None,) * 9


# torch leaves Function.apply untyped.
by_scale: Callable[..., torch.Tensor] = _ByScale.apply
by_scale_and_low: Callable[..., tuple[torch.Tensor, torch.Tensor]] = _ByScaleAndLow.apply
by_ends: Callable[..., tuple[torch.Tensor, torch.Tensor]] = _ByEnds.apply
