"""fxquant::padded_convolution: a convolution whose zero padding may differ at the two ends of an axis, as ONNX's Conv
has it.

`aten.convolution` pads both ends alike, so a network with TensorFlow's 'same' padding needs a pad in front of it,
which runs in float. This operator has aten.convolution's arguments in its order; `padding` alone is twice as long, in
ONNX's order: the begin of every axis, then the end of every axis. It decomposes into aten operations, so it
differentiates and compiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxquant.errors import FxquantError

_SCHEMA = (
    "padded_convolution(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "bool transposed, int[] output_padding, int groups) -> Tensor"
)


def padded_convolution(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """Pad `input` [N, C, *spatial] with zeros, then convolve it without padding.

    `padding` is (begin of axis 2, begin of axis 3, ..., end of axis 2, end of axis 3, ...); transposed convolutions
    are refused.
    """
    spatial = weight.ndim - 2
    if transposed or len(padding) != 2 * spatial:
        got = f"padding {list(padding)} for {spatial} spatial axes, transposed={transposed}"
        raise FxquantError("padded_convolution", expected="two pads for each spatial axis, not transposed", got=got)
    ends = [pad for axis in reversed(range(spatial)) for pad in (padding[axis], padding[spatial + axis])]
    padded = torch.ops.aten.constant_pad_nd.default(input, ends, 0.0)
    rest = (stride, [0] * spatial, dilation, False, output_padding, groups)
    convolved: torch.Tensor = torch.ops.aten.convolution.default(padded, weight, bias, *rest)
    return convolved


_library: Any = torch.library  # it has no annotations
_LIBRARY = _library.Library("fxquant", "DEF")  # kept alive here: the operator lives as long as it
_LIBRARY.define(_SCHEMA)
_LIBRARY.impl("padded_convolution", padded_convolution, "CompositeImplicitAutograd")

PADDED_CONVOLUTION = torch.ops.fxquant.padded_convolution.default
