"""Gradients of learned ranges in the `exact` arithmetic: those of fake quantization, at every end of a kernel.

    u = the value in front of the quantizer, relu and clip applied, in steps of its grid
    ds = sum of G (rint(u) - u) inside the grid, G n or G p outside        dz = sum of -G s outside

with G = dL/dx_hat, which is what reaches centred codes (numerics/codes.py); numerics/learned_rounding.py has the rest.
How u is found depends on the kernel, and waits for a backward pass:

    product, float   the unrounded f(acc * M), f(x / s): both are there
    table            u of every entry, looked up
    other            the same nodes in float, computed again
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxquant.numerics.codes import Codes, Grid
from fxquant.numerics.learned_rounding import grid_gradients
from fxquant.numerics.rounding import along_axis
from fxquant.simulation.first_order import first_order

Units = Callable[..., torch.Tensor]


def is_learning(grid: Grid | None) -> bool:
    """Whether autograd is to see how a grid came about."""
    return grid is not None and grid.learned is not None and torch.is_grad_enabled()


def learn(codes: Codes, units: Units, *kept: torch.Tensor) -> Codes:
    """The same codes, whose gradient reaches the parameters of their grid's range too, if it is learned.

    Arguments:
        units: from `kept`, u.
        kept: tensors, saved for the backward pass.
    """
    grid = codes.grid
    if grid.learned is None or not torch.is_grad_enabled():
        return codes
    found = grid.learned(codes.centred.shape)
    scale, zero_point = (along_axis(part, grid.granularity, codes.centred.ndim) for part in found)
    ends = grid.qmin, grid.qmax
    return Codes(_learn(codes.centred, scale, zero_point, ends, units, *(one.detach() for one in kept)), grid)


class _Learn(torch.autograd.Function):
    """`centred`, with a gradient for its grid."""

    @staticmethod
    def forward(
        ctx: Any,
        centred: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        ends: tuple[int, int],
        units: Units,
        *kept: torch.Tensor,
    ) -> torch.Tensor:
        ctx.ends, ctx.units = ends, units
        ctx.save_for_backward(scale, zero_point, *kept)
        return centred.view_as(centred)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale, zero_point, *kept = ctx.saved_tensors
        units = ctx.units(*kept)
        one = units.new_ones(())
        _, by_scale, by_zero_point = grid_gradients(
            grads[0], units, one, scale, zero_point, ctx.ends, wants_zero_point=ctx.needs_input_grad[2]
        )
        return (grads[0], by_scale, by_zero_point, None, None, *(None for _ in kept))


_learn: Callable[..., torch.Tensor] = _Learn.apply  # torch leaves Function.apply untyped
