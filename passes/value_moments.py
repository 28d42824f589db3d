"""What batch norms that were folded say of values further on: mean and deviation of each channel, without data.

A layer's output is taken as normal, of the mean and deviation that its batch norm gave it; activations make of it what
clipped_normal.py says. Behind them

    a + b, a - b      means add; deviations as moments.py says
    c * x, x + c      with a constant c; c - x and -x, too
    concatenation     of channels
    averages          keep the mean; their deviation is unknown, so that no activation can follow
    flattening        repeats each channel

and a FakeQuant is passed. An activation follows no other one, unless both clip: relu(relu(y)) is known, relu(relu(y) -
1) is not. Of all else, of a maximum, of a product of two values, nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx
from torch.nn.modules.dropout import _DropoutNd

from fxquant.graph.constants import Constants
from fxquant.graph.program import Program, input_slots, value_type
from fxquant.graph.statistics import statistics_of
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.ops._arguments import bind
from fxquant.ops.activation import activation_bounds

from .clipped_normal import integrated, leaky
from .layers import CONVOLUTIONS, RESHAPES
from .moments import Moments, Source, joined
from .values import is_layer

aten = torch.ops.aten
_CLIPS = (aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default)
_SMOOTH = (
    aten.elu.default,
    aten.gelu.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.tanh.default,
)
_SAME = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.dropout.default)
_SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.rsub.Scalar)
_PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)
_POOLS = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
_GLOBAL_POOLS = (aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)
_NO_PRODUCT = "the mean of a product is not the product of means"

Known = Moments | str  # or why they are not known


def value_moments(program: Program) -> dict[fx.Node, Known]:
    """Of every value of a program: its moments, or the reason why they are not known."""
    rules = _Rules(program)
    known: dict[fx.Node, Known] = {}
    for node in program.graph.nodes:
        known[node] = rules.of(node, known)
    return known


class _Rules:
    """Moments of a node's value from those of what it reads."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._constants = Constants(program)
        self._rules: dict[Any, Callable[[fx.Node, Moments], Known]] = {
            aten.leaky_relu.default: _leaky,
            aten.mean.dim: _mean,
            aten.neg.default: lambda node, x: x.scaled(-1.0),
            **dict.fromkeys(_CLIPS, _clip),
            **dict.fromkeys(_SMOOTH, _smooth),
            **dict.fromkeys(_SAME, lambda node, x: x),
            **dict.fromkeys(_POOLS, _pool),
            **dict.fromkeys(_GLOBAL_POOLS, lambda node, x: x.averaged(x.axis)),
            **dict.fromkeys(RESHAPES, _flatten),
        }

    def of(self, node: fx.Node, known: dict[fx.Node, Known]) -> Known:
        """Its moments, or why they are not known."""
        if node.op in ("placeholder", "output", "get_attr"):
            return f"nothing is known of {node.name}, an input" if node.op == "placeholder" else _unknown(node, None)
        if node.op == "call_function" and is_layer(self._program, node):
            return _of_layer(node)
        if node.target in (*_SUMS, *_PRODUCTS):
            if self._is_widened(node):
                return f"{node.name} gives its input more axes, of which another may be the channels'"
            return self._sum(node, known) if node.target in _SUMS else self._multiple(node, known)
        if node.target is aten.cat.default:
            return _concatenated(node, [known[part] for part in input_slots(node)])
        source = node.args[0] if node.args else None
        x = known.get(source, _unknown(node, None)) if isinstance(source, fx.Node) else _unknown(node, None)
        if isinstance(x, str) or self._passes_on(node):
            return x
        return self._rules.get(node.target, _unknown)(node, x)

    def _passes_on(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self._program.submodule(node), (FakeQuant, _DropoutNd))

    def _sum(self, node: fx.Node, known: dict[fx.Node, Known]) -> Known:
        """Of a sum of two values, or of a value and a constant, each with its factor."""
        total: Known = _unknown(node, None)
        for operand, factor in sorted(_addends(node), key=lambda addend: self._is_fixed(addend[0])):
            if isinstance(operand, fx.Node) and not self._is_fixed(operand):
                total = _added(node, total, known[operand], factor)
            elif isinstance(total, Moments):
                constant = self._constant(operand, node, total)
                total = constant if isinstance(constant, str) else total.shifted(factor * constant)
        return total

    def _multiple(self, node: fx.Node, known: dict[fx.Node, Known]) -> Known:
        value, factor = node.args[:2]
        if node.target is aten.mul.Tensor and self._is_fixed(value):
            value, factor = factor, value
        if not isinstance(value, fx.Node) or self._is_fixed(value):
            return _unknown(node, None)
        x, other = known[value], known[factor] if isinstance(factor, fx.Node) else None
        if isinstance(x, str):
            return x
        if not self._is_fixed(factor):
            return other if isinstance(other, str) else f"{node.name} multiplies or divides two values: {_NO_PRODUCT}"
        constant = self._constant(factor, node, x)
        if isinstance(constant, str):
            return constant
        return x.scaled(constant if node.target is aten.mul.Tensor else 1 / constant)

    def _is_fixed(self, operand: Any) -> bool:
        return not isinstance(operand, fx.Node) or self._constants.is_constant(operand)

    def _is_widened(self, node: fx.Node) -> bool:
        """Whether broadcasting counts the axes of a value from elsewhere than its own front."""
        values = [operand for operand in node.args[:2] if not self._is_fixed(operand)]
        types = [value_type(value) for value in (node, *values) if isinstance(value, fx.Node)]
        return len({len(found.shape) for found in types if found is not None}) > 1

    def _constant(self, value: Any, node: fx.Node, x: Moments) -> torch.Tensor | str:
        """A number, or one for each channel, as a tensor of shape () or (channels,)."""
        if not isinstance(value, fx.Node):
            return torch.tensor(float(value), dtype=torch.float64)
        tensor, found = self._constants.tensor(value).double(), value_type(node)
        if tensor.numel() == 1:
            return tensor.reshape(())
        channels = len(x.mean)
        rank = 0 if found is None else len(found.shape)
        lies_on_axis = tensor.numel() == channels and x.axis - (rank - tensor.ndim) >= 0
        if lies_on_axis and tensor.shape[x.axis - (rank - tensor.ndim)] == channels:
            return tensor.reshape(channels)
        return f"{node.name} combines its input with {value.name}, which is not one number for each channel"


