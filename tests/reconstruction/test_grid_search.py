"""The search for grids against brute force: every candidate tried on the inputs themselves."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.reconstruction.grid_search import (
    Candidates,
    by_moment,
    by_rows,
    choose_by_part,
    choose_by_row,
    parts_of,
)

Candidate = tuple[torch.Tensor, torch.Tensor]


def found_of(owner: torch.Tensor, weight: torch.Tensor, candidates: int, seed: int) -> Candidates:
    generator = torch.Generator().manual_seed(seed)
    encodings = int(owner.max()) + 1
    scales = torch.rand(candidates, encodings, generator=generator) * 0.3 + 0.05
    zeros = torch.randint(-1, 2, (candidates, encodings), generator=generator)
    return Candidates(weight, owner, scales, zeros, -4, 3)


def quantized(found: Candidates, best: torch.Tensor) -> torch.Tensor:
    """The weight where each encoding has the candidate that `best` says, element by element."""
    result = found.weight.clone().flatten()
    for index, (value, owner) in enumerate(zip(result.tolist(), found.owner.flatten().tolist(), strict=True)):
        scale = found.scales[best[owner], owner]
        zero = int(found.zero_points[best[owner], owner])
        code = min(max(round(value / float(scale)) + zero, found.qmin), found.qmax)
        result[index] = (code - zero) * scale
    return result.view(found.weight.shape)


def error(found: Candidates, best: torch.Tensor, rows: torch.Tensor) -> float:
    change = (quantized(found, best) - found.weight).double()
    return float((rows.double() @ change.transpose(1, 2)).square().sum())


@given(seed=st.integers(0, 200), per=st.sampled_from(["tensor", "channel", "shared by groups"]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_choice_of_rows_is_the_brute_force_minimum_of_every_encoding(seed: int, per: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, rows = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 9, 4, generator=generator)
    channels = {
        "tensor": torch.zeros(2, 3, dtype=torch.int64),
        "channel": torch.arange(6).view(2, 3),
        "shared by groups": torch.arange(3).expand(2, 3),
    }[per]
    owner = channels[..., None].expand(weight.shape)
    found = found_of(owner, weight, 4, seed)
    assert len(parts_of(owner) or []) == 1
    moment = rows.double().transpose(1, 2) @ rows.double()
    choice = choose_by_row(found, by_moment(moment))
    direct = choose_by_row(found, by_rows(lambda see: [see(piece) for piece in torch.split(rows, 4, dim=1)]))
    assert torch.equal(choice.best, direct.best)
    assert torch.allclose(choice.after, direct.after, rtol=1e-4)
    for encoding in range(found.scales.shape[1]):
        errors = []
        for index in range(len(found)):
            best = choice.best.clone()
            best[encoding] = index
            errors.append(error(found, best, rows))
        assert errors[int(choice.best[encoding])] <= min(errors) * (1 + 1e-6)
    assert abs(float(choice.after.sum()) - error(found, choice.best, rows)) <= 1e-5 * float(choice.after.sum()) + 1e-9
    assert float(choice.after.sum()) <= float(choice.before.sum())


def test_blocks_are_each_the_best_given_those_before_and_those_not_yet_chosen() -> None:
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        weight, rows = torch.randn(1, 3, 6, generator=generator), torch.randn(1, 20, 6, generator=generator)
        owner = torch.arange(9).view(1, 3, 3).repeat_interleave(2, dim=-1)
        found = found_of(owner, weight, 4, seed)
        parts = parts_of(owner)
        assert parts is not None and [part.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
        choice = choose_by_part(found, parts, rows.double().transpose(1, 2) @ rows.double())
        best = torch.zeros(9, dtype=torch.int64)
        for part in range(3):
            for row in range(3):
                encoding = row * 3 + part
                errors = []
                for index in range(4):
                    best[encoding] = index
                    errors.append(error(found, best, rows))
                best[encoding] = int(torch.tensor(errors).argmin())
        assert torch.equal(choice.best, best)
        assert abs(float(choice.after.sum()) - error(found, best, rows)) < 1e-5 * float(choice.after.sum())


def test_first_candidate_stays_where_none_is_better() -> None:
    weight = torch.randn(1, 2, 3)
    owner = torch.zeros(1, 2, 3, dtype=torch.int64)
    scales = torch.full((5, 1), 0.1)
    found = Candidates(weight, owner, scales, torch.zeros(5, 1, dtype=torch.int64), -8, 7)
    choice = choose_by_row(found, by_moment(torch.eye(3, dtype=torch.float64)[None]))
    assert choice.best.tolist() == [0]


def test_parts_are_refused_where_rows_are_divided_otherwise_or_share_them() -> None:
    assert parts_of(torch.tensor([[[0, 0, 1], [2, 3, 3]]])) is None  # not alike
    assert parts_of(torch.arange(3).expand(1, 2, 3)) is None  # an encoding for each column, for all rows
