"""Values that linear layers read together, and what in front of them can divide their channels (for smooth-quant)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.graph.program import Program, ValueType, value_type

from .layers import RESHAPES
from .values import definition_of

aten = torch.ops.aten
# By operator of a linear layer: where its input and its weight stand, and the weight's axis of input channels.
LINEARS = {
    aten.linear.default: (0, 1, 1),
    aten.addmm.default: (1, 2, 0),
    aten.matmul.default: (0, 1, 0),
    aten.mm.default: (0, 1, 0),
}
_PASSING = ("relu", "leaky_relu", "dropout")  # f(x / s) = f(x) / s for s > 0, channel by channel
_ALONG_AXES = (aten.mean.dim, aten.select.int, aten.slice.Tensor)  # args[1]: the axes that they go along


@dataclass(frozen=True)
class Reader:
    """A linear layer: what it reads, and the node of its weight with the axis of the input channels."""

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    axis: int


@dataclass(frozen=True)
class Group:
    """All that reads one value, directly or through what passes a scaling on.

    Arguments:
        origin: the value.
        readers: the linear layers.
        others: what else reads it, by name.
    """

    origin: fx.Node
    readers: tuple[Reader, ...]
    others: tuple[str, ...]


@dataclass(frozen=True)
class Absorber:
    """Tensors, by their nodes, whose axis 0 (of a vector: whose elements) are the channels of a value."""

    tensors: tuple[fx.Node, ...]


def as_reader(program: Program, node: fx.Node) -> Reader | None:
    """The linear layer with a weight of rank 2 that a node calls; None if it calls none."""
    if node.op != "call_function" or node.target not in LINEARS:
        return None
    definition = definition_of(program, node)
    x_place, weight_place, axis = LINEARS[node.target]
    x, weight = node.args[x_place], node.args[weight_place]
    is_layer = definition is not None and definition.weight_for(node) == weight_place
    if not is_layer or not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    if weight.target is aten.transpose.int and isinstance(weight.args[0], fx.Node) and len(weight.users) == 1:
        weight, axis = weight.args[0], 1 - axis  # as capture writes addmm
    found = value_type(weight)
    return Reader(node, x, weight, axis) if found is not None and len(found.shape) == 2 else None


def groups_of(program: Program) -> list[Group]:
    """The values that linear layers read, in graph order, each followed back to where its channels come from."""
    origins: dict[fx.Node, None] = {}
    for node in program.graph.nodes:
        reader = as_reader(program, node)
        if reader is not None:
            origins[_origin(program, reader.input)] = None
    return [_group(program, origin) for origin in origins]


def _origin(program: Program, value: fx.Node) -> fx.Node:
    while _passes(program, value):
        assert isinstance(value.args[0], fx.Node)
        value = value.args[0]
    return value


def _passes(program: Program, node: fx.Node) -> bool:
    """Whether a node hands on its input with each channel of the last axis, scaled or not, in its place."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or node.op not in ("call_function", "call_module"):
        return False
    before, behind = value_type(source), value_type(node)
    if node.target in (*RESHAPES, *_ALONG_AXES):
        last = before.shape[-1:] if before is not None else ()
        keeps_size = behind is not None and bool(last) and isinstance(last[0], int) and behind.shape[-1:] == last
        return keeps_size and (node.target in RESHAPES or not _goes_along_last(node, before))
    definition = definition_of(program, node)
    return definition is not None and definition.name in _PASSING


def _goes_along_last(node: fx.Node, before: ValueType | None) -> bool:
    """Whether a mean, select or slice goes along the last axis."""
    assert before is not None
    given: Any = node.args[1] if len(node.args) > 1 else 0
    axes = list(range(len(before.shape))) if given is None else [given] if isinstance(given, int) else list(given)
    return not axes or any(axis % len(before.shape) == len(before.shape) - 1 for axis in axes)


def _group(program: Program, origin: fx.Node) -> Group:
    readers: list[Reader] = []
    others: list[str] = []
    for value, user in _uses(program, origin):
        reader = as_reader(program, user)
        if reader is not None and reader.input is value and user.all_input_nodes.count(value) == 1:
            readers.append(reader)
        else:
            others.append(user.name)
    return Group(origin, tuple(readers), tuple(others))


def _uses(program: Program, value: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Who reads a value, through whatever passes it on, and as which node."""
    for user in value.users:
        if _passes(program, user) and user.args[0] is value:
            yield from _uses(program, user)
        else:
            yield value, user


def why_fixed(program: Program, tensor: fx.Node, shared: dict[int, str]) -> str:
    """Why a tensor may not be changed for one node alone; "" if it may."""
    if tensor.op != "get_attr":
        return f"{tensor.name} is computed"
    if len(tensor.users) != 1:
        return f"{tensor.name} is read at {len(tensor.users)} places"
    return shared.get(id(program.tensor(tensor)), "")


def absorber_of(program: Program, origin: fx.Node, channels: int) -> Absorber | str:
    """What can divide the channels of a value; else why nothing can.

    1. Weight and bias of a layer norm or RMS norm over the last axis alone.
    2. The rows of a linear layer's weight (or its columns, as addmm has it), and its bias.
    3. A constant of one number for each channel that is multiplied there, as RMS norms taken apart have it.
    """
    if origin.op != "call_function":
        return f"{origin.name} in front is no norm, linear layer or multiplication by a constant"
    args: list[Any] = [*origin.args, *[None] * 4]
    if origin.target in (aten.layer_norm.default, aten.rms_norm.default):
        tensors = args[2:4] if origin.target is aten.layer_norm.default else args[2:3]
        if not isinstance(tensors[0], fx.Node) or len(args[1]) != 1:
            return f"{origin.name} in front has no weight for each channel"
        return Absorber(tuple(one for one in tensors if isinstance(one, fx.Node)))
    if origin.target is aten.linear.default:
        return Absorber(tuple(one for one in args[1:3] if isinstance(one, fx.Node)))
    if origin.target is aten.mul.Tensor:
        found = [one for one in args[:2] if isinstance(one, fx.Node) and _is_channel_constant(program, one, channels)]
        if len(found) == 1:
            return Absorber((found[0],))
    return f"{origin.name} in front is no norm, linear layer or multiplication by a constant"


def _is_channel_constant(program: Program, node: fx.Node, channels: int) -> bool:
    if node.op != "get_attr":
        return False
    tensor = program.tensor(node)
    return tensor.is_floating_point() and tensor.numel() == channels and tensor.shape[-1:] == (channels,)
