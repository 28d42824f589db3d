"""The ranges of channels along a chain of layers, and the factors that make them equal.

    r1_i = range of W1 over output channel i        r2_i = range of W2 over input channel i
    pair                 s_i = sqrt(r1_i / r2_i)                        r1_i / s_i = r2_i s_i = sqrt(r1_i r2_i)
    depthwise between    c_i = (r1_i r2_i ... rn_i)^(1/n)
                         S_j = r1_i ... rj_i / c_i^j                    every range of channel i becomes c_i

Nagel et al. 2019 (arXiv:1906.04721), equation 11; the depthwise form brings all ranges of a channel to their geometric
mean. A layer that is both a second and a first makes one link's factors depend on the next one's, so sweeps are
repeated until they no longer move. What a sweep needs of a weight are the largest and the lowest number of each
(output, input) pair of channels: the weights themselves are multiplied once, at the end, in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from fxquant.graph.program import Program

from .chains import Link, find_links
from .layers import Layer


@dataclass(frozen=True)
class RangeRatio:
    """How unequal the channel ranges of a pair of layers are, over its live channels; 1 is equal.

    Arguments:
        pair: largest ratio between the two ranges of one channel: what equalization brings to 1.
        widest_to_narrowest: largest ratio between two channels' ranges in one of the two weights: what one scale for
            all of a weight has to cover.
        dead: channels that one of the weights has nothing but zeros for.
    """

    pair: float
    widest_to_narrowest: float
    dead: int

    @classmethod
    def of(cls, first: torch.Tensor, second: torch.Tensor) -> RangeRatio:
        """From the ranges of the first layer's output channels and the second's input channels."""
        live = _is_live(first) & _is_live(second)
        if not bool(live.any()):
            return cls(1.0, 1.0, len(live))
        one, other = first[live], second[live]
        pair = torch.maximum(one / other, other / one).max()
        widths = torch.stack([one.max() / one.min(), other.max() / other.min()]).max()
        return cls(float(pair), float(widths), int((~live).sum()))


def range_ratios(program: Program, *, symmetric: bool = True) -> dict[str, RangeRatio]:
    """By name ("conv1 -> conv2"), how unequal the ranges of each pair are that could be equalised."""
    links = find_links(program)
    extents = extents_of(program, links, symmetric)
    return {link.name: RangeRatio.of(*link_ranges(link, extents)) for link in links}


def range_ratio(program: Program, *, symmetric: bool = True) -> float:
    """The largest ratio between the two ranges of one channel, over all pairs that could be equalised; 1 where each
    pair is equal, or there is none.
    """
    return max((found.pair for found in range_ratios(program, symmetric=symmetric).values()), default=1.0)


@dataclass(eq=False)
class Extents:
    """The largest number (at least 0) and the lowest (at most 0) of each pair of channels of a weight, float64 of shape
    (groups, outputs of a group, inputs of a group).
    """

    high: torch.Tensor
    low: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, layer: Layer, symmetric: bool) -> Extents:
        """symmetric: of the magnitudes, so that a range is twice the largest of them."""
        groups = layer.layout.groups
        taps = weight.detach().double().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        taps = taps.transpose(1, 2) if layer.layout.transposed else taps
        high = (taps.abs() if symmetric else taps).amax(3).clamp(min=0.0)
        return cls(high, -high if symmetric else taps.amin(3).clamp(max=0.0))

    def output_ranges(self) -> torch.Tensor:
        """The range of each output channel."""
        return (self.high.amax(2) - self.low.amin(2)).flatten()

    def input_ranges(self, channels: torch.Tensor) -> torch.Tensor:
        """The range of each channel of the layer in front, of which the inputs are `channels`."""
        zeros = self.high.new_zeros(int(channels.max()) + 1)
        high = zeros.scatter_reduce(0, channels, self.high.amax(1).flatten(), "amax")
        return high - zeros.scatter_reduce(0, channels, self.low.amin(1).flatten(), "amin")

    def scale_outputs(self, factors: torch.Tensor) -> None:
        """Multiply the numbers of each output channel."""
        shaped = factors.view(self.high.shape[0], -1, 1)
        self.high, self.low = self.high * shaped, self.low * shaped

    def scale_inputs(self, factors: torch.Tensor) -> None:
        """Multiply the numbers of each input channel."""
        shaped = factors.view(self.high.shape[0], 1, -1)
        self.high, self.low = self.high * shaped, self.low * shaped

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel reads one input channel of its own."""
        return self.high.shape[1:] == (1, 1)


