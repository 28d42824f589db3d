"""QLinearAdd and QLinearMul: codes of sums and products. Both add the zero point before they round.

    add         ra = f(sa / sy)    rb = f(sb / sy)    F = f(zy - fma(ra, za, f(rb zb)))
                codes = rint(fma(a, ra, fma(b, rb, F)))
    multiply    r = f(f(sa sb) / sy)    codes = rint(f(f(f((a - za) (b - zb)) r) + zy))

fma rounds once. (`MlasQLinearAdd` with AVX2 and FMA3, and `MlasQLinearMul`, of onnxruntime 1.31.1; operands are
unsigned codes of 8 bits or fewer.)

QLinearAdd's two operands are not alike: the inner fma has the second one. Where one operand has a single element along
the innermost axis (of more than one element), onnxruntime makes that one the second, and so does `scalar_is_first`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxquant.numerics.codes import Grid
from fxquant.numerics.kernels.float32 import INT32_SPAN, fused_multiply_add, round_to_int32


def add(a: torch.Tensor, b: torch.Tensor, grid_a: Grid, grid_b: Grid, out: Grid) -> torch.Tensor:
    """Codes (int64) of a sum; `a` and `b` are int64 codes that broadcast, in onnxruntime's order."""
    ratio_a, ratio_b = grid_a.scale / out.scale, grid_b.scale / out.scale
    zero_a, zero_b, zero = (grid.zero_point.to(torch.float32) for grid in (grid_a, grid_b, out))
    fixed = zero - fused_multiply_add(ratio_a, zero_a, ratio_b * zero_b)
    inner = fused_multiply_add(b.to(torch.float32), ratio_b, fixed)
    total = fused_multiply_add(a.to(torch.float32), ratio_a, inner)
    return round_to_int32(total).clamp(out.qmin, out.qmax)


def multiply(a: torch.Tensor, b: torch.Tensor, grid_a: Grid, grid_b: Grid, out: Grid) -> torch.Tensor:
    """Codes (int64) of a product; `a` and `b` are int64 codes that broadcast."""
    ratio = (grid_a.scale * grid_b.scale) / out.scale
    accumulator = (a - grid_a.zero_point) * (b - grid_b.zero_point)
    scaled = accumulator.to(torch.float32) * ratio + out.zero_point.to(torch.float32)
    return round_to_int32(scaled).clamp(out.qmin, out.qmax)


def overflow(largest: float, out: Grid) -> str:
    """Why a kernel's conversion to int32, before it saturates, fails for real results of up to `largest`."""
    codes = largest / float(out.scale) + out.qmax
    return f"its results reach {codes:.4g} steps of its output's grid, beyond int32" if codes >= INT32_SPAN else ""


def scalar_is_first(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether onnxruntime swaps the operands of QLinearAdd that have these shapes.

    It looks at the innermost axis of those that both have and where one has more than one element (the outermost of
    them if there is none), and swaps where the first operand has one element there.
    """
    shared = list(zip(reversed(first), reversed(second), strict=False))
    if not shared:
        return not first
    for size, other in shared:
        if max(size, other) > 1:
            return size == 1
    return True
