"""The cases of each operator's self-test, and the codes that the reference formulas expect of them.

Scales are arbitrary and zero points odd: what rounds before it adds one, multiplies by a reciprocal or fuses another
multiply-add shows. Formulas are called through their modules, so that a changed one is what is tested.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as functional

from fxquant.numerics.codes import Grid
from fxquant.numerics.kernels import elementwise, pooling, softmax, tables
from fxquant.numerics.runtime import Array
from fxquant.simulation.self_test_model import Bench, Product, byte_grid

FULL_SCALE = "full-scale pairs"

TIES = "ties"

_PAIRS = (
    (0.0173, 113, 0.0091, 7, 0.0213, 101),
    (0.0037, 201, 0.0411, 55, 0.0407, 255),
    (0.05, 0, 0.05, 3, 0.1, 1),
    (2.0**-4, 121, 2.0**-4, 125, 2.0**-3, 101),
    (2.0**-4, 121, 2.0**-4, 125, 0.5, 101),
)
_TIE_GRID = byte_grid(2.0**-6, 117)
_SINGLES = ((0.0233, 131, 0.0041, 3), (0.061, 17, 0.0521, 101))


def _random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _bytes(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(_random(seed).integers(0, 256, shape))


def _product(x: Array, w: Array, accumulator: torch.Tensor, axis: int, bias: Array | None, grid: Grid) -> Product:
    channels = accumulator.shape[axis]
    scales = torch.full((channels,), 2.0**-6) if grid is _TIE_GRID else torch.linspace(0.0011, 0.0127, channels)
    if bias is not None:
        shape = [1] * accumulator.ndim
        shape[axis] = -1
        accumulator = accumulator + torch.from_numpy(bias.astype(np.int64)).view(shape)
    return Product(x, w, bias, grid, scales, accumulator, axis)


def _small(shape_x: tuple[int, ...], shape_w: tuple[int, ...]) -> tuple[Array, Array]:
    """Codes whose sums of products are small, and so keep inside a grid of small steps."""
    return 117 + _random(50).integers(-7, 8, shape_x), _random(51).integers(-3, 4, shape_w)


def _output_grid(product: Product, zero_point: int) -> Grid:
    """A grid that a product's values fill; where they are to be ties, one of 4 steps of its accumulator."""
    if product.grid is _TIE_GRID:
        return byte_grid(2.0**-10, zero_point)
    shape = [1] * product.accumulator.ndim
    shape[product.axis] = -1
    real = product.accumulator.double() * product.scales.view(shape) * product.grid.scale
    return byte_grid(float(real.abs().max()) / 126.3, zero_point)


# ------------------------------------------------------------------------------------------------------------ products