def extents_of(program: Program, links: Iterable[Link], symmetric: bool) -> dict[fx.Node, Extents]:
    """By layer, the extents of its weight."""
    layers = {layer.node: layer for link in links for layer in (link.first, link.second)}
    return {node: Extents.of(program.tensor(layer.weight), layer, symmetric) for node, layer in layers.items()}


def link_ranges(link: Link, extents: Mapping[fx.Node, Extents]) -> tuple[torch.Tensor, torch.Tensor]:
    """The ranges of the first layer's output channels and of the second's input channels."""
    return extents[link.first.node].output_ranges(), extents[link.second.node].input_ranges(link.channels)


@dataclass(frozen=True, eq=False)
class Factors:
    """What a chain's equalization found.

    Arguments:
        of: by link, s of each channel (float64): the first layer's outputs are divided by it, the second's inputs
            multiplied.
        sweeps: how many it took.
        left: log2 of the largest factor of the last sweep.
    """

    of: dict[Link, torch.Tensor]
    sweeps: int
    left: float


def equalise(
    chain: list[Link], extents: Mapping[fx.Node, Extents], iterations: int, tolerance: float, limit: float
) -> Factors:
    """Sweep over a chain until no factor moves by more than 2^tolerance; `extents` are left equalised.

    limit: log2 of the largest and the smallest factor of a channel.
    """
    totals = {link: torch.zeros(len(extents[link.first.node].output_ranges())).double() for link in chain}
    left, sweeps = torch.inf, 0
    while left > tolerance and sweeps < iterations:
        left, sweeps = 0.0, sweeps + 1
        for run in runs_of(chain, extents):
            for link, step in zip(run, _steps(run, extents), strict=True):
                moved = (totals[link] + step).clamp(-limit, limit) - totals[link]
                totals[link] = totals[link] + moved
                extents[link.first.node].scale_outputs(torch.exp2(-moved))
                extents[link.second.node].scale_inputs(torch.exp2(moved)[link.channels])
                left = max(left, float(moved.abs().max()))
    return Factors({link: torch.exp2(total) for link, total in totals.items()}, sweeps, left)


def runs_of(chain: list[Link], extents: Mapping[fx.Node, Extents]) -> list[list[Link]]:
    """A chain's links, those together that have only depthwise layers between them."""
    runs: list[list[Link]] = []
    for link in chain:
        last = runs[-1][-1] if runs else None
        joins = last is not None and last.is_plain and extents[link.first.node].is_depthwise
        if joins:
            runs[-1].append(link)
        else:
            runs.append([link])
    return runs


def _steps(run: list[Link], extents: Mapping[fx.Node, Extents]) -> list[torch.Tensor]:
    """log2 of S_1, S_2 ... of a run; 0 beside a layer that a channel is dead in or not finite, which ends the run for
    that channel: what lies on either side of it is equalised by itself.
    """
    ranges = [extents[link.first.node].output_ranges() for link in run]
    ranges.append(link_ranges(run[-1], extents)[1])
    live = [_is_live(found) for found in ranges]
    logs = [torch.where(alive, found, 1.0).log2() for found, alive in zip(ranges, live, strict=True)]
    means = _means_of_stretches(logs, live)
    steps, total = [], torch.zeros_like(logs[0])
    for index in range(len(run)):
        total = torch.where(live[index] & live[index + 1], total + logs[index] - means[index], 0.0)
        steps.append(total)
    return steps


def _means_of_stretches(logs: list[torch.Tensor], live: list[torch.Tensor]) -> list[torch.Tensor]:
    """For each layer, channel by channel, the mean over the unbroken row of live layers that it stands in."""
    total, count = torch.zeros_like(logs[0]), torch.zeros_like(logs[0])
    found = []
    for log, alive in zip(logs, live, strict=True):
        total, count = torch.where(alive, total + log, 0.0), torch.where(alive, count + 1, 0.0)
        found.append(total / count.clamp(min=1.0))  # so far
    for index in reversed(range(len(found) - 1)):
        found[index] = torch.where(live[index] & live[index + 1], found[index + 1], found[index])
    return found


def _is_live(ranges: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(ranges) & (ranges > 0.0)
