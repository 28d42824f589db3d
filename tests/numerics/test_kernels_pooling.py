"""QLinearAveragePool and QLinearGlobalAveragePool: windows, padding, layouts and grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given
from hypothesis import strategies as st

from fxquant.numerics.kernels.pooling import PoolWindows, average_pool, global_average_pool
from fxquant.numerics.kernels.requantize import requantize
from fxquant.numerics.kernels.tables import on_grid
from fxquant.numerics.rounding import dequantize
from fxquant.numerics.runtime import Level
from tests.numerics.quantized_models import (
    LEVELS,
    Array,
    Case,
    Operator,
    bytes_of,
    differing,
    grid,
    random_cases,
    run,
    seeds,
    tensor,
    tied_cases,
)

GLOBAL = Operator("GlobalAveragePool", "QLinearGlobalAveragePool")


def operator(windows: PoolWindows, channels_last: bool = False) -> Operator:
    attributes = {
        "kernel_shape": windows.kernel,
        "strides": windows.stride,
        "pads": windows.pads,
        "count_include_pad": int(windows.count_padding),
    }
    return Operator("AveragePool", "QLinearAveragePool", attributes, channels_last=channels_last)


def square(kernel: int, stride: int, pad: int = 0, *, counts: bool = False) -> PoolWindows:
    return PoolWindows((kernel,) * 2, (stride,) * 2, (pad,) * 4, counts)


def of(x: Array, windows: PoolWindows) -> Callable[[Case], torch.Tensor]:
    return lambda case: average_pool(tensor(x), case.operands[0], case.out, windows)


def runnable(cases: Sequence[Case], size: int) -> list[Case]:
    """Those that onnxruntime's global average does not refuse, every third with one grid for input and output."""
    shared = [Case(case.operands, case.operands[0]) if i % 3 == 0 else case for i, case in enumerate(cases)]
    factors = [float(case.operands[0].scale / case.out.scale) / size for case in shared]
    return [case for case, factor in zip(shared, factors, strict=True) if 2.0**-31 < factor < 255]


def pool_in_float(x: Array, windows: PoolWindows) -> Callable[[Case], torch.Tensor]:
    def codes(case: Case) -> torch.Tensor:
        real = dequantize(tensor(x), case.operands[0].scale, case.operands[0].zero_point)
        pads = windows.pads[: len(windows.kernel)]
        mean = functional.avg_pool2d(real, windows.kernel, windows.stride, pads, False, windows.count_padding)
        return on_grid(mean, case.out)

    return codes


WINDOWS = [
    (square(2, 2), (6, 6)),
    (square(3, 2, 1), (7, 7)),
    (square(3, 2, 1, counts=True), (7, 7)),
    (square(3, 1, 1, counts=True), (5, 4)),
    (square(1, 2), (5, 5)),
    (square(1, 1), (1, 1)),
    (square(7, 1), (7, 7)),
    (square(7, 3), (9, 8)),
    (PoolWindows((3, 2), (2, 1), (1, 0, 2, 1)), (6, 5)),
    (PoolWindows((3,), (2,), (1, 1), True), (9,)),
    (PoolWindows((4,), (1,), (0, 2)), (9,)),
    (PoolWindows((2, 3, 2), (2, 1, 1), (1, 1, 0, 0, 1, 1)), (4, 5, 3)),
    (PoolWindows((2, 2, 2), (2, 2, 2), (1, 1, 1, 1, 1, 1), True), (4, 4, 4)),
]


@pytest.mark.parametrize(("windows", "sizes"), WINDOWS, ids=str)
def test_average_is_onnxruntimes(windows: PoolWindows, sizes: tuple[int, ...]) -> None:
    x = bytes_of(1, 2, 3, *sizes)
    cases = runnable(random_cases(40, 1, seed=2), math.prod(sizes))
    assert differing(operator(windows), [x], cases, of(x, windows)) == 0


@pytest.mark.parametrize(("windows", "sizes"), WINDOWS[:9], ids=str)
def test_average_with_channels_last_is_onnxruntimes(windows: PoolWindows, sizes: tuple[int, ...]) -> None:
    x = bytes_of(3, 2, 8, *sizes)
    cases = runnable(random_cases(20, 1, seed=4), math.prod(sizes))
    assert differing(operator(windows, channels_last=True), [x], cases, of(x, windows), [Level.ALL]) == 0


@pytest.mark.parametrize("windows", [square(2, 2), square(3, 2, 1)], ids=str)
def test_average_in_float_is_found_to_differ(windows: PoolWindows) -> None:
    x = bytes_of(5, 2, 8, 16, 16)
    cases = runnable(random_cases(40, 1, seed=6, decades=0.3), 1)
    assert differing(operator(windows), [x], cases, of(x, windows)) == 0
    assert differing(operator(windows), [x], cases, pool_in_float(x, windows)) > 0


