"""The integer kernel of an operation: which one onnxruntime runs between Q/DQ, and how its codes are computed.

An OpDef names one of four forms. A simulation turns each form into codes (and, for training, into a gradient):

    ProductKernel   sum of products of two operands (and a bias), requantized: convolution, linear, matmul
    PairKernel      a function of two codes: add, mul                         (a table of 65,536 entries)
    UnaryKernel     a function of one code: sigmoid, leaky relu               (a table of 256 entries)
    GeneralKernel   everything else: pooling, softmax, concatenation, where
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxquant.numerics.codes import Grid

KERNEL_BITS = 8  # onnxruntime's integer kernels take codes of 8 bits; wider grids run in float

PairFormula = Callable[[torch.Tensor, torch.Tensor, Grid, Grid, Grid], torch.Tensor]
UnaryFormula = Callable[[torch.Tensor, Grid, Grid], torch.Tensor]
GeneralFormula = Callable[[fx.Node, Sequence[Any], Grid], torch.Tensor]


def accepts(node: fx.Node) -> str:
    """The `declines` of a kernel that takes every node of its operation."""
    return ""


def fits(node: fx.Node, operands: Sequence[Grid], out: Grid) -> str:
    """The `overflows` of a kernel that is right on all grids."""
    return ""


def in_order(node: fx.Node, first: Sequence[int], second: Sequence[int]) -> bool:
    """The `is_reversed` of a kernel whose operands' order does not matter."""
    return False


@dataclass(frozen=True)
class Kernel:
    """An integer kernel of onnxruntime.

    Arguments:
        operator: the operator that runs instead of Q/DQ around the operation: "QLinearConv". Certification is by it.
        declines: why a given node has no such kernel, by its arguments; "" if it has.
        overflows: why the kernel fails, or computes something else, on the given grids of operands and output; "" if
            it is right. Lowering then keeps the operation in float (fxquant.lowering.barriers).
    """

    operator: str
    declines: Callable[[fx.Node], str] = accepts
    overflows: Callable[[fx.Node, Sequence[Grid], Grid], str] = field(default=fits, kw_only=True)

    def why_overflow(self, node: fx.Node, operands: Sequence[Grid | None], out: Grid) -> str:
        """`overflows` of operands as they are; "" if one has no grid, or a grid several scales: no kernel runs then."""
        grids = [grid for grid in operands if grid is not None]
        if len(grids) < len(operands) or any(grid.scale.ndim for grid in (*grids, out)):
            return ""
        return self.overflows(node, grids, out)


@dataclass(frozen=True)
class ProductKernel(Kernel):
    """acc = the operation itself on centred integer codes, bias codes included; then `requantize`.

    Arguments:
        left, right: positions of the factors among the node's args (the bias's is OpDef.bias); `right` may have a
            scale for each output channel.
        left_axis, right_axis: the contracted axes.
        channels: the output channels' axis in the output.
        optional_bias: whether the bias may be None.
        writes_float: whether it can do without a grid behind it.
    """

    left: int = 0
    right: int = 1
    left_axis: int = -1
    right_axis: int = -2
    channels: int = -1
    optional_bias: bool = True
    writes_float: bool = True


@dataclass(frozen=True)
class PairKernel(Kernel):
    """Codes (int64) from two operands' codes (int64, broadcastable) and the three grids; operands are args 0 and 1.

    Arguments:
        is_reversed: whether the runtime takes the operands of a node, given their shapes, in the other order.
    """

    codes: PairFormula | None = None
    is_reversed: Callable[[fx.Node, Sequence[int], Sequence[int]], bool] = in_order

    def formula(self, reverse: bool) -> PairFormula:
        """`codes` of operands in the node's order, whichever the runtime takes first."""
        codes = self.codes
        assert codes is not None
        return (lambda a, b, grid_a, grid_b, out: codes(b, a, grid_b, grid_a, out)) if reverse else codes


@dataclass(frozen=True)
class UnaryKernel(Kernel):
    """Codes (int64) from one operand's codes (int64) and the grids; `codes_for` reads the node's other arguments."""

    codes_for: Callable[[fx.Node], UnaryFormula] | None = None


@dataclass(frozen=True)
class GeneralKernel(Kernel):
    """Codes (int64) from a node, its args with Codes in place of quantized nodes and values in place of others, and
    the output's grid."""

    codes: GeneralFormula | None = None
