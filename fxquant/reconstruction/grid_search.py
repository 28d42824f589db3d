"""Which of several grids of a weight hurts its layer's output least (AIMET calls the search layer by layer sequential
MSE).

With d = Q_k(w) - w the change of a row of weights on candidate k, and G the second moment of the layer's inputs, the
squared error of that output channel is d G d^T: G, summed once over the data, serves all candidates. Where G does not
fit in memory, every candidate is multiplied with every batch instead.

1. Each row has one grid, which it may share with others (per tensor, per channel): the sum over those rows decides.
2. Each row has several, of its own (blocks): they are chosen one after another, each given the others as they are, by
   what of the error depends on it, d_c G_cc d_c^T + 2 d_c G_cr d_r^T (c: the block's columns, r: the rest).

A candidate must be better than those before it; candidate 0 is the grid as it is, so no layer's error grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fxquant.reconstruction.product import squared_errors

Errors = Callable[["Candidates"], torch.Tensor]
Visit = Callable[[Callable[[torch.Tensor], None]], object]  # shows all rows, piece by piece, to what it is given


@dataclass(frozen=True, eq=False)
class Candidates:
    """Grids to choose from, for a weight's matrix.

    Arguments:
        weight: [groups, outputs, columns].
        owner: which of the weight's encodings each element belongs to, by flat index (the matrix's shape).
        scales, zero_points: [candidates, encodings], float32 and int64.
        qmin, qmax: limits of the codes.
    """

    weight: torch.Tensor
    owner: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor
    qmin: int
    qmax: int

    def __len__(self) -> int:
        return self.scales.shape[0]

    def difference(self, index: int, columns: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Q_k(w) - w (float64) of candidate `index`, of some columns."""
        weight, owner = self.weight[..., columns].float(), self.owner[..., columns]
        scale, zero = self.scales[index][owner], self.zero_points[index][owner].double()
        steps = torch.clamp(torch.round(weight / scale).double(), self.qmin - zero, self.qmax - zero)
        return steps * scale.double() - weight.double()


@dataclass(frozen=True, eq=False)
class Choice:
    """The candidate of each encoding, and the squared error of each output channel on candidate 0 and on the chosen."""

    best: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor


def parts_of(owner: torch.Tensor) -> list[torch.Tensor] | None:
    """The columns that have an encoding of their own, the same in all rows; None if rows are not divided alike, or
    share encodings of parts of them.
    """
    known = sorted(set(owner[0, 0].tolist()))
    inverse = torch.searchsorted(torch.tensor(known, device=owner.device), owner[0, 0].contiguous())
    parts = [torch.nonzero(inverse == part).flatten() for part in range(len(known))]
    firsts = torch.stack([owner[..., part[0]] for part in parts], -1)
    if not torch.equal(firsts[..., inverse], owner):
        return None
    is_own = len(set(firsts.flatten().tolist())) == firsts.numel()
    return parts if len(parts) == 1 or is_own else None


def by_moment(moment: torch.Tensor) -> Errors:
    """Errors [candidates, groups, outputs] of whole rows, from the inputs' second moment."""
    return lambda found: torch.stack([squared_errors(found.difference(index), moment) for index in range(len(found))])


def by_rows(visit: Visit) -> Errors:
    """The same from the inputs themselves, float32 [groups, rows, columns] in pieces."""

    def errors(found: Candidates) -> torch.Tensor:
        total = torch.zeros(len(found), *found.weight.shape[:2], dtype=torch.float64, device=found.weight.device)

        def see(rows: torch.Tensor) -> None:
            for index in range(len(found)):
                total[index] += output_power(rows, found.difference(index))

        visit(see)
        return total

    return errors


def output_power(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each output channel of a product (float64, [groups, outputs]), over these rows."""
    return torch.bmm(rows, matrix.float().transpose(1, 2)).double().square().sum(1)


def choose_by_row(found: Candidates, errors_of: Errors) -> Choice:
    """Case 1."""
    errors = errors_of(found)
    owner = found.owner[..., 0].flatten()
    sums = torch.zeros(len(found), found.scales.shape[1], dtype=torch.float64, device=errors.device)
    best = sums.index_add(1, owner, errors.flatten(1)).argmin(0)
    chosen = errors.flatten(1).gather(0, best[owner].unsqueeze(0)).view(errors.shape[1:])
    return Choice(best, errors[0], chosen)


def choose_by_part(found: Candidates, parts: list[torch.Tensor], moment: torch.Tensor) -> Choice:
    """Case 2."""
    best = torch.zeros(found.scales.shape[1], dtype=torch.int64, device=found.scales.device)
    change = found.difference(0)
    pull = torch.bmm(change, moment)
    before = (pull * change).sum(-1)
    for part in parts:
        own = moment[:, part][:, :, part]
        others = pull[..., part] - torch.bmm(change[..., part], own)
        tried = [found.difference(index, part) for index in range(len(found))]
        errors = torch.stack([((torch.bmm(one, own) + 2 * others) * one).sum(-1) for one in tried])
        chosen = errors.argmin(0)
        new = torch.stack(tried).gather(0, chosen[None, ..., None].expand(1, *tried[0].shape))[0]
        pull += torch.bmm(new - change[..., part], moment[:, part])
        change[..., part] = new
        best[found.owner[..., part[0]].flatten()] = chosen.flatten()
    return Choice(best, before, (pull * change).sum(-1))
