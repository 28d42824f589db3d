"""The `integer` arithmetic: the reference. Products on int64 with the wrap of onnxruntime's int32, the rest by formula.

Products are computed by the operation itself on float64 codes: all sums stay far below 2^53, so that they are the sums
of int64 arithmetic, which torch has no fast convolution for. They are int64 from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxquant.numerics.codes import Codes, Grid, codes_from_integers
from fxquant.numerics.kernels.requantize import dequantize_product, product_multiplier, requantize, wrap_int32
from fxquant.numerics.rounding import quantize
from fxquant.ops.kernels import GeneralKernel, PairKernel, ProductKernel, UnaryKernel
from fxquant.simulation.alone import Alone
from fxquant.simulation.executor import Call
from fxquant.simulation.islands import DEFAULT_OPSET, Harvest
from fxquant.simulation.plan import Unary, along_channels


class IntegerArithmetic:
    """See the module's docstring. It has no gradients; `opset` is that of the file."""

    def __init__(self, opset: int = DEFAULT_OPSET) -> None:
        self._harvest = Harvest(opset)
        self._alone = Alone(opset)

    def quantize(self, real: torch.Tensor, grid: Grid) -> Codes:
        """Codes of real values."""
        scale, zero_point = grid.for_rank(real.ndim)
        return codes_from_integers(quantize(real.detach(), scale, zero_point, grid.qmin, grid.qmax), grid)

    def run(self, call: Call) -> Codes | torch.Tensor:
        """By the kernel's form."""
        kernel, node = call.site.kernel, call.site.operation
        if isinstance(kernel, ProductKernel):
            return _product(call, kernel)
        assert call.out is not None, "only products write float32"
        if isinstance(kernel, PairKernel):
            one, other = call.args[0], call.args[1]
            reverse = kernel.is_reversed(node, one.centred.shape, other.centred.shape)
            codes = kernel.formula(reverse)(one.integers, other.integers, one.grid, other.grid, call.out)
        elif isinstance(kernel, UnaryKernel):
            assert kernel.codes_for is not None
            codes = kernel.codes_for(node)(call.args[0].integers, call.args[0].grid, call.out)
        else:
            assert isinstance(kernel, GeneralKernel) and kernel.codes is not None
            codes = kernel.codes(node, call.args, call.out)
        return codes_from_integers(codes, call.out)

    def look_up(self, function: Unary, source: Codes, out: Grid | None) -> Codes | torch.Tensor:
        """From the table that was harvested of it."""
        return self._harvest.look_up(function, Codes(source.centred.detach(), source.grid), out)

    def compute(self, node: fx.Node, inputs: Mapping[fx.Node, Any], in_torch: Callable[[], Any]) -> Any:
        """In onnxruntime itself, the operation alone: nearer than torch, and not certified."""
        return self._alone.compute(node, inputs, in_torch)


def _product(call: Call, kernel: ProductKernel) -> Codes | torch.Tensor:
    left, right = call.args[kernel.left], call.args[kernel.right]
    operands = [part.centred.detach().double() if isinstance(part, Codes) else part for part in call.args]
    target = call.site.operation.target
    assert callable(target)
    accumulator = wrap_int32(target(*operands, **call.site.operation.kwargs).to(torch.int64))
    scale = along_channels(right.grid.scale, kernel, call.site)
    if call.out is None:
        return dequantize_product(accumulator, left.grid.scale, scale)
    multiplier = product_multiplier(left.grid.scale, scale, call.out.scale)
    return codes_from_integers(requantize(accumulator, multiplier, call.out), call.out)
