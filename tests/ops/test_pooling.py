"""Pooling against torch, over the space of its arguments."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxquant
from fxquant.errors import ExportError
from fxquant.graph.program import ValueType
from fxquant.ops.base import Role
from fxquant.ops.pooling import adaptive_windows
from fxquant.ops.table import TABLE
from tests.ops.harness import assert_emits_like_torch

aten = torch.ops.aten
MAX = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
AVERAGE = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
ADAPTIVE_AVERAGE = (
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
)
ADAPTIVE_MAX = (aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)


@st.composite
def pools(draw: st.DrawFn) -> tuple[int, list[list[int]], bool, list[int]]:
    """(axes, [kernel, stride, padding, dilation], ceil_mode, sizes)."""
    axes = draw(st.integers(1, 3))
    lists: list[list[int]] = [[], [], [], []]
    for _ in range(axes):
        kernel = draw(st.integers(1, 4))
        found = (kernel, draw(st.integers(1, 5)), draw(st.integers(0, kernel // 2)), draw(st.integers(1, 2)))
        for items, value in zip(lists, found, strict=True):
            items.append(value)
    sizes = [draw(st.integers(7, 11)) for _ in range(axes)]
    return axes, lists, draw(st.booleans()), sizes


@settings(max_examples=25, derandomize=True, deadline=None)
@given(pools(), st.booleans())
def test_max_pool_is_torchs_for_all_arguments(
    case: tuple[int, list[list[int]], bool, list[int]], has_batch: bool
) -> None:
    axes, lists, ceil_mode, sizes = case
    x = torch.randn(*([2] if has_batch else []), 3, *sizes, generator=torch.Generator().manual_seed(0))
    function = lambda x: MAX[axes - 1](x, *lists, ceil_mode)  # noqa: E731  (the example's own function)
    assert_emits_like_torch(function, (x,), dynamic=has_batch, batches=(3,), atol=0, rtol=0)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(pools(), st.booleans(), st.booleans())
def test_average_pool_is_torchs_for_all_arguments(
    case: tuple[int, list[list[int]], bool, list[int]], has_batch: bool, count_include_pad: bool
) -> None:
    axes, lists, ceil_mode, sizes = case
    x = torch.randn(*([2] if has_batch else []), 3, *sizes, generator=torch.Generator().manual_seed(0))
    function = lambda x: AVERAGE[axes - 1](x, *lists[:3], ceil_mode, count_include_pad)  # noqa: E731
    assert_emits_like_torch(function, (x,), dynamic=has_batch, batches=(3,))


@pytest.mark.parametrize("opset", [13, 17, 22])
@pytest.mark.parametrize("include", [True, False])
def test_average_pool_with_ceiling_and_padding_is_torchs_at_other_opsets(opset: int, include: bool) -> None:
    """The window that ceil_mode adds ends beyond the padding: it is counted up to the padding only."""
    function = lambda x: aten.avg_pool2d.default(x, [3, 3], [2, 2], [1, 1], True, include)  # noqa: E731
    assert_emits_like_torch(function, (torch.randn(2, 3, 8, 8) + 5,), opset=opset, only="AveragePool")


def test_pool_stride_is_its_kernel_when_left_out() -> None:
    assert_emits_like_torch(lambda x: aten.max_pool2d.default(x, [2]), (torch.randn(2, 3, 8, 8),), only="MaxPool")


def test_average_pool_is_refused_when_it_has_a_divisor_of_its_own() -> None:
    function = lambda x: aten.avg_pool2d.default(x, [2, 2], divisor_override=3)  # noqa: E731
    with pytest.raises(ExportError, match="divisor_override=3: ONNX's AveragePool divides by the size"):
        assert_emits_like_torch(function, (torch.randn(2, 3, 8, 8),))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_adaptive_average_pool_to_one_is_global(axes: int) -> None:
    function = lambda x: ADAPTIVE_AVERAGE[axes - 1](x, [1] * axes)  # noqa: E731
    assert_emits_like_torch(function, (torch.randn(2, 3, *[5] * axes),), only="GlobalAveragePool")
    assert_emits_like_torch(function, (torch.randn(3, *[5] * axes),), dynamic=False)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(st.integers(1, 3), st.data())
def test_adaptive_pool_is_torchs_where_its_windows_are_alike(axes: int, data: st.DataObject) -> None:
    pairs = [(size, count) for size in range(1, 13) for count in range(1, 13) if adaptive_windows(size, count)]
    sizes, counts = zip(*(data.draw(st.sampled_from(pairs)) for _ in range(axes)), strict=True)
    x = torch.randn(2, 3, *sizes, generator=torch.Generator().manual_seed(0))
    assert_emits_like_torch(lambda x: ADAPTIVE_AVERAGE[axes - 1](x, list(counts)), (x,), batches=(3,))
    assert_emits_like_torch(lambda x: ADAPTIVE_MAX[axes - 1](x, list(counts))[0], (x,), batches=(3,), atol=0, rtol=0)


def test_adaptive_windows_are_none_when_they_differ() -> None:
    assert adaptive_windows(10, 7) is None
    assert adaptive_windows(12, 4) == (3, 3)
    assert adaptive_windows(3, 2) == (2, 1)  # overlapping, and alike all the same


@settings(max_examples=15, derandomize=True, deadline=None)
@given(st.integers(1, 3), st.sampled_from([13, 17, 21]), st.booleans(), st.data())
def test_adaptive_pool_is_torchs_where_its_windows_differ(
    axes: int, opset: int, has_batch: bool, data: st.DataObject
) -> None:
    pairs = [data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9))) for _ in range(axes - 1)]
    sizes, counts = zip(*data.draw(st.permutations([*pairs, (10, 7)])), strict=True)
    x = torch.randn(*([2] if has_batch else []), 3, *sizes, generator=torch.Generator().manual_seed(0))
    average = lambda x: ADAPTIVE_AVERAGE[axes - 1](x, list(counts))  # noqa: E731
    maximum = lambda x: ADAPTIVE_MAX[axes - 1](x, list(counts))[0]  # noqa: E731
    assert_emits_like_torch(average, (x,), batches=(3,), dynamic=has_batch, opset=opset, only="ReduceMean")
    assert_emits_like_torch(
        maximum, (x,), batches=(3,), dynamic=has_batch, opset=opset, only="ReduceMax", atol=0, rtol=0
    )


def adaptive_node(target: Any, sizes: tuple[int | str, ...], counts: list[int]) -> torch.fx.Node:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["type"] = ValueType((2, 3, *sizes), torch.float32)
    return graph.call_function(target, (x, counts))


@pytest.mark.parametrize(
    ("target", "even", "types"),
    [
        (ADAPTIVE_AVERAGE[1], Role.COMPUTE, ("ReduceMean",)),
        (ADAPTIVE_MAX[1], Role.GRID_PRESERVING, ("ReduceMax",)),
    ],
)
def test_adaptive_pool_is_a_float_island_when_its_windows_differ(
    target: Any, even: Role, types: tuple[str, ...]
) -> None:
    uneven, alike = adaptive_node(target, (6, 6), [4, 5]), adaptive_node(target, (6, 6), [3, 2])
    definition = TABLE.find(uneven)
    assert definition is not None
    assert definition.role_for(uneven) is Role.FLOAT and definition.types_for(uneven) == types
    assert definition.role_for(alike) is even and definition.types_for(alike) == definition.onnx_types
    assert definition.role_for(adaptive_node(target, ("s0", "s1"), [1, 1])) is even


def test_uneven_adaptive_pool_exports_when_it_stands_between_quantized_layers(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pooled = torch.nn.functional.adaptive_avg_pool2d(torch.relu(self.a(x)), (4, 5))
            return self.b(torch.nn.functional.adaptive_max_pool2d(pooled, (3, 3)))

    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 6, 6) for _ in range(2)]
    sim = fxquant.QuantSim(Net().eval(), batches[0])
    sim.compute_encodings(batches)
    report = sim.check_parity(sim.export(tmp_path), batches)
    assert report.worst_local_steps <= 1 and not report.fault, str(report)


@pytest.mark.parametrize("pool", [ADAPTIVE_AVERAGE[1], ADAPTIVE_MAX[1]])
def test_adaptive_pool_is_refused_when_its_sizes_are_not_known(pool: Any) -> None:
    flat = (lambda x: pool(x, [4, 4])) if pool is ADAPTIVE_AVERAGE[1] else (lambda x: pool(x, [4, 4])[0])
    function = lambda x: flat(x.transpose(0, 2))  # noqa: E731  (the batch becomes a spatial axis)
    with pytest.raises(ExportError, match="windows of sizes that are not known.*Capture with fixed spatial sizes"):
        assert_emits_like_torch(function, (torch.randn(8, 3, 10, 10),))


def test_adaptive_max_pool_is_refused_when_its_indices_are_read() -> None:
    function = lambda x: operator.getitem(aten.adaptive_max_pool2d.default(x, [2, 2]), 1)  # noqa: E731
    with pytest.raises(ExportError, match="indices of adaptive max pooling have no ONNX form"):
        assert_emits_like_torch(function, (torch.randn(2, 3, 4, 4),))
