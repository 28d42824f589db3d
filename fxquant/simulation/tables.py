"""Kernels of one or two codes as tables of all codes, with the derivatives of fake quantization beside them.

    one code     y = T[x - qmin]                               at most 256 entries
    two codes    y = T[(a - qmin_a) * n_b + b - qmin_b]        at most 65,536 entries

T comes from the reference formula. D, of the same size, is what fake quantization's gradient would be at each entry:
the derivative of the same nodes in float, quantizer included, found by autograd when a backward pass first asks for it
(made in a forward, it would show in the caller's saved-tensor hooks, and could not be made in inference mode). So is
U, what the quantizer was given at each entry, in steps of its grid: learned ranges need it (learned_ranges.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx

from fxquant.numerics.codes import Codes, Grid
from fxquant.numerics.rounding import dequantize
from fxquant.ops.kernels import PairKernel, UnaryKernel
from fxquant.simulation.executor import Call
from fxquant.simulation.first_order import first_order
from fxquant.simulation.learned_ranges import learn
from fxquant.simulation.real import real_site, unquantized_site

_OPERAND = object()  # stands for an operand


@dataclass(frozen=True, eq=False)
class Table:
    """Centred codes (float32) by index; `derive` and `unround` compute what `derivatives` and `units` keep."""

    codes: torch.Tensor
    derive: Callable[[], tuple[torch.Tensor, ...]]
    unround: Callable[[], torch.Tensor]

    @cached_property
    def derivatives(self) -> tuple[torch.Tensor, ...]:
        """For each operand its derivative by index (real over real)."""
        return self.derive()

    @cached_property
    def units(self) -> torch.Tensor:
        """By index the value in front of the quantizer, in steps of its grid."""
        return self.unround()


@dataclass(frozen=True)
class _Made:
    """A table, the grids that it was last used on, and their numbers when it was made."""

    table: Table
    grids: tuple[Grid, ...]
    numbers: tuple[tuple[float, int, int, int], ...]
    device: torch.device


class Tables:
    """Makes the table of a site when it is first used, and again when a grid of it has other numbers."""

    def __init__(self) -> None:
        self._made: dict[tuple[fx.Node, bool], _Made] = {}  # by operation, and whether its operands are reversed

    def look_up(self, call: Call, kernel: PairKernel | UnaryKernel) -> Codes:
        """Codes that the kernel writes."""
        assert call.out is not None
        operands = [part for part in call.args if isinstance(part, Codes)]
        grids = (*(part.grid for part in operands), call.out)
        key = call.site.operation, isinstance(kernel, PairKernel) and _is_reversed(call, kernel, operands)
        made = self._made.get(key)
        if made is None or any(map(operator.is_not, made.grids, grids)):
            # The grid of a parameter is another object at every forward, mostly with the same numbers.
            numbers, device = tuple(grid.numbers for grid in grids), call.out.scale.device
            if made is not None and (made.numbers, made.device) == (numbers, device):
                table = made.table
            else:
                with torch.inference_mode(False):
                    table = _make(call, _formula(call, kernel, key[1]), operands, call.out)
            made = self._made[key] = _Made(table, grids, numbers, device)
        return look_up_codes(made.table, operands, call.out)


def look_up_codes(table: Table, operands: list[Codes], out: Grid) -> Codes:
    """A table's codes at its operands' codes; gradients by its derivatives, for a learned range too."""
    index = _index(operands)
    values = _look_up(index, table, *(part.centred for part in operands))
    return learn(Codes(values, out), lambda index: _take(table.units, index), index)


def look_up(table: Table, operands: list[Codes]) -> torch.Tensor:
    """A table's entries (real numbers) at its operands' codes; gradients by its derivatives."""
    return _look_up(_index(operands), table, *(part.centred for part in operands))


def _is_reversed(call: Call, kernel: PairKernel, operands: list[Codes]) -> bool:
    first, second = operands
    return kernel.is_reversed(call.site.operation, first.centred.shape, second.centred.shape)


def _formula(call: Call, kernel: PairKernel | UnaryKernel, reverse: bool) -> Callable[..., torch.Tensor]:
    """From the operands' codes, then their grids, then the output's, to codes."""
    if isinstance(kernel, PairKernel):
        return kernel.formula(reverse)
    assert kernel.codes_for is not None
    return kernel.codes_for(call.site.operation)


def _make(call: Call, formula: Callable[..., torch.Tensor], operands: list[Codes], out: Grid) -> Table:
    axes = [torch.arange(part.grid.qmin, part.grid.qmax + 1, device=part.centred.device) for part in operands]
    every = [axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")]
    grids = tuple(part.grid for part in operands)
    codes = formula(*every, *grids, out)
    centred = (codes - out.zero_point).to(torch.float32)
    # The operands' values are not kept with the table: only where they stand.
    bare = replace(call, args=tuple(_OPERAND if isinstance(part, Codes) else part for part in call.args))
    return Table(centred, partial(_derivatives, bare, every, grids), partial(_units, bare, every, grids))


def _derivatives(call: Call, every: list[torch.Tensor], grids: tuple[Grid, ...]) -> tuple[torch.Tensor, ...]:
    with torch.enable_grad():
        reals = [real.requires_grad_() for real in _reals(every, grids)]
        value = real_site(call)(_filled(call, reals))
        found = torch.autograd.grad(value.sum(), reals, allow_unused=True)
    return tuple(torch.zeros_like(one) if one is None else one for one in found)


@torch.no_grad()
def _units(call: Call, every: list[torch.Tensor], grids: tuple[Grid, ...]) -> torch.Tensor:
    assert call.out is not None
    return unquantized_site(call)(_filled(call, _reals(every, grids))) / call.out.scale


def _reals(every: list[torch.Tensor], grids: tuple[Grid, ...]) -> list[torch.Tensor]:
    return [dequantize(codes, grid.scale, grid.zero_point) for codes, grid in zip(every, grids, strict=True)]


def _filled(call: Call, reals: list[torch.Tensor]) -> tuple[Any, ...]:
    given = iter(reals)
    return tuple(next(given) if part is _OPERAND else part for part in call.args)


def _index(operands: list[Codes]) -> torch.Tensor:
    """Index (int32) of each element's entry; codes that are no numbers (on a grid of no numbers) have some entry."""
    first = operands[0]
    entries = first.grid.qmax - first.grid.qmin + 1
    if len(operands) == 1:
        return (first.centred.detach() - first.grid.bounds[0]).to(torch.int32).clamp_(0, entries - 1)
    other = operands[1]
    count = other.grid.qmax - other.grid.qmin + 1
    offset = first.grid.bounds[0] * count + other.grid.bounds[0]
    # At most 65,535: exact in float32.
    index = torch.add(other.centred.detach(), first.centred.detach(), alpha=count)
    return index.sub_(offset).to(torch.int32).clamp_(0, entries * count - 1)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: torch.Tensor, table: Table, *centred: torch.Tensor) -> torch.Tensor:
        ctx.table, ctx.shapes = table, [part.shape for part in centred]
        ctx.save_for_backward(index)
        return _take(table.codes, index)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        parts = zip(ctx.table.derivatives, ctx.shapes, wanted, strict=True)
        return (
            None,
            None,
            *((_take(d, index).mul_(grads[0])).sum_to_size(shape) if need else None for d, shape, need in parts),
        )


def _take(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return table.index_select(0, index.flatten()).view(index.shape)


_look_up: Callable[..., torch.Tensor] = _LookUp.apply  # torch leaves Function.apply untyped