def test_average_over_one_whole_window_is_the_global_average() -> None:
    """Sums in float32, as other windows have them, are found to differ."""
    x, windows = bytes_of(7, 2, 64, 4, 4), square(4, 1)
    one = grid(0.05, 3)
    taller = np.concatenate([x, x], axis=2)

    def summed_in_float(case: Case) -> torch.Tensor:
        return of(taller, windows)(case)[:, :, :1]

    assert differing(operator(windows), [x], [Case((one,), one)], of(x, windows)) == 0
    assert differing(operator(windows), [x], [Case((one,), one)], summed_in_float) > 0


@st.composite
def geometries(draw: st.DrawFn) -> tuple[PoolWindows, tuple[int, ...]]:
    """Windows, none of them wholly in the padding, and sizes."""
    axes = draw(st.integers(1, 3))
    kernel: list[int] = []
    stride: list[int] = []
    begins: list[int] = []
    ends: list[int] = []
    sizes: list[int] = []
    counts = draw(st.booleans())
    for _ in range(axes):
        size, step = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        begin = draw(st.integers(0, size // 2))
        end = begin if counts else draw(st.integers(0, size // 2))
        sizes.append(draw(st.integers(size, size + 5)))
        kernel.append(size)
        stride.append(step)
        begins.append(begin)
        ends.append(end)
    return PoolWindows(tuple(kernel), tuple(stride), (*begins, *ends), counts), tuple(sizes)


@given(geometry=geometries(), seed=seeds, decades=st.floats(0.0, 2.0))
def test_average_is_onnxruntimes_for_any_windows(
    geometry: tuple[PoolWindows, tuple[int, ...]], seed: int, decades: float
) -> None:
    windows, sizes = geometry
    x = bytes_of(seed, 2, 2, *sizes)
    cases = runnable(random_cases(8, 1, seed, decades), math.prod(sizes))
    assert differing(operator(windows), [x], cases, of(x, windows)) == 0


def test_average_is_onnxruntimes_on_narrow_grids() -> None:
    x, windows = bytes_of(8, 2, 3, 6, 6), square(3, 2, 1)
    cases = [
        Case(case.operands, replace(case.out, zero_point=case.out.zero_point % (qmax + 1), qmax=qmax))
        for case, qmax in zip(runnable(random_cases(60, 1, 9), 1)[:40], [1, 3, 7, 15, 63] * 8, strict=True)
    ]
    assert differing(operator(windows), [x], cases, of(x, windows)) == 0


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("sizes", [(7, 7), (1, 1), (1, 5), (56, 56), (120, 250), (3, 4, 5), (9,)], ids=str)
def test_global_average_is_onnxruntimes(sizes: tuple[int, ...], channels_last: bool) -> None:
    x = bytes_of(10, 2, 4, *sizes)
    x[0, 0] = 255
    cases = runnable(random_cases(60, 1, seed=11, decades=2.0), math.prod(sizes))
    operator = replace(GLOBAL, channels_last=channels_last)

    def formula(case: Case) -> torch.Tensor:
        return global_average_pool(tensor(x), case.operands[0], case.out, len(sizes))

    assert differing(operator, [x], cases, formula, [Level.ALL] if channels_last else LEVELS) == 0


def test_global_average_with_another_multiplier_is_found_to_differ() -> None:
    x = bytes_of(12, 2, 256, 2, 3)
    cases = tied_cases(50, 1, 1.0, seed=13)

    def other(case: Case) -> torch.Tensor:
        total = (tensor(x) - case.operands[0].zero_point).sum((2, 3), keepdim=True)
        return requantize(total, (case.operands[0].scale / case.out.scale) / 6, case.out)

    def formula(case: Case) -> torch.Tensor:
        return global_average_pool(tensor(x), case.operands[0], case.out, 2)

    assert differing(GLOBAL, [x], cases, formula) == 0
    assert differing(GLOBAL, [x], cases, other) > 0


def test_global_average_wraps_where_its_int32_sum_overflows() -> None:
    """2,900 * 2,910 * 255 is beyond 2^31: the mean of full codes comes out as the lowest one."""
    x = np.full((1, 1, 2900, 2910), 255, dtype=np.uint8)
    case = Case((grid(0.1, 0),), grid(0.1, 128))
    assert int(run(GLOBAL, [x], [case])[0]) == 0
    assert int(global_average_pool(tensor(x), case.operands[0], case.out, 2)) == 0
