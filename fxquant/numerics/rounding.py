"""Quantize and dequantize exactly as ONNX's QuantizeLinear and DequantizeLinear do.

    codes = clip(rint(f(x / s)), qmin - z, qmax - z) + z          x_hat = f((codes - z) * s)

f() rounds to float32, rint rounds half to even (ONNX operator specification, opset 21; measured on onnxruntime 1.31.1:
0 of 60 million codes differ). Infinite x saturates, and NaN has the lowest code (measured as well). Multiplying by 1/s
instead of dividing, as torch.fake_quantize_* do, differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxquant.numerics.straight_through import Clip, grid_bounds, on_grid, pass_straight
from fxquant.spec import Granularity


def along_axis(values: torch.Tensor, granularity: Granularity, rank: int) -> torch.Tensor:
    """`values`, of an encoding's shape, as they broadcast against a tensor of `rank` dimensions; blocks are copied."""
    if granularity.axis is None or values.ndim == 0:
        return values
    if granularity.block is not None:
        return values.repeat_interleave(granularity.block, dim=granularity.axis)
    shape = [1] * rank
    shape[granularity.axis % rank] = -1
    return values.view(shape)


def lowest_for_nan(grid: torch.Tensor) -> torch.Tensor:
    """A fresh float tensor with -inf in place of NaN: onnxruntime's QuantizeLinear gives it the lowest code."""
    return grid.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    """Integer codes (int32) of `x`; `scale` and `zero_point` broadcast against it."""
    zero = zero_point.to(torch.float64)
    grid = lowest_for_nan(torch.round(x.to(torch.float32) / scale)).to(torch.float64)
    return (torch.clamp(grid, qmin - zero, qmax - zero) + zero).to(torch.int32)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Real values (float32) of integer codes."""
    return (codes.to(torch.int64) - zero_point).to(torch.float32) * scale


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize; the gradient passes straight through inside the grid, and stops outside."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, low: Any, high: Any, clip: Clip | None) -> torch.Tensor:
        out, inside = on_grid(x, scale, (low, high), clip, ctx.needs_input_grad[0])
        ctx.save_for_backward(inside)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return pass_straight(grads[0], *ctx.saved_tensors), None, None, None, None


_fake_quantize: Callable[..., torch.Tensor] = _FakeQuantize.apply  # torch leaves Function.apply untyped


def fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int, clip: Clip | None = None
) -> torch.Tensor:
    """x_hat for `x` (any float dtype; computed in float32), differentiable by the straight-through estimator.

    The codes' zero point cancels: x_hat = clip(rint(x / s), qmin - z, qmax - z) * s.

    Arguments:
        clip: of an activation in front that the grid's own clip makes redundant: gradients are as if it were there.
    """
    wide = x.to(torch.float32)
    out: torch.Tensor = _fake_quantize(wide, scale, *grid_bounds(wide, zero_point, qmin, qmax), clip)
    return out.to(x.dtype)
