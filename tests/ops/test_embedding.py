"""Embedding against torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxquant.ops.base import Role
from fxquant.ops.table import TABLE
from tests.ops.harness import assert_emits_like_torch


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(2, 5), (2,), (2, 3, 4)])
def test_embedding_is_torchs(opset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    table = nn.Embedding(11, 6, padding_idx=3)
    indices = torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    assert_emits_like_torch(table, (indices,), opset=opset, only="Gather", atol=0, rtol=0)


def test_embedding_keeps_the_grid_of_its_table() -> None:
    (definition,) = [found for found in TABLE if found.name == "embedding"]
    assert (definition.role, definition.weight, definition.grid_inputs) == (Role.GRID_PRESERVING, 0, (0,))
