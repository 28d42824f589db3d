"""Changes of dtype, and copies, against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxquant.ops.base import Role
from tests.ops.harness import assert_emits_like_torch
from tests.ops.inputs import bools, floats, integers, role_of

aten = torch.ops.aten
Function = Callable[..., Any]

F, N, B = floats(2, 3, 4), integers(2, 3, 4), bools(2, 3, 4)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_cast_equals_torch(dtype: torch.dtype) -> None:
    def function(f: Any, i: Any, b: Any) -> Any:
        return aten.to.dtype(f, dtype), aten.to.dtype(i, dtype), aten.to.dtype(b, dtype)

    assert_emits_like_torch(function, (F, N, B), opset=13)


SPELLINGS: list[tuple[str, Function]] = [
    ("to.dtype_layout", lambda f, i: aten.to.dtype_layout(i, dtype=torch.float32, layout=torch.strided, device="cpu")),
    ("to.device", lambda f, i: aten.to.device(i, "cpu", torch.float32)),
    ("to.other", lambda f, i: aten.to.other(i, f)),
    ("_to_copy", lambda f, i: aten._to_copy.default(i, dtype=torch.float32)),
    ("_to_copy-same", lambda f, i: aten._to_copy.default(f)),
    ("type_as", lambda f, i: aten.type_as.default(i, f)),
    ("convert", lambda f, i: torch.ops.prims.convert_element_type.default(f, torch.int32)),
    ("clone", lambda f, i: aten.clone.default(f)),
    ("contiguous", lambda f, i: aten.contiguous.default(f)),
    ("alias", lambda f, i: aten.alias.default(f)),
    ("positive", lambda f, i: aten.positive.default(f)),
    ("resolve_conj", lambda f, i: aten.resolve_conj.default(f)),
    ("detach", lambda f, i: aten.detach.default(f)),
    ("lift_fresh_copy", lambda f, i: aten.lift_fresh_copy.default(f)),
    ("copy", lambda f, i: aten.copy.default(f, i)),
    ("copy-broadcast", lambda f, i: aten.copy.default(f, i[:, :1])),
]


@pytest.mark.parametrize(("name", "function"), SPELLINGS, ids=[row[0] for row in SPELLINGS])
def test_copy_equals_torch(name: str, function: Function) -> None:
    assert_emits_like_torch(function, (F, N))


def test_roles_of_casts() -> None:
    assert role_of(lambda f: aten.to.dtype(f, torch.float32), (F,)) is Role.GRID_PRESERVING
    assert role_of(lambda f: aten.to.dtype(f, torch.int64), (F,)) is Role.INDEX
    assert role_of(lambda i: aten.to.dtype(i, torch.float32), (N,)) is Role.FLOAT
    assert role_of(lambda f: aten.clone.default(f), (F,)) is Role.GRID_PRESERVING
