"""Rescale the channels between layers so that one scale for a whole weight fits all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.errors import PassError
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Note, NoteKind, Program, Stage
from fxquant.graph.rewriter import Rewriter
from fxquant.graph.statistics import ChannelStatistics, statistics_of

from .chains import Link, chains_of, find_links
from .channelwise import Affine, fold_before, fold_behind
from .equalization import Factors, RangeRatio, equalise, extents_of, link_ranges
from .layers import Layer

_UNMOVED = 1e-3  # log2 of factors that are left alone: a second run finds nothing to do


@dataclass(frozen=True)
class CrossLayerEqualization(Pass):
    """Divide each channel of a layer's output by s and multiply the next layer's input by it, so that both weights have
    the same range there (Nagel et al. 2019, arXiv:1906.04721, section 4.1; equalization.py has the equations).

    1. Convolutions (grouped or transposed too) and linears, of any rank, in pairs.
    2. Depthwise convolutions between two layers: all three get one range, (r1 r2 r3)^(1/3).
    3. Through what chains.py's tables name: relu, leaky relu, prelu, poolings, resizing, padding with zeros, dropout,
       clips at 0, permutations, reshapes that keep channels together.
    4. A channel that is dead (all zero) or not finite in one of its layers is left alone.
    5. Biases and the statistics that fold-batch-norm left go with the channels.

    Declines, with the reason: relu6 and other clips (run 'replace-relu6' first, if the outputs may change), sigmoids,
    hard-swish, sums and concatenations; a value with two readers, or that the program returns; weights that are tied,
    read twice or computed; what would not be finite. Useless in front of one weight scale for each channel, but
    harmless. Contract: PRESERVES.

    Arguments:
        iterations: most sweeps over a chain.
        tolerance: log2 of the largest factor of a sweep that is the last one.
        symmetric: a range is that of max |w|; else that of max w - min w, 0 included.
        limit: log2 of the largest factor of a channel; the smallest is its inverse.
    """

    iterations: int = 200
    tolerance: float = 1e-5
    symmetric: bool = True
    limit: float = 20.0

    name: ClassVar[str] = "cross-layer-equalization"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED, Stage.ASSIGNED)
    contract: ClassVar[Contract] = Contract.PRESERVES

    def __post_init__(self) -> None:
        if self.iterations < 1 or not self.tolerance > 0.0 or not 0.0 < self.limit <= 60.0:
            raise PassError(
                self.name,
                expected="iterations >= 1, tolerance > 0, 0 < limit <= 60",
                got=f"{self.iterations}, {self.tolerance:g}, {self.limit:g}",
            )

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Equalise chain by chain, then say by how much."""
        ratios: dict[Link, tuple[RangeRatio, RangeRatio]] = {}
        chains = sweeps = 0
        for chain in chains_of(find_links(program, rewriter)):
            extents = extents_of(program, chain, self.symmetric)
            before = [RangeRatio.of(*link_ranges(link, extents)) for link in chain]
            factors = equalise(chain, extents, self.iterations, self.tolerance, self.limit)
            if all(float(factor.log2().abs().max()) < _UNMOVED for factor in factors.of.values()):
                continue
            reason = _apply(program, rewriter, factors)
            if reason is not None:
                rewriter.miss(chain[0].first.node, reason)
                continue
            after = [RangeRatio.of(*link_ranges(link, extents)) for link in chain]
            ratios.update(zip(chain, zip(before, after, strict=True), strict=True))
            chains, sweeps = chains + 1, max(sweeps, factors.sweeps)
        if ratios:
            _report(rewriter, ratios, chains, sweeps)


def _apply(program: Program, rewriter: Rewriter, factors: Factors) -> str | None:
    """Rescale weights, biases and statistics; the reason if that cannot be done in their dtypes."""
    layers = {layer.node: layer for link in factors.of for layer in (link.first, link.second)}
    outputs = {link.first.node: factor.reciprocal() for link, factor in factors.of.items()}
    inputs = {link.second.node: factor[link.channels] for link, factor in factors.of.items()}
    changed: list[tuple[fx.Node, torch.Tensor]] = []
    for node, layer in layers.items():
        for operand, new in _rescaled(program, layer, inputs.get(node), outputs.get(node)):
            old = program.tensor(operand)
            if not bool(torch.isfinite(new).all()) and bool(torch.isfinite(old).all()):
                return f"{operand.name} would overflow {old.dtype}"
            if bool(((new == 0) & (old != 0)).any()):
                return f"{operand.name} would underflow {old.dtype}"
            changed.append((operand, new))
    for operand, new in changed:
        rewriter.set_tensor(str(operand.target), new)
    for node, factor in outputs.items():
        known = statistics_of(node)
        if known is not None:
            mean, std = known.tensors()
            rewriter.set_statistics(node, ChannelStatistics.of(mean * factor, std * factor))
    return None


def _rescaled(
    program: Program, layer: Layer, inputs: torch.Tensor | None, outputs: torch.Tensor | None
) -> list[tuple[fx.Node, torch.Tensor]]:
    """A layer's weight and bias with its input and output channels multiplied, rounded once."""
    old = program.tensor(layer.weight).detach()
    weight = old.double()
    bias = None if layer.bias is None else program.tensor(layer.bias).detach()
    if inputs is not None:
        weight, _ = fold_before(weight, None, Affine(inputs, torch.zeros_like(inputs)), layer.layout)
    if outputs is None:
        return [(layer.weight, weight.to(old.dtype))]
    weight, new_bias = fold_behind(weight, bias, Affine(outputs, torch.zeros_like(outputs)), layer.layout)
    scaled = [(layer.weight, weight.to(old.dtype))]
    return scaled if layer.bias is None else [*scaled, (layer.bias, new_bias)]


def _report(rewriter: Rewriter, ratios: Mapping[Link, tuple[RangeRatio, RangeRatio]], chains: int, sweeps: int) -> None:
    """A note for each pair, and one for all."""
    for link, (before, after) in ratios.items():
        text = (
            f"channel ranges of {link.name}: largest ratio {before.pair:.3g} -> {after.pair:.3g}, widest to narrowest "
            f"channel {before.widest_to_narrowest:.3g} -> {after.widest_to_narrowest:.3g}"
        )
        dead = f"; {after.dead} dead" if after.dead else ""
        rewriter.note(Note(NoteKind.OPTIMIZATION, link.first.node.name, text + dead))
    worst = [max(pair[side].pair for pair in ratios.values()) for side in (0, 1)]
    widths = [max(pair[side].widest_to_narrowest for pair in ratios.values()) for side in (0, 1)]
    text = (
        f"cross-layer equalization of {len(ratios)} pairs in {chains} chains, at most {sweeps} sweeps: largest ratio "
        f"of a channel's ranges {worst[0]:.3g} -> {worst[1]:.3g}, widest to narrowest channel {widths[0]:.3g} -> "
        f"{widths[1]:.3g}"
    )
    rewriter.note(Note(NoteKind.OPTIMIZATION, "", text))