def convolution_cases(bench: Bench) -> None:
    """3x3 with 4, 3 and 16 x 1 (depthwise) input channels: each takes another loop of onnxruntime."""
    _convolution(bench, TIES, (*_small((2, 3, 4, 4), (4, 3, 3, 3)), np.zeros(4, np.int64)), 1, _TIE_GRID)
    for inputs, outputs, groups in ((4, 16, 1), (3, 5, 1), (16, 16, 16)):
        shapes = (2, inputs, 4, 4), (outputs, inputs // groups, 3, 3)
        x, w = _bytes(inputs, *shapes[0]).numpy(), _random(outputs).integers(-127, 128, shapes[1])
        bias = _random(1).integers(-3000, 3000, outputs)
        _convolution(bench, "random codes", (x, w, bias), groups, byte_grid(0.0173, 117))
        full = np.full(shapes[0], 255), np.full(shapes[1], 127), None
        _convolution(bench, FULL_SCALE, full, groups, byte_grid(0.0173, 0))


def _convolution(bench: Bench, case: str, codes: tuple[Array, Array, Array | None], groups: int, grid: Grid) -> None:
    x, w, bias = codes
    centred = torch.from_numpy(x - int(grid.zero_point)).double()
    summed = functional.conv2d(centred, torch.from_numpy(w).double(), groups=groups).to(torch.int64)
    product = _product(x, w.astype(np.int8), summed, 1, None if bias is None else bias.astype(np.int32), grid)
    value = bench.op("Conv", *bench.operands(product, 0), group=groups)
    bench.expect_product(case, value, product, _output_grid(product, 121 if bias is not None else 1))


def gemm_cases(bench: Bench) -> None:
    """Gemm with a bias, its output in codes and in float32."""
    x, w = _bytes(1, 8, 33).numpy(), _random(2).integers(-127, 128, (33, 24))
    bias = _random(3).integers(-3000, 3000, 24).astype(np.int32)
    zeros = np.zeros(24, np.int32)
    for case, one, other, added, grid in (
        ("random codes", x, w, bias, byte_grid(0.0173, 117)),
        (FULL_SCALE, np.full_like(x, 255), np.full_like(w, 127), zeros, byte_grid(0.0173, 0)),
        (TIES, *_small((8, 33), (33, 24)), zeros, _TIE_GRID),
    ):
        summed = torch.from_numpy((one - int(grid.zero_point)) @ other)
        product = _product(one, other.astype(np.int8), summed, 1, added, grid)
        for out in (_output_grid(product, 121), None):
            bench.expect_product(case, bench.op("Gemm", *bench.operands(product, 1)), product, out)


def matmul_cases(bench: Bench) -> None:
    """MatMul by constant s8 codes, in codes and in float32 (MatMulIntegerToFloat), and of two u8 activations."""
    x, w = _bytes(4, 2, 5, 32).numpy(), _random(5).integers(-127, 128, (32, 16))
    for case, one, other, grid in (
        ("random codes", x, w, byte_grid(0.0173, 117)),
        (FULL_SCALE, np.full_like(x, 255), np.full_like(w, 127), byte_grid(0.0173, 0)),
        (TIES, *_small((2, 5, 32), (32, 16)), _TIE_GRID),
    ):
        summed = torch.from_numpy((one - int(grid.zero_point)) @ other)
        product = _product(one, other.astype(np.int8), summed, 2, None, grid)
        for out in (_output_grid(product, 121), None):
            bench.expect_product(case, bench.op("MatMul", *bench.operands(product, 1)), product, out)
    _two_activations(bench)


def _two_activations(bench: Bench) -> None:
    one, other = _bytes(6, 2, 6, 16), _bytes(7, 2, 16, 6)
    grid, second = byte_grid(0.0173, 117), byte_grid(0.0091, 7)
    summed = (one - 117) @ (other - 7)
    product = Product(one.numpy(), other.numpy(), None, grid, second.scale.view(1), summed, 2)
    value = bench.op("MatMul", bench.activation(one, grid), bench.activation(other, second))
    bench.expect_product("two activations", value, product, _output_grid(product, 121))


# --------------------------------------------------------------------------------------------------------- elementwise


def add_cases(bench: Bench) -> None:
    """Sums of random pairs of codes; of two sets of grids half are ties."""
    _pair_cases(bench, "Add", 8)


def mul_cases(bench: Bench) -> None:
    """Products of random pairs of codes; of one set of grids some are ties."""
    _pair_cases(bench, "Mul", 9)


def _pair_cases(bench: Bench, operator: str, seed: int) -> None:
    for index, (scale_a, zero_a, scale_b, zero_b, scale, zero) in enumerate(_PAIRS):
        a, b = _bytes(seed + 10 * index, 4, 64), _bytes(seed + 10 * index + 5, 4, 64)
        grids = byte_grid(scale_a, zero_a), byte_grid(scale_b, zero_b)
        out = byte_grid(scale, zero)
        formula = elementwise.add if operator == "Add" else elementwise.multiply
        value = bench.op(operator, bench.activation(a, grids[0]), bench.activation(b, grids[1]))
        bench.expect("random pairs", value, formula(a, b, *grids, out), out)


def where_cases(bench: Bench) -> None:
    """A choice between two tensors on grids of their own."""
    scale_a, zero_a, scale_b, zero_b, scale, zero = _PAIRS[0]
    a, b, chosen = _bytes(20, 4, 64), _bytes(21, 4, 64), _bytes(22, 4, 64) < 128
    grids, out = (byte_grid(scale_a, zero_a), byte_grid(scale_b, zero_b)), byte_grid(scale, zero)
    parts = bench.activation(a, grids[0]), bench.activation(b, grids[1])
    value = bench.op("Where", bench.given(chosen.numpy()), *parts)
    expected = torch.where(chosen, tables.regrid(a, grids[0], out), tables.regrid(b, grids[1], out))
    bench.expect("random choices", value, expected, out)


def concat_cases(bench: Bench) -> None:
    """Two tensors on grids of their own, joined on a third."""
    scale_a, zero_a, scale_b, zero_b, scale, zero = _PAIRS[0]
    codes = torch.arange(256).view(2, 128)
    grids, out = (byte_grid(scale_a, zero_a), byte_grid(scale_b, zero_b)), byte_grid(scale, zero)
    value = bench.op("Concat", *(bench.activation(codes, grid) for grid in grids), axis=1)
    bench.expect("all codes", value, torch.cat([tables.regrid(codes, grid, out) for grid in grids], 1), out)


# ------------------------------------------------------------------------------------------------------------ one code


def sigmoid_cases(bench: Bench) -> None:
    """All codes, on two pairs of grids."""
    for scale, zero, _, _ in _SINGLES:
        codes, grid, out = torch.arange(256), byte_grid(scale, zero), byte_grid(1 / 255, 1)
        value = bench.op("Sigmoid", bench.activation(codes, grid))
        bench.expect("all codes", value, tables.sigmoid(codes, grid, out), out)


def leaky_relu_cases(bench: Bench) -> None:
    """All codes, on two pairs of grids."""
    for scale, zero, scale_y, zero_y in _SINGLES:
        codes, grid, out = torch.arange(256), byte_grid(scale, zero), byte_grid(scale_y, zero_y)
        value = bench.op("LeakyRelu", bench.activation(codes, grid), alpha=0.1)
        bench.expect("all codes", value, tables.leaky_relu(0.1)(codes, grid, out), out)


def quantize_cases(bench: Bench) -> None:
    """Random values and ties, quantized."""
    out = byte_grid(0.0173, 113)
    ties = (np.arange(-128, 128, dtype=np.float32) + np.float32(0.5)) * np.float32(0.0173)
    noise = _random(30).normal(0, 1, 256).astype(np.float32)
    for case, values in (("ties", ties), ("random values", noise)):
        bench.expect(case, bench.given(values), tables.on_grid(torch.from_numpy(values), out), out)


# --------------------------------------------------------------------------------------------------- pooling, softmax


def average_pool_cases(bench: Bench) -> None:
    """Windows 2x2 on one grid (ties), and 3x3 with padding on two."""
    x = _bytes(40, 2, 8, 8, 8)
    for size, stride, pad, scale, zero in ((2, 2, 0, 0.0173, 113), (3, 2, 1, 0.0191, 101)):
        grid, out = byte_grid(0.0173, 113), byte_grid(scale, zero)
        pads = (pad,) * 4
        windows = pooling.PoolWindows((size, size), (stride, stride), pads)
        node = {"kernel_shape": [size, size], "strides": [stride, stride], "pads": list(pads)}
        value = bench.op("AveragePool", bench.activation(x, grid), **node)
        bench.expect(f"windows of {size}", value, pooling.average_pool(x, grid, out, windows), out)


def global_average_pool_cases(bench: Bench) -> None:
    """Means over 7x7, and over 8x8 on one grid (ties)."""
    for size, scale, zero in ((7, 0.0083, 101), (8, 0.0173, 113)):
        x, grid, out = _bytes(41, 4, 64, size, size), byte_grid(0.0173, 113), byte_grid(scale, zero)
        value = bench.op("GlobalAveragePool", bench.activation(x, grid))
        bench.expect(f"means of {size * size}", value, pooling.global_average_pool(x, grid, out, 2), out)


def softmax_cases(bench: Bench) -> None:
    """Rows of 24 codes, on 1/255 (whose reciprocal is no whole float32 number) and 1/256."""
    for scale, zero in ((1 / 255, 0), (1 / 256, 1)):
        x, grid, out = _bytes(42, 16, 24), byte_grid(0.0473, 113), byte_grid(scale, zero)
        value = bench.op("Softmax", bench.activation(x, grid), axis=-1)
        bench.expect("random rows", value, softmax.softmax(x, grid, out, -1), out)
