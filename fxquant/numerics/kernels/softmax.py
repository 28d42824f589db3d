"""QLinearSoftmax: codes of the softmax along one axis, by a table of exponentials.

    b = max(0, log(FLT_MAX / D) - 5) / sx        T[i] = f(exp((i - 255 + b) sx))        (b, exp in float64)
    t = T[x - max(x) + 255]    S = float32 sum of t, one element after another
    codes = min(255, rint(f(f(t floor(f(1 / sy))) / S)) + zy)

D is the axis's size, and floor(1 / sy) the number of steps in [0, 1]: a grid whose 1 / sy is no whole number is not
honoured. The product overflows where D times e^5 is below the number of steps (D = 1): onnxruntime then converts
infinity to the integer 0. (`QlinearSoftmaxCPU`, onnxruntime 1.31.1; other axes than the last are transposed.)
"""

from __future__ import annotations

import math

import torch

from fxquant.numerics.codes import Grid

_LARGEST = torch.finfo(torch.float32).max
_RESERVE = 5.0  # the table's largest entry is e^-5 of what float32 can hold in sums of D entries
_TOP = 255


def softmax(x: torch.Tensor, grid: Grid, out: Grid, axis: int) -> torch.Tensor:
    """Codes (int64) of the softmax of `x` (int64 codes of 8 bits or fewer, unsigned) along `axis`."""
    table = exponentials(grid.scale, x.shape[axis])
    terms = table[x - x.amax(axis, keepdim=True) + _TOP]
    total = torch.zeros_like(terms.select(axis, 0))
    for term in terms.unbind(axis):
        total = total + term
    quotient = terms * torch.floor(1.0 / out.scale) / total.unsqueeze(axis)
    steps = torch.where(torch.isinf(quotient), torch.zeros_like(quotient), torch.round(quotient))
    return (steps.to(torch.int64) + out.zero_point).clamp(out.qmin, out.qmax)


def exponentials(scale: torch.Tensor, size: int) -> torch.Tensor:
    """The table T (float32, 256 entries) for an input of scale `scale` and an axis of `size` elements."""
    step = scale.to(torch.float64)
    largest = torch.tensor(_LARGEST, dtype=torch.float32) / size
    logarithm = torch.tensor(math.log(float(largest)), dtype=torch.float32)  # logf: shows in ties
    shift = max(0.0, float(logarithm) - _RESERVE) / step
    indices = torch.arange(_TOP + 1, dtype=torch.float64, device=scale.device)
    return torch.exp((indices - _TOP + shift) * step).to(torch.float32)


def overflow(out_scale: float, size: int) -> str:
    """Why the kernel gives no softmax on an output grid: where floor(1 / sy) > e^5 size its products overflow."""
    steps, headroom = 1.0 / out_scale, 0.99 * math.exp(_RESERVE) * size
    if steps <= headroom:
        return ""
    return f"QLinearSoftmax overflows: 1 / output scale ({steps:.4g}) exceeds {headroom:.4g}"
