"""first_order: what a straight-through backward is written for is a first derivative; a second would be silently wrong.

A product's gradient is that of centred codes, scaled to real values by factors that autograd takes for constants;
tables hold derivatives as numbers. Differentiating either again would give something else than fake quantization's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fxquant.errors import FxquantError

Backward = Callable[..., tuple[torch.Tensor | None, ...]]


def first_order(backward: Backward) -> Backward:
    """A Function's backward that refuses to be differentiated: autograd enables gradients there for `create_graph`.

    torch's own once_differentiable leaves a gradient that depends on nothing, which `allow_unused` lets pass.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise FxquantError(
                "simulation 'exact'",
                expected="first derivatives",
                got="a backward pass with create_graph=True",
                remedy="Set program.simulate = 'float' where a loss needs second derivatives.",
            )
        return backward(ctx, *grads)

    return wrapped
