"""Layers as matrix products: rows times matrix is what the layer computes; second moments give output errors."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fxquant
from fxquant.numerics.padded_convolution import PADDED_CONVOLUTION
from fxquant.reconstruction.product import LayerProduct, SecondMoment, squared_errors

aten = torch.ops.aten


def call(target: Any, *args: Any) -> fx.Node:
    """A node that calls an operator; tensors are placeholders."""
    graph = fx.Graph()
    places = [
        graph.placeholder(f"a{index}") if isinstance(arg, torch.Tensor) else arg for index, arg in enumerate(args)
    ]
    return graph.call_function(target, tuple(places))


def product_of(target: Any, x: torch.Tensor, weight: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the operator computes, and the products of its rows, both [outputs, everything else] sorted alike."""
    node = call(target, *args)
    product = LayerProduct(node)
    rows = torch.cat(list(product.rows(x, tuple(weight.shape))), dim=1)
    found = torch.bmm(rows, product.matrix(weight).transpose(1, 2))  # [groups, rows, outputs]
    return target(*args), found.transpose(1, 2).flatten(0, 1)


SMALL = st.integers(1, 3)


@given(
    spatial=SMALL,
    groups=SMALL,
    each=st.tuples(SMALL, SMALL),
    kernel=SMALL,
    stride=SMALL,
    dilation=st.integers(1, 2),
    padding=st.integers(0, 3),
    kind=st.sampled_from(["plain", "transposed", "padded"]),
    extra=st.integers(0, 1),
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_rows_times_matrix_is_the_convolution_whatever_its_geometry(
    spatial: int,
    groups: int,
    each: tuple[int, int],
    kernel: int,
    stride: int,
    dilation: int,
    padding: int,
    kind: str,
    extra: int,
) -> None:
    generator = torch.Generator().manual_seed(spatial * 100 + kernel)
    sizes = [7, 6, 5][:spatial]
    kernels = [kernel, *[2] * (spatial - 1)]
    inputs, outputs = groups * each[0], groups * each[1]
    is_transposed = kind == "transposed"
    shape = (inputs, each[1]) if is_transposed else (outputs, each[0])
    weight = torch.randn(*shape, *kernels, generator=generator)
    x = torch.randn(2, inputs, *sizes, generator=generator)
    pads = [padding] * spatial
    out = [extra if is_transposed and extra < max(stride, dilation) else 0] * spatial
    target: Any = aten.convolution.default
    if kind == "padded":
        target, pads = PADDED_CONVOLUTION, [*pads, *[padding + 1] * spatial]
    if is_transposed and any(dilation * (size - 1) + 1 + out[0] <= 0 for size in kernels):
        return
    args = (x, weight, None, [stride] * spatial, pads, [dilation] * spatial, is_transposed, out, groups)
    try:
        expected = target(*args)
    except RuntimeError:  # the kernel does not fit, or nothing is left
        return
    if expected.numel() == 0:
        return
    expected, found = product_of(target, x, weight, *args)
    assert torch.allclose(found.view(outputs, -1), expected.transpose(0, 1).reshape(outputs, -1), atol=1e-4)


def test_rows_times_matrix_is_linear_addmm_and_matmul() -> None:
    x, weight = torch.randn(2, 5, 4), torch.randn(3, 4)
    expected, found = product_of(aten.linear.default, x, weight, x, weight, None)
    assert torch.allclose(found, expected.reshape(-1, 3).T, atol=1e-5)
    expected, found = product_of(aten.matmul.default, x, weight.T, x, weight.T.contiguous())
    assert torch.allclose(found, expected.reshape(-1, 3).T, atol=1e-5)
    bias, flat = torch.zeros(3), x.reshape(-1, 4)
    expected, found = product_of(aten.addmm.default, flat, weight.T, bias, flat, weight.T.contiguous())
    assert torch.allclose(found, expected.T, atol=1e-5)


def test_weight_is_the_inverse_of_matrix() -> None:
    cases: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = [
        (aten.linear.default, (3, 4), ()),
        (aten.matmul.default, (4, 3), ()),
        (aten.convolution.default, (6, 2, 3, 2), ([1, 1], [0, 0], [1, 1], False, [0, 0], 2)),
        (aten.convolution.default, (6, 2, 3, 2), ([1, 1], [0, 0], [1, 1], True, [0, 0], 3)),
    ]
    for target, shape, rest in cases:
        weight = torch.arange(torch.Size(shape).numel()).view(shape)
        middle = (None,) if rest else ()
        product = LayerProduct(call(target, torch.zeros(1), torch.zeros(1), *middle, *rest))
        assert torch.equal(product.weight(product.matrix(weight), weight), weight)


def test_second_moment_gives_the_squared_error_of_the_output() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)
    x = torch.randn(3, 4, 5, 5)
    program = fxquant.capture(layer.eval(), x)
    node = next(node for node in program.graph.nodes if node.target is aten.convolution.default)
    product = LayerProduct(node)
    change = torch.randn_like(layer.weight)
    moment = SecondMoment()
    for part in torch.split(x, 1):
        for rows in product.rows(part, tuple(change.shape)):
            moment.add(rows)
    assert moment.total is not None
    found = squared_errors(product.matrix(change), moment.total).flatten()
    expected = torch.nn.functional.conv2d(x, change, padding=1, groups=2).double().square().sum((0, 2, 3))
    assert torch.allclose(found, expected, rtol=1e-5)
