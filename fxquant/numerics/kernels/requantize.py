"""From an int32 accumulator to codes: the last step of QLinearConv, QGemm, QLinearMatMul and QLinearGlobalAveragePool.

    M = f(f(sx * sw) / sy)          codes = rint(min(max(f(f(acc) * M), qmin - z), qmax - z)) + z

acc is the int32 sum of products of centred codes, bias included. f(acc) is rounded where |acc| > 2^24.
(`MlasRequantizeOutput` in onnxruntime; measured on 1.31.1.)
"""

from __future__ import annotations

import torch

from fxquant.numerics.codes import Grid

_INT32_SPAN = 2**32
_INT32_LOW = -(2**31)


def product_multiplier(scale_x: torch.Tensor, scale_w: torch.Tensor, scale_y: torch.Tensor) -> torch.Tensor:
    """M of a product, float32: of the shape of `scale_w`."""
    return (scale_x * scale_w) / scale_y


def wrap_int32(accumulator: torch.Tensor) -> torch.Tensor:
    """What an int32 accumulator holds after sums of int64 values were added to it: onnxruntime wraps silently."""
    return torch.remainder(accumulator - _INT32_LOW, _INT32_SPAN) + _INT32_LOW


def requantize(accumulator: torch.Tensor, multiplier: torch.Tensor, out: Grid) -> torch.Tensor:
    """Codes (int64) of an int64 accumulator; `multiplier` (float32) broadcasts against it, `out` is per tensor."""
    scaled = accumulator.to(torch.float32) * multiplier
    low, high = float(out.qmin - out.zero_point), float(out.qmax - out.zero_point)
    return torch.round(scaled.clamp(low, high)).to(torch.int64) + out.zero_point


def dequantize_product(accumulator: torch.Tensor, scale_x: torch.Tensor, scale_w: torch.Tensor) -> torch.Tensor:
    """Real values (float32) of an accumulator that no grid follows: f(f(acc) * f(sx * sw))."""
    return accumulator.to(torch.float32) * (scale_x * scale_w)
