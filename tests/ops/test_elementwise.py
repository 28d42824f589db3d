"""Arithmetic element by element against torch, in every overload and with every promotion that models use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.ops.base import Role
from fxquant.ops.elementwise import ELEMENTWISE
from tests.ops.harness import assert_emits_like_torch
from tests.ops.inputs import bools, floats, integers, node_of, positive, role_of

aten = torch.ops.aten
Function = Callable[..., Any]

F, G = floats(2, 3, 4), floats(2, 3, 4, seed=1)
N, J = integers(2, 3, 4), integers(2, 3, 4, seed=1)
ROW, COLUMN = floats(4), floats(3, 1)
B = bools(2, 3, 4)

BINARY: list[tuple[str, Function, tuple[torch.Tensor, ...]]] = [
    ("add", lambda a, b: aten.add.Tensor(a, b), (F, G)),
    ("add-alpha", lambda a, b: aten.add.Tensor(a, b, alpha=2.5), (F, G)),
    ("add-alpha-int", lambda a, b: aten.add.Tensor(a, b, alpha=3), (N, J)),
    ("add-row", lambda a, b: aten.add.Tensor(a, b), (F, ROW)),
    ("add-row-first", lambda a, b: aten.add.Tensor(b, a), (F, ROW)),
    ("add-column", lambda a, b: aten.add.Tensor(a, b), (F, COLUMN)),
    ("add-scalar", lambda a: aten.add.Tensor(a, 0.5), (F,)),
    ("add-int-float-scalar", lambda a: aten.add.Tensor(a, 0.5), (N,)),
    ("add-float-int", lambda a, b: aten.add.Tensor(a, b), (F, J)),
    ("add-bool-int", lambda a, b: aten.add.Tensor(a, b), (B, J)),
    ("add-bool-bool", lambda a, b: aten.add.Tensor(a, b), (B, bools(2, 3, 4, seed=1))),
    ("add-bool-number", lambda a: aten.add.Tensor(a, 2), (B,)),
    ("add-int32-int64", lambda a, b: aten.add.Tensor(a, b), (N.int(), J)),
    ("add-uint8-wraps", lambda a: aten.add.Tensor(a, 250), (N.abs().to(torch.uint8),)),
    ("add-int8-wraps", lambda a: aten.add.Tensor(a, 125), (N.to(torch.int8),)),
    ("add-double-scalar-tensor", lambda a, b: aten.add.Tensor(a, b), (F, torch.tensor(0.25, dtype=torch.float64))),
    ("add-long-scalar-tensor", lambda a, b: aten.add.Tensor(a, b), (N.int(), torch.tensor(2))),
    ("add-float64", lambda a, b: aten.add.Tensor(a, b), (F.double(), G)),
    ("add.Scalar", lambda a: aten.add.Scalar(a, 3, 2), (F,)),
    ("sub", lambda a, b: aten.sub.Tensor(a, b), (F, G)),
    ("sub-alpha", lambda a, b: aten.sub.Tensor(a, b, alpha=0.5), (F, G)),
    ("sub.Scalar", lambda a: aten.sub.Scalar(a, 1.5), (F,)),
    ("rsub", lambda a: aten.rsub.Scalar(a, 1.0), (F,)),
    ("rsub-alpha", lambda a: aten.rsub.Scalar(a, 1.0, 2), (F,)),
    ("rsub.Tensor", lambda a, b: aten.rsub.Tensor(a, b, alpha=2), (F, G)),
    ("rsub-int-float", lambda a: aten.rsub.Scalar(a, 1.5), (N,)),
    ("mul", lambda a, b: aten.mul.Tensor(a, b), (F, G)),
    ("mul-number", lambda a: aten.mul.Tensor(a, 0.125), (F,)),
    ("mul-bool-float", lambda a, b: aten.mul.Tensor(a, b), (B, F)),
    ("mul.Scalar", lambda a: aten.mul.Scalar(a, 3), (N,)),
    ("div", lambda a, b: aten.div.Tensor(a, b), (F, G)),
    ("div-int-int", lambda a: aten.div.Tensor(a, 4), (N,)),
    ("div.Scalar", lambda a: aten.div.Scalar(a, 4), (N,)),
    ("div-floor", lambda a, b: aten.div.Tensor_mode(a, b, rounding_mode="floor"), (F, G)),
    ("div-floor-tenths", lambda a: aten.div.Tensor_mode(a, 0.1, rounding_mode="floor"), (N.float(),)),
    ("div-floor-int", lambda a: aten.div.Tensor_mode(a, 3, rounding_mode="floor"), (N,)),
    ("div-floor-negative", lambda a: aten.div.Tensor_mode(a, -3, rounding_mode="floor"), (N,)),
    ("div-trunc", lambda a, b: aten.div.Tensor_mode(a, b, rounding_mode="trunc"), (F, G)),
    ("div-trunc-int", lambda a: aten.div.Tensor_mode(a, 3, rounding_mode="trunc"), (N,)),
    ("div.Scalar_mode", lambda a: aten.div.Scalar_mode(a, 2, rounding_mode="floor"), (N,)),
    ("floor_divide", lambda a, b: aten.floor_divide.default(a, b), (F, G)),
    ("floor_divide-int", lambda a: aten.floor_divide.default(a, 4), (N,)),
    ("remainder", lambda a, b: aten.remainder.Tensor(a, b), (F, G)),
    ("remainder-int", lambda a: aten.remainder.Scalar(a, -3), (N,)),
    ("remainder-number-first", lambda a: aten.remainder.Scalar_Tensor(7.5, a), (F,)),
    ("fmod", lambda a, b: aten.fmod.Tensor(a, b), (F, G)),
    ("fmod-int", lambda a: aten.fmod.Scalar(a, 3), (N,)),
    ("pow-2", lambda a: aten.pow.Tensor_Scalar(a, 2), (F,)),
    ("pow-half", lambda a: aten.pow.Tensor_Scalar(a, 0.5), (positive(2, 3),)),
    ("pow-minus-1", lambda a: aten.pow.Tensor_Scalar(a, -1), (positive(2, 3),)),
    ("pow-int", lambda a: aten.pow.Tensor_Scalar(a, 3), (N,)),
    ("pow-int-float", lambda a: aten.pow.Tensor_Scalar(a, 2.0), (N,)),
    ("pow.Scalar", lambda a: aten.pow.Scalar(10000.0, a), (F,)),
    ("pow.Scalar-int", lambda a: aten.pow.Scalar(2, a), (N.abs(),)),
    ("pow.Tensor_Tensor", lambda a, b: aten.pow.Tensor_Tensor(a, b), (positive(2, 3, 4), G)),
    ("minimum", lambda a, b: aten.minimum.default(a, b), (F, G)),
    ("maximum", lambda a, b: aten.maximum.default(a, b), (F, ROW)),
    ("maximum-nan", lambda a, b: aten.maximum.default(a, b), (torch.where(F > 1, torch.nan, F), G)),
    ("min.other-int", lambda a, b: aten.min.other(a, b), (N, J)),
    ("max.other-uint8", lambda a, b: aten.max.other(a, b), (N.to(torch.uint8), J.to(torch.uint8))),
    ("addcmul", lambda a, b, c: aten.addcmul.default(a, b, c), (F, G, ROW)),
    ("addcmul-value", lambda a, b, c: aten.addcmul.default(a, b, c, value=0.5), (F, G, ROW)),
    ("addcdiv", lambda a, b: aten.addcdiv.default(a, a, b, value=2), (F, positive(2, 3, 4))),
    ("lerp.Scalar", lambda a, b: aten.lerp.Scalar(a, b, 0.3), (F, G)),
    ("lerp.Tensor", lambda a, b, c: aten.lerp.Tensor(a, b, c), (F, G, ROW)),
]

UNARY = "abs neg sin cos tan atan sinh cosh asinh tanh erf sign exp expm1 exp2 square floor ceil round trunc".split()
POSITIVE = "sqrt rsqrt log log2 log10 log1p reciprocal".split()
UNIT = "asin acos atanh".split()
OF_INTEGERS = "abs neg sign floor ceil round trunc square sqrt exp sin".split()


@pytest.mark.parametrize(("name", "function", "inputs"), BINARY, ids=[row[0] for row in BINARY])
def test_binary_emission_equals_torch(name: str, function: Function, inputs: tuple[torch.Tensor, ...]) -> None:
    assert_emits_like_torch(function, inputs, opset=13, batches=(3,))


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize(("name", "function", "inputs"), BINARY[::6], ids=[row[0] for row in BINARY[::6]])
def test_binary_emission_equals_torch_at_later_opsets(
    name: str, function: Function, inputs: tuple[torch.Tensor, ...], opset: int
) -> None:
    assert_emits_like_torch(function, inputs, opset=opset)


@pytest.mark.parametrize("name", UNARY)
def test_unary_emission_equals_torch(name: str) -> None:
    assert_emits_like_torch(lambda x: getattr(aten, name).default(x), (F,), opset=13)


@pytest.mark.parametrize("name", POSITIVE)
def test_unary_emission_equals_torch_when_positive(name: str) -> None:
    assert_emits_like_torch(lambda x: getattr(aten, name).default(x), (positive(2, 5),), opset=13)


@pytest.mark.parametrize("name", UNIT)
def test_unary_emission_equals_torch_within_one(name: str) -> None:
    assert_emits_like_torch(lambda x: getattr(aten, name).default(x), (torch.tanh(F),))


@pytest.mark.parametrize("name", OF_INTEGERS)
def test_unary_emission_equals_torch_on_integers(name: str) -> None:
    x = N.abs() if name in ("sqrt", "exp") else N
    assert_emits_like_torch(lambda x: getattr(aten, name).default(x), (x,))


def test_round_is_half_to_even() -> None:
    assert_emits_like_torch(lambda x: aten.round.default(x), (torch.tensor([[0.5, 1.5, 2.5], [-0.5, -1.5, -2.5]]),))


def test_acosh_equals_torch() -> None:
    assert_emits_like_torch(lambda x: aten.acosh.default(x), (positive(2, 3) + 1,))


def test_floor_division_by_zero_equals_torch() -> None:
    x = torch.tensor([[1.0, -1.0], [3.0, 2.0]])
    assert_emits_like_torch(lambda x: aten.div.Tensor_mode(x, torch.zeros(2), rounding_mode="floor"), (x,))


def test_size_operand_equals_torch() -> None:
    assert_emits_like_torch(lambda x: aten.mul.Tensor(x, x.shape[0] / 2), (F,))
    assert_emits_like_torch(lambda x: aten.add.Tensor(x, x.shape[0]), (N,))


@settings(max_examples=20, deadline=None)
@given(
    shape=st.lists(st.sampled_from([1, 3]), max_size=3),
    kept=st.lists(st.booleans(), max_size=3),
    op=st.sampled_from([aten.add.Tensor, aten.div.Tensor, aten.maximum.default]),
)
def test_broadcasting_equals_torch(shape: list[int], kept: list[bool], op: Any) -> None:
    suffix = shape[len(shape) - min(len(kept), len(shape)) :]
    other = [size if keep else 1 for size, keep in zip(suffix, kept, strict=False)]
    assert_emits_like_torch(
        lambda a, b: op(a, b), (floats(2, *shape), positive(*other)), dynamic=[True, False], batches=(3,)
    )


ROLES: list[tuple[Function, tuple[torch.Tensor, ...], Role]] = [
    (lambda a, b: aten.add.Tensor(a, b), (F, G), Role.COMPUTE),
    (lambda a, b: aten.add.Tensor(a, b, alpha=2), (F, G), Role.FLOAT),
    (lambda a: aten.add.Tensor(a, 1.0), (F,), Role.FLOAT),
    (lambda a, b: aten.mul.Tensor(a, b), (F, J), Role.FLOAT),
    (lambda a, b: aten.mul.Tensor(a, b), (N, J), Role.INDEX),
    (lambda a, b: aten.sub.Tensor(a, b), (F, G), Role.FLOAT),
    (lambda a: aten.pow.Tensor_Scalar(a, 2), (F,), Role.FLOAT),
    (lambda a: aten.neg.default(a), (N,), Role.INDEX),
]


@pytest.mark.parametrize(("function", "inputs", "role"), ROLES)
def test_role_follows_the_operands(function: Function, inputs: tuple[torch.Tensor, ...], role: Role) -> None:
    assert role_of(function, inputs) is role


def test_square_is_never_an_integer_product() -> None:
    model = assert_emits_like_torch(lambda a: aten.square.default(a), (F,), only="Pow")
    assert [node.op_type for node in model.graph] == ["Pow"]


def test_names_are_unique() -> None:
    names = [definition.name for definition in ELEMENTWISE]
    assert len(names) == len(set(names))
    assert node_of(lambda a: aten.neg.default(a), (F,)).target is aten.neg.default
