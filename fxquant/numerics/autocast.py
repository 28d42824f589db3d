"""Convolutions that heed torch.autocast on every device.

On the CPU, torch's autocast casts what conv2d and its like are given, but not what `aten.convolution` is given, which
capture makes of them. What else the normal form is made of (linear, matmul, attention ...) it casts for by itself.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch

from fxquant.numerics.padded_convolution import PADDED_CONVOLUTION


def convolution(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *geometry: Any) -> torch.Tensor:
    """aten.convolution, in autocast's dtype where autocast is enabled for the input's device."""
    convolved: torch.Tensor = torch.ops.aten.convolution.default(*_operands(input, weight, bias), *geometry)
    return convolved


def padded_convolution(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *geometry: Any
) -> torch.Tensor:
    """fxquant.padded_convolution, likewise."""
    convolved: torch.Tensor = PADDED_CONVOLUTION(*_operands(input, weight, bias), *geometry)
    return convolved


HEEDING_AUTOCAST = {torch.ops.aten.convolution.default: convolution, PADDED_CONVOLUTION: padded_convolution}


def _operands(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as autocast's own operators take them: float64 and integers stay."""
    assert tensors[0] is not None
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) if _is_cast(tensor) else tensor for tensor in tensors)


def _is_cast(tensor: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    return tensor is not None and tensor.is_floating_point() and tensor.dtype is not torch.float64
