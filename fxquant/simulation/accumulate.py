"""Sums of products of integers in float32, exact by certificate.

With x in [lo, hi] (centred codes), P = sum of a channel's positive weight codes and N = -sum of its negative ones,
every partial sum of products and bias b, in whatever order it is added, lies within

    [-(N hi - P lo + max(-b, 0)),  P hi - N lo + max(b, 0)]

Integers up to 2^24 are exact in float32, so that below it the result does not depend on the order. A layer with a
channel beyond it is computed in parts of the contracted axis, each below 2^24, added in float64; what cannot be split
is computed in float64. In both cases the sum is exact, and rounded to float32 once, as onnxruntime rounds its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fxquant.numerics.codes import Codes
from fxquant.numerics.precision import is_exact_in_float32
from fxquant.ops.kernels import ProductKernel
from fxquant.simulation.executor import Call

EXACT_IN_FLOAT32 = 2.0**24
MOST_PARTS = 4  # beyond, float64 costs less
_LARGEST_CODE = 255  # magnitude of a centred code of 8 bits


@dataclass(frozen=True)
class Strategy:
    """How one layer's sums are computed.

    Arguments:
        parts: parts of the contracted axis in float32; 0: all in float64.
        largest: the certificate: largest magnitude that a partial sum may reach, over all channels.
    """

    parts: int
    largest: float

    @property
    def how(self) -> str:
        """The number format, and in how many parts."""
        return "float64" if self.parts == 0 else "float32" if self.parts == 1 else f"float32 in {self.parts} parts"

    @property
    def share(self) -> float:
        """The largest sum over 2^24, up to which float32 adds integers exactly."""
        return self.largest / EXACT_IN_FLOAT32

    def __str__(self) -> str:
        return f"{self.how} (sums up to {self.largest:.4g}, {self.share:.2f} of 2^24)"


class Accumulator:
    """Adds up products; `strategies` has, by node name, how it last did so."""

    def __init__(self) -> None:
        self.strategies: dict[str, Strategy] = {}

    def add_up(self, call: Call, kernel: ProductKernel, operands: list[Any]) -> torch.Tensor:
        """f(acc), float32: the operation on centred codes, the sum exact and rounded once.

        Arguments:
            operands: the operation's args with centred codes (float32) as factors and bias.
        """
        node = call.site.operation
        strategy = _strategy(call, kernel)
        self.strategies[node.name] = strategy
        assert callable(node.target)
        if strategy.parts == 0:
            wide = [part.double() if isinstance(part, torch.Tensor) else part for part in operands]
            found: torch.Tensor = node.target(*wide, **node.kwargs)
            return found.float()
        if strategy.parts == 1:
            found = node.target(*operands, **node.kwargs)
            return found
        return _in_parts(call, kernel, operands, strategy.parts)


def largest_sum(weight: torch.Tensor, bias: torch.Tensor | None, low: float, high: float) -> float:
    """The certificate over all channels.

    Arguments:
        weight: centred codes, of shape [channels, products].
        bias: codes, of shape [channels].
        low, high: bounds of the input's centred codes, low <= 0 <= high.
    """
    if not weight.shape[0]:
        return 0.0
    # Sums of at most 2^24 / 255 codes of 8 bits are exact in float32, which is much the fastest.
    wide = None if weight.shape[1] * _LARGEST_CODE <= EXACT_IN_FLOAT32 else torch.float64
    magnitude = torch.linalg.vector_norm(weight, 1, dim=1, dtype=wide).double()
    total = weight.sum(dim=1, dtype=wide).double()
    positive, negative = (magnitude + total) / 2, (magnitude - total) / 2
    above, below = positive * high - negative * low, negative * high - positive * low
    if bias is not None:
        above, below = above + bias.clamp(min=0), below - bias.clamp(max=0)
    return float(torch.maximum(above, below).amax())


def _strategy(call: Call, kernel: ProductKernel) -> Strategy:
    """The fewest parts whose certificates all hold."""
    largest = _certificate(call, kernel, 0, 1)
    if not is_exact_in_float32(call.args[kernel.left].centred.device):
        return Strategy(0, largest)
    if largest <= EXACT_IN_FLOAT32:
        return Strategy(1, largest)
    for parts in range(2, MOST_PARTS + 1):
        if not _can_split(call, kernel, parts):
            break
        if all(_certificate(call, kernel, part, parts) <= EXACT_IN_FLOAT32 for part in range(parts)):
            return Strategy(parts, largest)
    return Strategy(0, largest)


def _certificate(call: Call, kernel: ProductKernel, part: int, parts: int) -> float:
    """The largest sum that one part of the contracted axis may reach; the bias belongs to the first."""
    left, right = call.args[kernel.left], call.args[kernel.right]
    low, high = left.grid.bounds
    factor = _part(right.centred.detach(), kernel.right_axis, part, parts)
    if call.site.definition.weight_for(call.site.operation) is None:
        reach = max(abs(bound) for bound in right.grid.bounds)
        return float(factor.shape[kernel.right_axis] * max(-low, high) * reach)
    channel_axis = call.site.definition.channel_axis
    assert channel_axis is not None, "an operation with a weight has channels"
    flat = factor.movedim(channel_axis(call.site.operation), 0).flatten(1)
    bias = _bias(call, kernel) if part == 0 else None
    return largest_sum(flat, None if bias is None else bias.centred.detach(), low, high)


def _bias(call: Call, kernel: ProductKernel) -> Codes | None:
    position = call.site.definition.bias
    found = call.args[position] if position is not None and position < len(call.args) else None
    return found if isinstance(found, Codes) else None


def _can_split(call: Call, kernel: ProductKernel, parts: int) -> bool:
    """A grouped convolution contracts different inputs in each group."""
    left, right = (call.args[position].centred for position in (kernel.left, kernel.right))
    size = left.shape[kernel.left_axis]
    return bool(size == right.shape[kernel.right_axis] and size >= parts)


def _in_parts(call: Call, kernel: ProductKernel, operands: list[Any], parts: int) -> torch.Tensor:
    node = call.site.operation
    assert callable(node.target)
    total: torch.Tensor | None = None
    for part in range(parts):
        own = list(operands)
        own[kernel.left] = _part(operands[kernel.left], kernel.left_axis, part, parts)
        own[kernel.right] = _part(operands[kernel.right], kernel.right_axis, part, parts)
        if part and (position := call.site.definition.bias) is not None and position < len(own):
            own[position] = None if kernel.optional_bias else torch.zeros_like(operands[position])
        found: torch.Tensor = node.target(*own, **node.kwargs)
        # The sum of two integers below 2^24 is rounded once in float32; that of more would be rounded more often.
        total = found if total is None else total + (found if parts == 2 else found.double())
    assert total is not None
    return total.float()


def _part(tensor: torch.Tensor, axis: int, part: int, parts: int) -> torch.Tensor:
    if parts == 1:
        return tensor
    size = tensor.shape[axis]
    start, end = size * part // parts, size * (part + 1) // parts
    return tensor.narrow(axis, start, end - start)
