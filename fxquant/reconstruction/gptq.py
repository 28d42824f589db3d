"""GPTQ's rounding (Frantar et al., 2022, arXiv:2210.17323): weights rounded column by column, the error of each made up
for by the columns that are still to be rounded.

For one row w and the second moment H = X X^T of the layer's inputs, the output error is d H d^T. Rounding column i to
q_i, with the rest free, is best followed by w_j -= (w_i - q_i) [H^-1]_ij / [H^-1]_ii for the columns j behind i, where
H^-1 is that of the columns not yet rounded. All those inverses are rows of one factor: with H^-1 = U^T U, U upper
triangular, the update is (w_i - q_i) U_ij / U_ii.

It is computed in float64: H + damp has a condition of up to columns / 0.01, the factor of an inverse squares what that
costs, and float32 would keep two digits or less of a wide layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxquant.reconstruction.gain import deviation
from fxquant.reconstruction.product import squared_errors


@dataclass(frozen=True, eq=False)
class MatrixGrid:
    """The grid of each element of a weight's matrix: scale (float32) and zero point, and the codes' limits.

    Scale and zero point have the matrix's shape, [groups, outputs, columns].
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    qmin: int
    qmax: int

    def steps(self, weight: torch.Tensor, columns: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """Codes minus zero points (float64) nearest to `weight`, which has these columns."""
        zero = self.zero_point[..., columns].double()
        steps = torch.round(weight.float() / self.scale[..., columns]).double()
        return torch.clamp(steps, self.qmin - zero, self.qmax - zero)

    def real(self, steps: torch.Tensor) -> torch.Tensor:
        """Real numbers (float64) of steps of all columns."""
        return steps * self.scale.double()

    def codes(self, steps: torch.Tensor) -> torch.Tensor:
        """Codes (int32) of steps of all columns."""
        return (steps + self.zero_point.double()).to(torch.int32)


@dataclass(frozen=True)
class GptqOptions:
    """How GPTQ rounds.

    Arguments:
        damping: what is added to the diagonal of the second moment, as a share of its mean.
        block_size: columns whose updates are held back and applied to the columns behind them at once.
        act_order: whether columns go in the order of falling inputs, instead of their own.
    """

    damping: float = 0.01
    block_size: int = 128
    act_order: bool = False


@dataclass(frozen=True, eq=False)
class Rounded:
    """What was found for a weight's matrix.

    Arguments:
        codes: int32, the matrix's shape.
        nearest, chosen: the squared output error of each channel, with the nearest codes and with these.
        refused: where rows that were held back decided for the nearest codes, the squared output errors on these rows
            (float64): with the nearest, and with GPTQ's codes on the other rows.
    """

    codes: torch.Tensor
    nearest: torch.Tensor
    chosen: torch.Tensor
    refused: torch.Tensor | None = None


def gptq(
    weight: torch.Tensor,
    moment: torch.Tensor,
    grid: MatrixGrid,
    options: GptqOptions,
    held_back: torch.Tensor | None = None,
) -> Rounded:
    """Round a weight's matrix; output channels that GPTQ leaves no better than nearest are rounded to nearest.

    Arguments:
        weight: [groups, outputs, columns].
        moment: float64 [groups, columns, columns], see SecondMoment.
        held_back: that of other rows, added to it in place; None: there are none. Where GPTQ on `moment` alone
            does worse on these than rounding to nearest, by more than chance, the latter is kept: `moment` comes of so
            few rows that it says nothing of others (its null space is free, and errors are pushed there).

    A column whose input was 0 in every row is rounded to nearest: nothing speaks for another code.
    """
    wide = weight.detach().double()
    plain = grid.steps(wide)
    found, refused = _feed_back(wide, moment, grid, options), None
    if held_back is not None:
        on_found, on_plain = (squared_errors(grid.real(steps) - wide, held_back) for steps in (found, plain))
        difference = on_found - on_plain
        moment += held_back
        is_worse = float(difference.sum()) > deviation(difference)
        refused = torch.stack([on_plain.sum(), on_found.sum()]) if is_worse else None
        found = plain if is_worse else _feed_back(wide, moment, grid, options)
    nearest = squared_errors(grid.real(plain) - wide, moment)
    errors = squared_errors(grid.real(found) - wide, moment)
    is_better = errors < nearest
    steps = torch.where(is_better.unsqueeze(-1), found, plain)
    return Rounded(grid.codes(steps), nearest, torch.where(is_better, errors, nearest), refused)


def _feed_back(weight: torch.Tensor, moment: torch.Tensor, grid: MatrixGrid, options: GptqOptions) -> torch.Tensor:
    """Steps of all columns, by GPTQ."""
    order = _order(moment, options)
    factor = _inverse_factor(moment[:, order][:, :, order], options.damping)
    rest, steps = weight[..., order].clone(), torch.empty_like(weight)
    count = weight.shape[-1]
    for begin in range(0, count, options.block_size):
        end = min(begin + options.block_size, count)
        errors = torch.zeros_like(rest[..., begin:end])
        for column in range(begin, end):
            place = order[column : column + 1]
            found = grid.steps(rest[..., column : column + 1], place)
            steps[..., place] = found
            error = rest[..., column : column + 1] - found * grid.scale[..., place].double()
            error = error / factor[:, column, column].view(-1, 1, 1)
            rest[..., column:end] -= error * factor[:, column : column + 1, column:end]
            errors[..., column - begin : column - begin + 1] = error
        rest[..., end:] -= torch.bmm(errors, factor[:, begin:end, end:])
    return steps


def _order(moment: torch.Tensor, options: GptqOptions) -> torch.Tensor:
    """The columns in the order in which they are rounded, the same for all groups."""
    power = moment.diagonal(dim1=-2, dim2=-1).sum(0)
    if options.act_order:
        return torch.argsort(power, descending=True, stable=True)
    return torch.arange(power.numel(), device=power.device)


def _inverse_factor(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """U, upper triangular, with U^T U the inverse of the damped second moment."""
    power = moment.diagonal(dim1=-2, dim2=-1)
    mean = power.mean(-1, keepdim=True)
    added = torch.where(power == 0, torch.ones_like(power), damping * mean.expand_as(power))
    lower = torch.linalg.cholesky(moment + torch.diag_embed(added))
    factor: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return factor