def _unknown(node: fx.Node, x: Moments | None) -> Known:
    return f"nothing is known of the mean behind {node.name} ({node.target})"


def _of_layer(node: fx.Node) -> Known:
    statistics, found = statistics_of(node), value_type(node)
    if statistics is None or found is None:
        return f"no batch norm was folded into {node.name}, which would say what it gives"
    mean, std = statistics.tensors()
    axis = 1 if node.target in CONVOLUTIONS else len(found.shape) - 1
    return Moments.of(mean, axis, Source(std, frozenset((node,)), is_normal=True))


def _named(node: fx.Node, found: Known) -> Known:
    return found.format(node.name) if isinstance(found, str) else found


def _clip(node: fx.Node, x: Moments) -> Known:
    bounds = activation_bounds(node)
    return f"the bounds of {node.name} are computed" if bounds is None else _named(node, x.clipped(*bounds))


def _leaky(node: fx.Node, x: Moments) -> Known:
    slope = float(bind(node)["negative_slope"])
    return _named(node, x.activated(lambda mean, std: leaky(mean, std, slope)))


def _smooth(node: fx.Node, x: Moments) -> Known:
    called: Any = node.target
    integral = partial(integrated, function=lambda at: called(at, *node.args[1:], **node.kwargs))
    return _named(node, x.activated(integral))


def _addends(node: fx.Node) -> list[tuple[Any, float]]:
    """The two operands of a sum or difference, each with its factor."""
    left, right = node.args[:2]
    alpha = float(bind(node).get("alpha", 1))
    if node.target in (aten.rsub.Tensor, aten.rsub.Scalar):
        return [(left, -alpha), (right, 1.0)]
    return [(left, 1.0), (right, alpha if node.target is aten.add.Tensor else -alpha)]


def _added(node: fx.Node, total: Known, x: Known, factor: float) -> Known:
    """`total`, where it is known, and factor * x."""
    if isinstance(x, str) or isinstance(total, str):
        return x if isinstance(x, str) else x.scaled(factor)
    if total.axis != x.axis or total.mean.shape != x.mean.shape:
        return f"{node.name} adds values of different channels"
    return total.plus(x.scaled(factor))


def _concatenated(node: fx.Node, parts: list[Known]) -> Known:
    unknown = next((part for part in parts if isinstance(part, str)), None)
    found, known = value_type(node), [part for part in parts if isinstance(part, Moments)]
    if unknown is not None or found is None or not known:
        return unknown or _unknown(node, None)
    axis = int(bind(node).get("dim", 0)) % len(found.shape)
    if {part.axis for part in known} != {axis}:
        return f"{node.name} does not concatenate channels"
    return joined(known)


def _pool(node: fx.Node, x: Moments) -> Known:
    bound = bind(node)
    pads = bool(torch.tensor(bound.get("padding") or 0).any())
    if pads or bound.get("divisor_override") is not None:
        return f"{node.name} averages with padding, or with a divisor of its own"
    return x.averaged(x.axis)


def _mean(node: fx.Node, x: Moments) -> Known:
    bound, before = bind(node), value_type(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    if before is None or not bound.get("dim"):
        return _unknown(node, x)
    axes = [axis % len(before.shape) for axis in bound["dim"]]
    if x.axis in axes:
        return f"{node.name} averages over channels"
    kept = bool(bound.get("keepdim"))
    return x.averaged(x.axis if kept else x.axis - sum(axis < x.axis for axis in axes))


def _flatten(node: fx.Node, x: Moments) -> Known:
    before, behind = value_type(node.args[0]) if isinstance(node.args[0], fx.Node) else None, value_type(node)
    if before is None or behind is None or x.axis != 1 or before.shape[:1] != behind.shape[:1]:
        return f"{node.name} may mix channels: it reshapes {before} to {behind}"
    if before.shape[1:2] == behind.shape[1:2]:
        return x
    sizes = [size for size in before.shape[2:] if isinstance(size, int)]
    times = prod(sizes)
    if len(sizes) != len(before.shape) - 2 or behind.shape[1:] != (len(x.mean) * times,):
        return f"{node.name} may mix channels: it reshapes {before} to {behind}"
    return x.repeated(times)
