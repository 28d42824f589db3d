"""What batch norms that were folded say of values further on: mean and deviation of each channel, without data.

A layer's output is taken as normal, of the mean and deviation that its batch norm gave it; activations make of it what
clipped_normal.py says. Behind them

    a + b             means add; deviations too, as those of independent values do, and the sum is taken as normal
    c * x, x + c      with a constant c
    concatenation     of channels
    averages          keep the mean; their deviation is unknown, so that no activation can follow
    flattening        repeats each channel

and a FakeQuant is passed. Of all else, of a maximum, of a product of two values, nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx
from torch.nn.modules.dropout import _DropoutNd

from fxquant.graph.constants import Constants
from fxquant.graph.program import Program, value_type
from fxquant.graph.statistics import statistics_of
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.ops._arguments import bind
from fxquant.ops.activation import activation_bounds

from .clipped_normal import Pair, clipped, integrated, leaky
from .layers import CONVOLUTIONS, RESHAPES
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
_POOLS = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
_GLOBAL_POOLS = (aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean, and deviation where it is known, of each channel of a value; float64 of shape (channels,).

    `axis` is that of the channels, counted from the front.
    """

    mean: torch.Tensor
    std: torch.Tensor | None
    axis: int

    def scaled(self, factor: torch.Tensor | float) -> Moments:
        """Of factor * x."""
        size = abs(factor) if isinstance(factor, float) else factor.abs()
        return Moments(self.mean * factor, None if self.std is None else self.std * size, self.axis)


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
            aten.cat.default: _unknown,
            **dict.fromkeys(_CLIPS, _clip),
            **dict.fromkeys(_SMOOTH, _smooth),
            **dict.fromkeys(_SAME, lambda node, x: x),
            **dict.fromkeys(_POOLS, _pool),
            **dict.fromkeys(_GLOBAL_POOLS, lambda node, x: replace(x, std=None)),
            **dict.fromkeys(RESHAPES, _flatten),
        }

    def of(self, node: fx.Node, known: dict[fx.Node, Known]) -> Known:
        """Its moments, or why they are not known."""
        if node.op in ("placeholder", "output", "get_attr"):
            return f"nothing is known of {node.name}, an input" if node.op == "placeholder" else _unknown(node, None)
        if node.op == "call_function" and is_layer(self._program, node):
            return _of_layer(node)
        if node.target in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
            return self._arithmetic(node, known)
        if node.target is aten.cat.default:
            return _concatenated(node, [known[part] for part in node.all_input_nodes])
        source = node.args[0] if node.args else None
        x = known.get(source, _unknown(node, None)) if isinstance(source, fx.Node) else _unknown(node, None)
        if isinstance(x, str) or self._passes_on(node):
            return x
        return self._rules.get(node.target, _unknown)(node, x)

    def _passes_on(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self._program.submodule(node), (FakeQuant, _DropoutNd))

    def _arithmetic(self, node: fx.Node, known: dict[fx.Node, Known]) -> Known:
        left, right = node.args[:2]
        if isinstance(left, fx.Node) and isinstance(right, fx.Node):
            constants = self._constants.is_constant(left), self._constants.is_constant(right)
            if not any(constants):
                return _of_two(node, known[left], known[right])
            if constants[0] and node.target in (aten.add.Tensor, aten.mul.Tensor):
                left, right = right, left
        if not isinstance(left, fx.Node):
            return _unknown(node, None)
        x = known[left]
        if isinstance(x, str):
            return x
        constant = self._constant(right, node, x)
        return constant if isinstance(constant, str) else _with_constant(node, x, constant)

    def _constant(self, value: Any, node: fx.Node, x: Moments) -> torch.Tensor | str:
        """A number, or one for each channel, as a tensor of shape () or (channels,)."""
        if not isinstance(value, fx.Node):
            return torch.tensor(float(value), dtype=torch.float64)
        if not self._constants.is_constant(value):
            return f"{value.name}, which {node.name} reads, is computed"
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
    return Moments(mean, std, 1 if node.target in CONVOLUTIONS else len(found.shape) - 1)


