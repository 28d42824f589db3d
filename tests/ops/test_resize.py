"""Interpolation against torch: by scale factor and by output size, up and down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxquant.errors import FxquantError
from fxquant.ops.base import Role
from tests.ops.harness import assert_emits_like_torch
from tests.ops.inputs import floats, role_of

aten = torch.ops.aten
Function = Callable[..., Any]

X = floats(2, 3, 5, 6)
LINE, BLOCK = floats(2, 3, 7), floats(2, 3, 4, 5, 3)
SIZES = [[10, 12], [8, 7], [3, 4], [1, 1]]
FACTORS = [[2.0, 2.0], [1.5, 0.7], [0.5, 0.5], [2.3, 3.1]]

SMOOTH = [aten.upsample_bilinear2d, aten.upsample_bicubic2d]
PLAIN = [aten.upsample_nearest2d, aten._upsample_nearest_exact2d]


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("packet", PLAIN, ids=str)
def test_nearest_equals_torch(packet: Any, opset: int) -> None:
    def function(x: torch.Tensor) -> Any:
        by_size = [packet.vec(x, size, None) for size in SIZES] + [packet.default(x, size) for size in SIZES]
        return by_size + [packet.vec(x, None, factors) for factors in FACTORS]

    assert_emits_like_torch(function, (X,), opset=opset)


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("packet", SMOOTH, ids=str)
def test_smooth_equals_torch(packet: Any, corners: bool, opset: int) -> None:
    def function(x: torch.Tensor) -> Any:
        by_size = [packet.vec(x, size, corners, None) for size in SIZES]
        by_size += [packet.default(x, size, corners) for size in SIZES]
        return by_size + [packet.vec(x, None, corners, factors) for factors in FACTORS]

    assert_emits_like_torch(function, (X,), opset=opset, atol=1e-5)


def test_given_scales_beside_a_size_equal_torch() -> None:
    def function(x: torch.Tensor) -> Any:
        nearest = aten.upsample_nearest2d.default(x, [7, 9], 1.5, 1.6)
        return nearest, aten.upsample_bilinear2d.default(x, [7, 9], False, 1.5, 1.6)

    assert_emits_like_torch(function, (X,), atol=1e-5)


@pytest.mark.parametrize("opset", [13, 21])
def test_other_ranks_equal_torch(opset: int) -> None:
    def function(line: torch.Tensor, block: torch.Tensor) -> Any:
        return (
            aten.upsample_nearest1d.vec(line, [10], None),
            aten.upsample_nearest1d.vec(line, None, [2.0]),
            aten.upsample_linear1d.vec(line, [10], False, None),
            aten.upsample_linear1d.default(line, [4], True),
            aten.upsample_nearest3d.vec(block, None, [2.0, 1.0, 1.5]),
            aten.upsample_nearest3d.default(block, [3, 7, 6]),
            aten.upsample_trilinear3d.vec(block, [6, 5, 4], False, None),
            aten.upsample_trilinear3d.default(block, [6, 5, 4], True),
        )

    assert_emits_like_torch(function, (LINE, BLOCK), opset=opset, atol=1e-5)


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("packet", [aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa], ids=str)
def test_antialiased_equals_torch(packet: Any, corners: bool) -> None:
    def function(x: torch.Tensor) -> Any:
        by_size = [packet.vec(x, size, corners, None) for size in SIZES] + [packet.default(x, [2, 3], corners)]
        return by_size + [packet.vec(x, None, corners, factors) for factors in FACTORS]

    assert_emits_like_torch(function, (floats(2, 3, 9, 8),), opset=13, atol=1e-5)


def test_antialiased_of_symbolic_size_is_refused() -> None:
    with pytest.raises(FxquantError, match="not known now"):
        assert_emits_like_torch(lambda x: aten._upsample_bilinear2d_aa.vec(x, [x.shape[0], 4], False, None), (X,))


def test_size_of_another_input_equals_torch() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> Any:
        return aten.upsample_nearest2d.vec(x, [y.shape[2], y.shape[3]], None)

    assert_emits_like_torch(function, (X, floats(2, 3, 8, 9)))


def test_symbolic_output_size_equals_torch() -> None:
    def function(x: torch.Tensor) -> Any:
        return aten.upsample_nearest2d.vec(x, [2 * x.shape[0], 4], None)

    for opset in (13, 21):
        assert_emits_like_torch(function, (X,), opset=opset)


def test_roles_of_resize() -> None:
    assert role_of(lambda x: aten.upsample_nearest2d.vec(x, None, [2.0, 2.0]), (X,)) is Role.GRID_PRESERVING
    assert role_of(lambda x: aten.upsample_bilinear2d.vec(x, [2, 2], False, None), (X,)) is Role.FLOAT
