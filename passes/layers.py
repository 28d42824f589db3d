"""Convolutions and linears as passes see them, and what a channel-wise affine map meets on its way to one."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from fxquant.graph.program import input_slots, value_type
from fxquant.numerics.padded_convolution import PADDED_CONVOLUTION

from .channelwise import Affine, WeightLayout

aten = torch.ops.aten
CONVOLUTIONS = (aten.convolution.default, PADDED_CONVOLUTION)
_MAX_POOLS = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
_AVG_POOLS = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
_ADAPTIVE_POOLS = (aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)
POOLS = {target: axes for pools in (_MAX_POOLS, _AVG_POOLS, _ADAPTIVE_POOLS) for axes, target in enumerate(pools, 1)}
RESHAPES = (aten.flatten.using_ints, aten.view.default, aten.reshape.default)


@dataclass(frozen=True)
class Layer:
    """A convolution or linear. `sees_all`: every tap of its kernel reads the input (it neither pads nor is
    transposed)."""

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    layout: WeightLayout
    sees_all: bool

    def has_channels_on_axis_1(self, value: fx.Node) -> bool:
        """Whether `value`, its input or output, is batched and has its channels on axis 1."""
        found, weight = value_type(value), value_type(self.weight)
        return found is not None and weight is not None and len(found.shape) == len(weight.shape)


def as_layer(node: fx.Node) -> Layer | None:
    """The convolution or linear that a node calls, or None."""
    args: list[Any] = [*node.args, None]
    if node.op == "call_function" and node.target is aten.linear.default:
        return Layer(node, args[1], args[2], WeightLayout(), sees_all=True)
    if node.op == "call_function" and node.target in CONVOLUTIONS:
        layout = WeightLayout(transposed=args[6], groups=args[8])
        return Layer(node, args[1], args[2], layout, sees_all=not layout.transposed and not any(args[4]))
    return None


def user_list(node: fx.Node) -> str:
    """The users of a node, for messages: "conv2 has 2 users (bn2, add)"."""
    names = [user.name for user in node.users]
    return f"{node.name} has {len(names)} user{'' if len(names) == 1 else 's'} ({', '.join(names)})"


def layer_ahead(node: fx.Node, affine: Affine) -> tuple[Layer, Affine] | str:
    """The layer that alone reads a value a * x + d, and the map as it arrives there; else what is in the way."""
    while True:
        if len(node.users) != 1:
            return user_list(node)
        user = next(iter(node.users))
        if user.op == "output" or user.args[0] is not node or input_slots(user).count(node) != 1:
            return f"{user.name} does not take {node.name} as its input alone"
        layer = as_layer(user)
        if layer is not None:
            return _arrive(node, layer, affine)
        carried = _carry(node, user, affine)
        if isinstance(carried, str):
            return carried
        node, affine = user, carried


def _arrive(node: fx.Node, layer: Layer, affine: Affine) -> tuple[Layer, Affine] | str:
    if not layer.has_channels_on_axis_1(node):
        return f"{layer.node.name} does not take its channels from axis 1 of {node.name} ({value_type(node)})"
    if not layer.sees_all and bool(affine.shift.any()):
        way = "is transposed, and its borders leave out taps" if layer.layout.transposed else "pads with zeros"
        return f"{layer.node.name} {way}: a shift (here of up to {float(affine.shift.abs().max()):.3g}) cannot pass"
    return layer, affine


def _carry(node: fx.Node, user: fx.Node, affine: Affine) -> Affine | str:
    """The map as it is behind `user`, if `user` commutes with it; else why it does not."""
    before = value_type(node)
    args: list[Any] = [*user.args, *[None] * 7]
    if before is not None and not user.kwargs:
        if user.target in _MAX_POOLS:
            negative = int((affine.scale < 0).sum())
            return f"{user.name} takes the maximum, and {negative} channels change sign" if negative else affine
        if user.target in _AVG_POOLS:
            weighs = bool(torch.tensor(args[3] or 0).any()) or args[6] is not None
            return f"{user.name} averages with padding, or with a divisor of its own" if weighs else affine
        spatial = user.target is aten.mean.dim and args[1] and all(axis % len(before.shape) > 1 for axis in args[1])
        if spatial or user.target in _ADAPTIVE_POOLS:
            return affine
        if user.target in RESHAPES:
            return _flatten(node, user, affine)
    return f"{user.name} behind it is no convolution, linear, pooling or flattening"


def _flatten(node: fx.Node, user: fx.Node, affine: Affine) -> Affine | str:
    before, behind = value_type(node), value_type(user)
    if before is not None and behind is not None and len(before.shape) > 1 and before.shape[:1] == behind.shape[:1]:
        if before.shape[1:2] == behind.shape[1:2]:
            return affine
        each = [size for size in before.shape[2:] if isinstance(size, int)]
        if len(each) == len(before.shape) - 2 and behind.shape[1:] == (affine.scale.numel() * prod(each),):
            return affine.repeated(prod(each))
    return f"{user.name} reshapes {before} to {behind}, which mixes the channels of axis 1"
