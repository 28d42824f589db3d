"""Chains of layers whose channels can be rescaled against each other without a change of what the network computes.

    f(s x) = s f(x) for s > 0    (f positive-homogeneous, channel by channel)
    W2 f(W1 x + b1)  =  (W2 S) f(S^-1 W1 x + S^-1 b1)        S = diag(s), s > 0

Nagel et al. 2019 (arXiv:1906.04721), section 4.1. `HOMOGENEOUS` and `SPATIAL` below are the tables that decide which f
are: what is not in them, and no clip at 0, reshape or permutation, ends a chain. Chains are the components of a
networkx graph whose nodes are layers and whose edges are such links; a value that has two readers has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Any

import networkx as nx
import torch
from torch import fx, nn

from fxquant.graph.program import Program, input_slots, value_type
from fxquant.graph.rewriter import Rewriter
from fxquant.ops.activation import activation_bounds

from .fold_batch_norm import shared_tensors, why_fixed
from .layers import CONVOLUTIONS, POOLS, RESHAPES, Layer, as_layer, user_list

aten = torch.ops.aten
HOMOGENEOUS = (
    aten.relu.default,
    aten.leaky_relu.default,
    aten.prelu.default,  # a slope for each channel stays as it is
    aten.abs.default,
    aten.neg.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
)
CLIPS = (
    aten.hardtanh.default,
    aten.relu6.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
)
_RESIZES = (
    (aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec),
    (aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec),
)
SPATIAL = {  # what works on each channel alone, along so many axes at the end
    **POOLS,
    **{target: axes for family in _RESIZES for axes, target in enumerate(family, 1)},
}
_PADS = (aten.constant_pad_nd.default, aten.pad.default)
_SHAPES = (
    *RESHAPES,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.unflatten.int,
)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)


@dataclass(frozen=True, eq=False)
class Link:
    """Two layers, the second reading what the first gives through positive-homogeneous functions alone.

    Arguments:
        first, second: the layers.
        between: the nodes between them, in order.
        channels: int64, for each input channel (or feature) of the second, the output channel of the first that it
            comes from: flattening repeats them.
    """

    first: Layer
    second: Layer
    between: tuple[fx.Node, ...]
    channels: torch.Tensor

    @property
    def name(self) -> str:
        """For messages: "conv1 -> conv2"."""
        return f"{self.first.node.name} -> {self.second.node.name}"

    @property
    def clips(self) -> tuple[fx.Node, ...]:
        """Those between that clip at other bounds than 0; none unless links were sought through them."""
        return tuple(node for node in self.between if node.target in CLIPS and not _clips_at_zero(node))

    @property
    def is_plain(self) -> bool:
        """Whether input channel i of the second is output channel i of the first."""
        return torch.equal(self.channels, torch.arange(len(self.channels)))


@dataclass(frozen=True, eq=False)
class _Track:
    """Where the channels of a layer's output are in a value: along which axis, and which channel each index is of."""

    axis: int
    channels: torch.Tensor


def find_links(program: Program, rewriter: Rewriter | None = None, *, through_clips: bool = False) -> list[Link]:
    """The links of a program, in graph order; with a rewriter, layers that have none are near misses.

    through_clips: go through clip(0, b), too, as if it were a relu.
    """
    shared, found = shared_tensors(program), []
    for node in program.graph.nodes:
        layer = as_layer(node)
        if layer is None:
            continue
        link = _link_from(program, layer, shared, through_clips)
        if isinstance(link, Link):
            found.append(link)
        elif rewriter is not None:
            rewriter.miss(node, f"{node.name} ends its chain: {link}")
    return found


def chains_of(links: list[Link]) -> Iterator[list[Link]]:
    """The links that hang together, in order, chain after chain; the layers are those of the links' ends."""
    graph = nx.DiGraph()
    for link in links:
        graph.add_edge(link.first.node, link.second.node, link=link)
    for component in nx.weakly_connected_components(graph):
        chain = graph.subgraph(component)
        yield [chain.edges[edge]["link"] for edge in nx.topological_sort(nx.line_graph(chain))]


