"""Attention in one piece, and the softmax of masked rows, against torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fxquant.errors import ExportError
from tests.ops.harness import assert_emits_like_torch

aten = torch.ops.aten
SHAPES = {"plain": (2, 3, 5, 8), "without heads": (2, 5, 8), "without a batch": (5, 8)}


def _qkv(shape: tuple[int, ...], keys: int = 7, value_size: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    *batch, length, size = shape
    shapes = ((*batch, length, size), (*batch, keys, size), (*batch, keys, value_size))
    return [torch.randn(each, generator=generator) for each in shapes]


def _attend(**options: Any) -> Any:
    return lambda q, k, v, *mask: aten.scaled_dot_product_attention.default(q, k, v, *mask, **options)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("opset", [13, 17, 21])
def test_attention_is_torchs(shape: tuple[int, ...], opset: int) -> None:
    dynamic = len(shape) > 2
    assert_emits_like_torch(_attend(), _qkv(shape), opset=opset, dynamic=dynamic, atol=1e-5)
    assert_emits_like_torch(_attend(scale=0.7), _qkv(shape), opset=opset, dynamic=dynamic, atol=1e-5)


@pytest.mark.parametrize("opset", [13, 21])
def test_attention_is_torchs_when_causal(opset: int) -> None:
    assert_emits_like_torch(_attend(is_causal=True), _qkv(SHAPES["plain"]), opset=opset, atol=1e-5)


def test_attention_is_torchs_when_causal_with_lengths_unknown() -> None:
    """Axis 0 is the length here: what the harness varies."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return aten.scaled_dot_product_attention.default(q, k, v, is_causal=True)

    q = torch.randn(5, 2, 8)
    assert_emits_like_torch(attend, [q, q + 1, q - 1], batches=(3, 9), atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "float", "infinite"])
@pytest.mark.parametrize("shape", [(5, 7), (2, 1, 5, 7), (2, 1, 1, 7)])
def test_attention_is_torchs_with_a_mask_that_hides_whole_rows(kind: str, shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[..., 0, :] = False
    if kind != "bool":
        hidden = -math.inf if kind == "infinite" else -3.0
        mask = torch.zeros(shape).masked_fill(~mask, hidden)
    dynamic = [True] * 3 + [len(shape) == 4]
    assert_emits_like_torch(_attend(), [*_qkv(SHAPES["plain"]), mask], dynamic=dynamic, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_attention_is_torchs_with_grouped_queries(groups: int) -> None:
    q = torch.randn(2, 4, 5, 8)
    k, v = torch.randn(2, 4 // groups, 7, 8), torch.randn(2, 4 // groups, 7, 8)
    assert_emits_like_torch(_attend(enable_gqa=True), [q, k, v], atol=1e-5)


def test_attention_is_refused_when_dropout_is_active() -> None:
    with pytest.raises(ExportError, match="dropout_p=0.5 is active"):
        assert_emits_like_torch(_attend(dropout_p=0.5), _qkv(SHAPES["plain"]))


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("dim", [-1, 1])
def test_safe_softmax_is_torchs_when_rows_are_hidden(opset: int, dim: int) -> None:
    x = torch.randn(2, 3, 4)
    x[0, 1, :] = -math.inf
    x[:, :, 2] = -math.inf
    assert_emits_like_torch(lambda x: aten._safe_softmax.default(x, dim), (x,), opset=opset, only="Softmax")
    function = lambda x: aten._safe_softmax.default(x, dim, torch.float64)  # noqa: E731
    assert_emits_like_torch(function, (x,), opset=opset)


def test_attention_module_is_torchs() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))

    assert_emits_like_torch(Block(), (torch.randn(2, 5, 8),), atol=1e-5)
