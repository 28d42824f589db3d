"""Comparisons, logic and masks against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxquant.errors import FxquantError
from fxquant.ops.base import Role
from tests.ops.harness import assert_emits_like_torch
from tests.ops.inputs import bools, floats, integers, role_of

aten = torch.ops.aten
Function = Callable[..., Any]

F, G = floats(2, 3, 4), floats(2, 3, 4, seed=1)
N, J = integers(2, 3, 4), integers(2, 3, 4, seed=1)
B, C = bools(2, 3, 4), bools(2, 3, 4, seed=1)
SPECIAL = torch.tensor([[0.0, torch.nan, torch.inf], [-torch.inf, 1.0, -1.0]])
COMPARISONS = "eq ne lt le gt ge".split()
ROW = floats(4)


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparison_of_tensors_equals_torch(name: str) -> None:
    packet = getattr(aten, name)

    def function(f: Any, g: Any, i: Any, j: Any, b: Any, c: Any, row: Any) -> Any:
        pairs = [(f, g), (i, j), (f, i), (b, c), (f, row), (i.to(torch.uint8), j.to(torch.uint8))]
        return [packet.Tensor(left, right) for left, right in pairs]

    assert_emits_like_torch(function, (F, G, N, J, B, C, ROW), opset=13)


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparison_with_a_number_equals_torch(name: str) -> None:
    packet = getattr(aten, name)

    def function(f: Any, i: Any, b: Any) -> Any:
        return [packet.Scalar(f, 0), packet.Scalar(i, 3), packet.Scalar(i, 2.5), packet.Scalar(b, True)]

    assert_emits_like_torch(function, (F, N, B), opset=21)


@pytest.mark.parametrize("name", ["isnan", "isinf", "isfinite"])
def test_special_numbers_equal_torch(name: str) -> None:
    def function(x: Any, i: Any) -> Any:
        return getattr(aten, name).default(x), getattr(aten, name).default(i)

    assert_emits_like_torch(function, (SPECIAL, N), opset=13)


def test_logic_equals_torch() -> None:
    def function(f: Any, i: Any, b: Any) -> Any:
        ops = (aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default)
        return [op(left, right) for op in ops for left, right in ((b, i), (f, b))] + [aten.logical_not.default(i)]

    assert_emits_like_torch(function, (F.round(), N, B), opset=13)


@pytest.mark.parametrize("name", ["and", "or", "xor"])
def test_bitwise_on_booleans_equals_torch(name: str) -> None:
    def function(b: Any, c: Any) -> Any:
        named, operator = getattr(aten, f"bitwise_{name}"), getattr(aten, f"__{name}__")
        return named.Tensor(b, c), operator.Tensor(b, c), named.Scalar(b, True), operator.Scalar(b, False)

    assert_emits_like_torch(function, (B, C), opset=13)


@pytest.mark.parametrize("name", ["and", "or", "xor"])
def test_bitwise_on_integers_equals_torch(name: str) -> None:
    def function(i: Any, j: Any) -> Any:
        return getattr(aten, f"bitwise_{name}").Tensor(i, j), getattr(aten, f"__{name}__").Scalar(i, 5)

    assert_emits_like_torch(function, (N, J), opset=18)
    with pytest.raises(FxquantError, match="from opset 18 on"):
        assert_emits_like_torch(function, (N, J), opset=17)


def test_bitwise_not_equals_torch() -> None:
    assert_emits_like_torch(lambda b: aten.bitwise_not.default(b), (B,), opset=13)
    assert_emits_like_torch(lambda i: aten.bitwise_not.default(i), (N,), opset=18)


WHERE: list[tuple[str, Function, tuple[torch.Tensor, ...]]] = [
    ("self", lambda b, f, g: aten.where.self(b, f, g), (B, F, G)),
    ("broadcast", lambda b, f, g: aten.where.self(b, f, g), (B, F, ROW)),
    ("promoted", lambda b, f, g: aten.where.self(b, f, g), (B, F, N)),
    ("bool", lambda b, f, g: aten.where.self(b, f, g), (B, C, B)),
    ("int8", lambda b, f, g: aten.where.self(b, f.to(torch.int8), g.to(torch.int8)), (B, N, J)),
    ("ScalarOther", lambda b, f: aten.where.ScalarOther(b, f, -torch.inf), (B, F)),
    ("ScalarSelf", lambda b, f: aten.where.ScalarSelf(b, 1.5, f), (B, F)),
    ("ScalarSelf-int", lambda b, i: aten.where.ScalarSelf(b, 2, i), (B, N)),
    ("Scalar", lambda b: aten.where.Scalar(b, 0.0, -1.0), (B,)),
    ("masked_fill", lambda b, f: aten.masked_fill.Scalar(f, b, torch.finfo(torch.float32).min), (B, F)),
    ("masked_fill-int", lambda b, i: aten.masked_fill.Scalar(i, b, -100), (B, N)),
    ("masked_fill-bool", lambda b, c: aten.masked_fill.Scalar(c, b, True), (B, C)),
    ("masked_fill-broadcast", lambda b, f: aten.masked_fill.Scalar(f, b[:1, :, :1], 0), (B, F)),
    ("masked_fill.Tensor", lambda b, f, v: aten.masked_fill.Tensor(f, b, v), (B, F, torch.tensor(-2.0))),
]


@pytest.mark.parametrize(("name", "function", "inputs"), WHERE, ids=[row[0] for row in WHERE])
def test_choice_equals_torch(name: str, function: Function, inputs: tuple[torch.Tensor, ...]) -> None:
    assert_emits_like_torch(function, inputs, opset=13)


def test_roles_of_choice() -> None:
    assert role_of(lambda b, f, g: aten.where.self(b, f, g), (B, F, G)) is Role.COMPUTE
    assert role_of(lambda b, f: aten.where.ScalarOther(b, f, 0.0), (B, F)) is Role.FLOAT
    assert role_of(lambda b, i, j: aten.where.self(b, i, j), (B, N, J)) is Role.INDEX
    assert role_of(lambda f, g: aten.lt.Tensor(f, g), (F, G)) is Role.INDEX
