"""Patches: what a convolution's output at a few positions depends on, so that large maps cost as much as small ones.

    y[n, :, p] = sum_k w[:, k] x[n, k at p] + b        the same sum for each position p

A map's neighbouring positions say nearly the same, and the mean over positions is estimated well by a few drawn ones. A
patch is the window of the padded input under one position, its dilation taken out; a convolution of the kernel's size
without stride or padding computes that position's output from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from fxquant.graph.program import Program
from fxquant.graph.segment import Segment
from fxquant.numerics.padded_convolution import PADDED_CONVOLUTION
from fxquant.ops._emit import argument
from fxquant.reconstruction.product import pads_of

CONVOLUTION = torch.ops.aten.convolution.default


def has_patches(node: fx.Node) -> bool:
    """Whether a node is a convolution that patches can stand in for: any but a transposed one."""
    return node.target in (CONVOLUTION, PADDED_CONVOLUTION) and not bool(argument(node, "transposed"))


def is_dearer(weight: torch.Tensor, x: torch.Tensor, count: int) -> bool:
    """Whether `count` patches cost more than the map `x`: those of a depthwise layer that hold more numbers than it.

    Each channel of a patch serves a single product there; elsewhere the products of all output channels decide.
    """
    return weight.shape[1] == 1 and count * weight.shape[2:].numel() > x.shape[2:].numel()


def draw_positions(count: int, shape: torch.Size, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """`count` different positions for each sample of a map of `shape` [samples, channels, *spatial].

    Returns an index for each spatial axis, int64 [samples, count].
    """
    spatial = shape[2:]
    flat = torch.rand(shape[0], spatial.numel(), generator=generator).topk(count, dim=1).indices
    found: list[torch.Tensor] = []
    for size in reversed(spatial):
        found.insert(0, flat % size)
        flat = flat // size
    return tuple(found)


def patches_at(
    node: fx.Node, x: torch.Tensor, weight: torch.Tensor, positions: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """The windows of `x` [samples, channels, *spatial] that the convolution `node` reads for some output positions.

    Returns [samples * count, channels, *kernel], sample after sample.
    """
    stride, dilation = argument(node, "stride"), argument(node, "dilation")
    kernel = weight.shape[2:]
    windows = F.pad(x, pads_of(node, len(kernel)))
    for axis, size in enumerate(kernel):
        windows = windows.unfold(2 + axis, dilation[axis] * (size - 1) + 1, stride[axis])[..., :: dilation[axis]]
    return _pick(windows, positions)


def outputs_at(y: torch.Tensor, positions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What a map [samples, channels, *spatial] holds at some positions: [samples * count, channels, 1, ...]."""
    found = _pick(y, positions)
    return found.reshape(*found.shape, *(1 for _ in positions))


def _pick(values: torch.Tensor, positions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    samples = torch.arange(len(values), device=values.device)[:, None]
    places: Any = (samples, slice(None), *(index.to(values.device) for index in positions))
    return values[places].flatten(0, 1)


class PatchSegment(Segment):
    """A segment in which the convolution `layer` reads patches."""

    def __init__(self, program: Program, wanted: fx.Node, known: tuple[fx.Node, ...], layer: fx.Node) -> None:
        super().__init__(program, [wanted], known)
        self.layer = layer

    def _compute(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node is not self.layer:
            return super()._compute(node, values)
        operands: list[Any] = [values[arg] if isinstance(arg, fx.Node) else None for arg in node.args[:3]]
        patches, weight, bias = operands
        spatial = patches.ndim - 2
        ones, zeros = [1] * spatial, [0] * spatial
        return CONVOLUTION(patches, weight, bias, ones, zeros, ones, False, zeros, int(argument(node, "groups")))