def _link_from(program: Program, layer: Layer, shared: dict[int, str], through_clips: bool) -> Link | str:
    """The link that begins at a layer; else what is in the way."""
    between: list[fx.Node] = []
    value = layer.node
    reason = _why_kept(program, layer, shared)
    track = None if reason is not None else _output_track(program, layer)
    while track is not None:
        user = _sole_reader(value)
        if isinstance(user, str):
            return user
        second = as_layer(user)
        if second is not None:
            return _arrive(program, Link(layer, second, tuple(between), track.channels), value, track.axis, shared)
        moved = _through(program, value, user, track, through_clips)
        if isinstance(moved, str):
            return moved
        between.append(user)
        value, track = user, moved
    return reason or f"the channels of {layer.node.name} are not where a layer has them"


def _sole_reader(value: fx.Node) -> fx.Node | str:
    """The node that alone reads a value, as its first input; else what is in the way."""
    if len(value.users) != 1:
        return user_list(value)
    user = next(iter(value.users))
    if user.op == "output":
        return f"{value.name} is an output of the program"
    if user.args[:1] != (value,) or input_slots(user).count(value) != 1:
        return f"{user.name} reads {value.name} beside another value"
    return user


def _why_kept(program: Program, layer: Layer, shared: dict[int, str]) -> str | None:
    """Why a layer's numbers may not be changed for it alone."""
    operands = (layer.weight, layer.bias)
    reasons = (None if operand is None else why_fixed(program, layer, operand, shared) for operand in operands)
    return next((reason for reason in reasons if reason is not None), None)


def _channel_axis(layer: Layer, value: fx.Node) -> int | None:
    """The axis of the channels in a layer's input or output; None if that is not known."""
    found, weight = value_type(value), value_type(layer.weight)
    if found is None or weight is None:
        return None
    axis = len(found.shape) - 1
    return axis if layer.node.target not in CONVOLUTIONS else axis + 2 - len(weight.shape)


def _output_track(program: Program, layer: Layer) -> _Track | None:
    axis, weight = _channel_axis(layer, layer.node), program.tensor(layer.weight)
    layout = layer.layout
    outputs = weight.shape[1] * layout.groups if layout.transposed else weight.shape[0]
    return None if axis is None else _Track(axis, torch.arange(outputs))


def _arrive(program: Program, link: Link, value: fx.Node, axis: int, shared: dict[int, str]) -> Link | str:
    """The link, if its second layer reads the channels as such and its weight may be changed."""
    second = link.second
    reason = _why_kept(program, replace(second, bias=None), shared)
    if reason is not None:
        return reason
    weight = program.tensor(second.weight)
    inputs = weight.shape[0] if second.layout.transposed else weight.shape[1] * second.layout.groups
    if _channel_axis(second, value) != axis or inputs != len(link.channels):
        return f"{second.node.name} does not take its channels from axis {axis} of {value.name} ({value_type(value)})"
    return link


def _through(program: Program, value: fx.Node, user: fx.Node, track: _Track, through_clips: bool) -> _Track | str:
    """Where the channels are behind `user`, if scaling them passes through it; else why it does not."""
    before, behind = value_type(value), value_type(user)
    if before is None or behind is None:
        return f"{user.name} is not a single tensor"
    if user.op == "call_module":
        kind = type(program.submodule(user))
        return (
            track if kind in _DROPOUTS else f"{user.name} ({kind.__name__}) is not positive-homogeneous in each channel"
        )
    if user.target in HOMOGENEOUS:
        return track
    if user.target in CLIPS:
        return _through_clip(user, track, through_clips)
    if user.target in SPATIAL:
        return _beside(user, track, len(before.shape) - SPATIAL[user.target])
    if user.target in _PADS:
        return _through_pad(user, track, len(before.shape))
    if user.target is aten.mean.dim:
        return _through_mean(user, track, len(before.shape))
    if user.target in (aten.permute.default, aten.transpose.int):
        return _permuted(user, track, len(before.shape))
    if user.target in _SHAPES:
        found = _reshaped(before.shape, behind.shape, track)
        return found if found is not None else f"{user.name} reshapes {before} to {behind}, which mixes channels"
    return f"{user.name} ({user.target}) is not positive-homogeneous in each channel"


