"""A site's nodes in float, as fake quantization computes them: what gradients are taken of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxquant.numerics.rounding import fake_quantize
from fxquant.simulation.executor import Call


def real_site(call: Call) -> Callable[[tuple[Any, ...]], torch.Tensor]:
    """The site as fake quantization computes it: from the operation's args with real operands to quantized reals."""
    compute, out = unquantized_site(call), call.out
    assert out is not None
    return lambda args: fake_quantize(compute(args), out.scale, out.zero_point, out.qmin, out.qmax)


def unquantized_site(call: Call) -> Callable[[tuple[Any, ...]], torch.Tensor]:
    """The same, in front of the quantizer."""

    def compute(args: tuple[Any, ...]) -> torch.Tensor:
        value: torch.Tensor = _target(call.site.operation)(*args, **call.site.operation.kwargs)
        for node in call.site.activations:
            value = _target(node)(value, *node.args[1:], **node.kwargs)
        return value

    return compute


def _target(node: fx.Node) -> Callable[..., Any]:
    assert callable(node.target), node.format_node()
    return node.target