def _normal(node: fx.Node, x: Moments, function: Callable[[torch.Tensor, torch.Tensor], Pair]) -> Known:
    if x.std is None:
        return f"the deviation of what {node.name} reads is not known"
    mean, std = function(x.mean, x.std)
    return Moments(mean, std, x.axis)


def _clip(node: fx.Node, x: Moments) -> Known:
    bounds = activation_bounds(node)
    if bounds is None:
        return f"the bounds of {node.name} are computed"
    return _normal(node, x, lambda mean, std: clipped(mean, std, *bounds))


def _leaky(node: fx.Node, x: Moments) -> Known:
    slope = float(bind(node)["negative_slope"])
    return _normal(node, x, lambda mean, std: leaky(mean, std, slope))


def _smooth(node: fx.Node, x: Moments) -> Known:
    called: Any = node.target
    return _normal(
        node, x, lambda mean, std: integrated(mean, std, lambda at: called(at, *node.args[1:], **node.kwargs))
    )


def _of_two(node: fx.Node, left: Known, right: Known) -> Known:
    if isinstance(left, str) or isinstance(right, str):
        return left if isinstance(left, str) else str(right)
    if node.target not in (aten.add.Tensor, aten.sub.Tensor):
        return f"{node.name} multiplies two values: the mean of a product is not the product of means"
    if left.axis != right.axis or left.mean.shape != right.mean.shape:
        return f"{node.name} adds values of different channels"
    right = right.scaled(float(bind(node).get("alpha", 1)) * (1.0 if node.target is aten.add.Tensor else -1.0))
    is_spread = left.std is not None and right.std is not None
    std = torch.hypot(left.std, right.std) if is_spread else None  # type: ignore[arg-type]  # both are there
    return Moments(left.mean + right.mean, std, left.axis)


def _with_constant(node: fx.Node, x: Moments, constant: torch.Tensor) -> Known:
    if node.target is aten.mul.Tensor:
        return x.scaled(constant)
    if node.target is aten.div.Tensor:
        return x.scaled(1 / constant)
    shift = constant * float(bind(node).get("alpha", 1))
    return replace(x, mean=x.mean + shift if node.target is aten.add.Tensor else x.mean - shift)


def _concatenated(node: fx.Node, parts: list[Known]) -> Known:
    unknown = next((part for part in parts if isinstance(part, str)), None)
    found, known = value_type(node), [part for part in parts if isinstance(part, Moments)]
    if unknown is not None or found is None or not known:
        return unknown or _unknown(node, None)
    axis = int(bind(node).get("dim", 0)) % len(found.shape)
    if {part.axis for part in known} != {axis}:
        return f"{node.name} does not concatenate channels"
    stds = [part.std for part in known if part.std is not None]
    std = torch.cat(stds) if len(stds) == len(known) else None
    return Moments(torch.cat([part.mean for part in known]), std, axis)


def _pool(node: fx.Node, x: Moments) -> Known:
    bound = bind(node)
    pads = bool(torch.tensor(bound.get("padding") or 0).any())
    if pads or bound.get("divisor_override") is not None:
        return f"{node.name} averages with padding, or with a divisor of its own"
    return replace(x, std=None)


def _mean(node: fx.Node, x: Moments) -> Known:
    bound, before = bind(node), value_type(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    if before is None or not bound.get("dim"):
        return _unknown(node, x)
    axes = [axis % len(before.shape) for axis in bound["dim"]]
    if x.axis in axes:
        return f"{node.name} averages over channels"
    kept = bool(bound.get("keepdim"))
    return Moments(x.mean, None, x.axis if kept else x.axis - sum(axis < x.axis for axis in axes))


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
    std = None if x.std is None else x.std.repeat_interleave(times)
    return Moments(x.mean.repeat_interleave(times), std, 1)