def _clips_at_zero(node: fx.Node) -> bool:
    bounds = activation_bounds(node)
    return bounds is not None and all(bound in (0.0, inf, -inf) for bound in bounds)


def is_clip_above(node: fx.Node) -> bool:
    """Whether a node is clip(0, b) with a finite b > 0: relu6, and what it is called with other bounds."""
    bounds = activation_bounds(node) if node.op == "call_function" and node.target in CLIPS else None
    return bounds is not None and bounds[0] == 0.0 and 0.0 < bounds[1] < inf


def _through_clip(user: fx.Node, track: _Track, through_clips: bool) -> _Track | str:
    if _clips_at_zero(user) or (through_clips and is_clip_above(user)):
        return track
    bounds = activation_bounds(user)
    if bounds is None:
        return f"the bounds of {user.name} are computed"
    remedy = "; 'replace-relu6' makes it a relu, which changes the outputs" if is_clip_above(user) else ""
    return f"{user.name} clips to [{bounds[0]:g}, {bounds[1]:g}], wherever a channel's scale is{remedy}"


def _beside(user: fx.Node, track: _Track, first: int) -> _Track | str:
    return track if track.axis < first else f"{user.name} works along the channels"


def _through_pad(user: fx.Node, track: _Track, rank: int) -> _Track | str:
    args: list[Any] = [*user.args, None, None, None]
    given = user.kwargs
    amounts = args[1] if len(user.args) > 1 else given.get("pad")
    is_aten_pad = user.target is aten.pad.default
    value = given.get("value", args[3] if is_aten_pad else args[2])
    mode = given.get("mode", args[2] or "constant") if is_aten_pad else "constant"
    if mode == "constant" and value:
        return f"{user.name} pads with {value}"
    axes = len(amounts) // 2 if isinstance(amounts, (list, tuple)) else rank
    return _beside(user, track, rank - axes)


def _through_mean(user: fx.Node, track: _Track, rank: int) -> _Track | str:
    args: list[Any] = [*user.args, None, None]
    axes = sorted({axis % rank for axis in args[1] or range(rank)})
    if track.axis in axes:
        return f"{user.name} averages over the channels"
    keeps = bool(args[2] or user.kwargs.get("keepdim"))
    return replace(track, axis=track.axis - (0 if keeps else sum(axis < track.axis for axis in axes)))


def _permuted(user: fx.Node, track: _Track, rank: int) -> _Track:
    order = list(range(rank))
    if user.target is aten.permute.default:
        dims: Any = user.args[1]
        order = [axis % rank for axis in dims]
    else:
        one, other = (int(axis) % rank for axis in user.args[1:3])  # type: ignore[arg-type]  # numbers, by the schema
        order[one], order[other] = order[other], order[one]
    return replace(track, axis=order.index(track.axis))


def _reshaped(before: tuple[int | str, ...], behind: tuple[int | str, ...], track: _Track) -> _Track | None:
    """Where the channels are behind a reshape: on an axis of their own, or of one that holds them and neighbours."""
    axis = track.axis
    moved = len(behind) - len(before) + axis
    if moved >= 0 and before[axis:] == behind[moved:]:
        return replace(track, axis=moved)
    same = 0
    while same < min(axis, len(behind)) and before[same] == behind[same]:
        same += 1
    for end in range(axis + 1, len(before) + 1):
        merged = before[same:end]
        sizes = [size for size in merged if isinstance(size, int)]
        if len(sizes) == len(merged) and same < len(behind) and behind[same] == prod(sizes):
            outer, inner = prod(sizes[: axis - same]), prod(sizes[axis - same + 1 :])
            return _Track(same, track.channels.repeat_interleave(inner).repeat(outer))
    return None
