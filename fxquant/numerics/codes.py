"""Codes: integers on a grid, as simulations carry them from kernel to kernel.

A code is carried *centred*, code - zero point, in float32: real 0 is 0 (so that zero padding needs no care), values of
up to 16 bits are exact, and autograd can pass. By convention the gradient that reaches a centred tensor is that with
respect to the **real** value, x_hat = centred * scale, so that no kernel has to scale gradients by its inputs' scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from fxquant.numerics.rounding import along_axis
from fxquant.spec import PER_TENSOR, Granularity


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid of one tensor: `scale` (float32) and `zero_point` (int64), of an encoding's shape, and its codes.

    Arguments:
        qmin, qmax: lowest and highest code.
        granularity: what scale and zero point belong to.
        learned: of a grid that is: for the shape of what is quantized, its scale and zero point (float32) as autograd
            sees them.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    qmin: int
    qmax: int
    granularity: Granularity = PER_TENSOR
    learned: Callable[[torch.Size], tuple[torch.Tensor, torch.Tensor]] | None = None

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest code minus the zero point, of a grid per tensor (on a GPU: read once)."""
        zero_point = int(self.zero_point)
        return float(self.qmin - zero_point), float(self.qmax - zero_point)

    @property
    def reach(self) -> float:
        """Largest magnitude of a real value on the grid (per tensor)."""
        return max(-self.bounds[0], self.bounds[1]) * float(self.scale)

    @property
    def numbers(self) -> tuple[float, int, int, int]:
        """Scale, zero point, lowest and highest code as they are now, of a grid per tensor."""
        return float(self.scale), int(self.zero_point), self.qmin, self.qmax

    def snapshot(self) -> Grid:
        """The same grid, which stays as it is when the buffers are written to; of use to autograd in any mode."""
        with torch.inference_mode(False):
            return replace(self, scale=self.scale.clone(), zero_point=self.zero_point.clone())

    def same_as(self, other: Grid) -> bool:
        """Whether both map the same codes to the same real numbers."""
        if (self.qmin, self.qmax, self.granularity) != (other.qmin, other.qmax, other.granularity):
            return False
        pairs = ((self.scale, other.scale), (self.zero_point, other.zero_point))
        return all(one is two or torch.equal(one, two) for one, two in pairs)

    def for_rank(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, shaped to broadcast against a tensor of `rank` dimensions."""
        return along_axis(self.scale, self.granularity, rank), along_axis(self.zero_point, self.granularity, rank)


@dataclass(frozen=True, eq=False)
class Codes:
    """A tensor on a grid; `centred` is code - zero point in float32, with the gradient of the real value."""

    centred: torch.Tensor
    grid: Grid

    @property
    def integers(self) -> torch.Tensor:
        """The codes themselves, int64."""
        _, zero_point = self.grid.for_rank(self.centred.ndim)
        return self.centred.detach().to(torch.int64) + zero_point

    def real(self) -> torch.Tensor:
        """Real values (float32), as DequantizeLinear gives them; the gradient passes unchanged."""
        scale, _ = self.grid.for_rank(self.centred.ndim)
        return _real(self.centred, scale)


def codes_from_integers(integers: torch.Tensor, grid: Grid) -> Codes:
    """Codes of integers (any integer dtype)."""
    _, zero_point = grid.for_rank(integers.ndim)
    return Codes((integers.to(torch.int64) - zero_point).to(torch.float32), grid)


class _Real(torch.autograd.Function):
    """centred * scale, whose gradient is that of the real value already."""

    @staticmethod
    def forward(ctx: Any, centred: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return centred * scale

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0], None


_real: Callable[..., torch.Tensor] = _Real.apply  # torch leaves Function.apply untyped
