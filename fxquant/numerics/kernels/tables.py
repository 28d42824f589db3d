"""Functions of one code: onnxruntime looks them up in a table of 256 codes, which it makes in float32.

    codes = QuantizeLinear(function(DequantizeLinear(x)))

QLinearConcat and QLinearWhere (the function is the identity), QLinearLeakyRelu, QLinearSigmoid. The logistic function
is that of `MlasComputeLogistic` (its FMA3 form, onnxruntime 1.31.1), a quotient of two polynomials that are evaluated
with fused multiply-adds:

    v = min(max(x, -18), 18)    logistic = min(max(f(f(f(p(v^2) v) / q(v^2)) + 1/2), 0), 1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fxquant.numerics.codes import Grid
from fxquant.numerics.kernels.float32 import fused_multiply_add
from fxquant.numerics.rounding import dequantize, quantize

_LOGISTIC_BOUND = 18.0
# From the highest power of v^2 to the lowest; the coefficients of `MlasLogisticConstants`, which are Eigen's.
_NUMERATOR = (4.37031012579801e-11, 1.15627324459942e-07, 6.08574864600143e-05, 8.51377133304701e-03, 0.248287947061529)
_DENOMINATOR = (
    6.10247389755681e-13,
    5.76102136993427e-09,
    6.29106785017040e-06,
    1.70198817374094e-03,
    0.116817656904453,
    0.993151921023180,
)


def regrid(x: torch.Tensor, grid: Grid, out: Grid) -> torch.Tensor:
    """Codes (int64) on `out` of int64 codes on `grid`."""
    return on_grid(dequantize(x, grid.scale, grid.zero_point), out)


def on_grid(real: torch.Tensor, out: Grid) -> torch.Tensor:
    """Codes (int64) of float32 numbers."""
    return quantize(real, out.scale, out.zero_point, out.qmin, out.qmax).to(torch.int64)


def leaky_relu(slope: float) -> Callable[[torch.Tensor, Grid, Grid], torch.Tensor]:
    """The formula of a leaky relu: codes (int64) from int64 codes and the two grids."""

    def formula(x: torch.Tensor, grid: Grid, out: Grid) -> torch.Tensor:
        real = dequantize(x, grid.scale, grid.zero_point)
        return on_grid(torch.where(real >= 0, real, real * slope), out)

    return formula


def sigmoid(x: torch.Tensor, grid: Grid, out: Grid) -> torch.Tensor:
    """Codes (int64) of the logistic function of int64 codes."""
    return on_grid(logistic(dequantize(x, grid.scale, grid.zero_point)), out)


def logistic(x: torch.Tensor) -> torch.Tensor:
    """The logistic function as onnxruntime's float32 Sigmoid computes it (float32)."""
    bounded = x.clamp(-_LOGISTIC_BOUND, _LOGISTIC_BOUND)
    square = bounded * bounded
    numerator = _polynomial(square, _NUMERATOR) * bounded
    return (numerator / _polynomial(square, _DENOMINATOR) + 0.5).clamp(0.0, 1.0)


def _polynomial(x: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    first, *others = (x.new_tensor(value) for value in coefficients)
    value = first
    for coefficient in others:
        value = fused_multiply_add(value, x, coefficient)
    return value


def number_codes(number: float, device: torch.device) -> tuple[torch.Tensor, Grid]:
    """The code and the grid that onnxruntime gives to a number beside an 8-bit operand of Where (`where_dummy_dq.cc`).

    Zero point 127; code 255 at scale f(x / 128) above 0, code 0 at scale f(x / -127) below, code 127 at scale 1 for 0.
    """
    code = 127 if number == 0 else 255 if number > 0 else 0
    real = torch.tensor(number, dtype=torch.float32, device=device)
    scale = torch.ones_like(real) if code == 127 else real / (code - 127)
    zero_point = torch.tensor(127, dtype=torch.int64, device=device)
    return torch.tensor(code, device=device), Grid(scale, zero_point, 0, 255)
