"""Move what a layer's channels always exceed behind the relu, into the next layer's bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fxquant.errors import PassError
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Note, NoteKind, Program, Stage
from fxquant.graph.rewriter import Rewriter
from fxquant.graph.statistics import ChannelStatistics, statistics_of

from .channelwise import Affine, fold_before
from .fold_batch_norm import add_bias, shared_tensors, why_fixed
from .layers import Layer, as_layer, layer_ahead, user_list


@dataclass(frozen=True)
class AbsorbHighBias(Pass):
    """Take a = max(0, mean - 3 std) off a layer's bias and give W2 a to the next one's, so that a channel that
    equalization scaled up takes less of the activations' range (Nagel et al. 2019, arXiv:1906.04721, section 4.1.3):

        W2 relu(y) + b2  =  W2 relu(y - a) + (W2 a + b2)        wherever y >= a

    Mean and deviation are those that fold-batch-norm left (fxquant.graph.statistics); of a normal y, 99.87 % is above
    mean - 3 std. Where it is not, the output changes: the contract is CHANGES. Between relu and the next layer may be
    poolings and flattenings, which let a shift pass.

    A convolution that pads with zeros would have to pad with -a: at its borders W2 a counts taps that are not
    there. The paper leaves this out; on small images borders are most of the image, so such a pair is declined
    unless `through_padding` says that it may be wrong there.

    Declines, with the reason: no statistics; no relu, or one with other readers; a next layer that pads or is
    transposed; weights or biases that are tied, read twice or computed.

    Arguments:
        sigmas: how many deviations below the mean a channel is taken never to go.
        through_padding: absorb through zero padding, too, which is wrong at the borders.
    """

    sigmas: float = 3.0
    through_padding: bool = False

    name: ClassVar[str] = "absorb-high-bias"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED, Stage.ASSIGNED)
    contract: ClassVar[Contract] = Contract.CHANGES

    def __post_init__(self) -> None:
        if not self.sigmas >= 0.0:
            raise PassError(f"{self.name}: sigmas", expected="0 or more", got=f"{self.sigmas:g}")

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Visit the layers in graph order: a shift that one gives to the next one's bias leaves its output as it is."""
        shared = shared_tensors(program)
        for node in list(program.graph.nodes):
            layer = as_layer(node)
            if layer is not None:
                reason = self._absorb(program, rewriter, layer, shared)
                if reason is not None:
                    rewriter.miss(node, f"bias of {node.name} not absorbed: {reason}")

    def _absorb(self, program: Program, rewriter: Rewriter, layer: Layer, shared: dict[int, str]) -> str | None:
        known = statistics_of(layer.node)
        if known is None:
            return "nothing is known of its outputs (fold-batch-norm leaves statistics)"
        mean, std = known.tensors()
        shift = (mean - self.sigmas * std).clamp(min=0.0)
        if not bool(shift.any()):
            return None
        found = self._ahead(layer, shift)
        if isinstance(found, str):
            return found
        second, arrived = found
        for owner, operand in ((layer, layer.bias), (second, second.weight), (second, second.bias)):
            reason = None if operand is None else why_fixed(program, owner, operand, shared)
            if reason is not None:
                return reason
        _set_bias(program, rewriter, layer, -shift)
        weight = program.tensor(second.weight).detach().double()
        _, moved = fold_before(weight, None, arrived, second.layout)
        _set_bias(program, rewriter, second, moved)
        rewriter.set_statistics(layer.node, ChannelStatistics.of(mean - shift, std))
        _note(rewriter, layer, second, shift)
        return None

    def _ahead(self, layer: Layer, shift: torch.Tensor) -> tuple[Layer, Affine] | str:
        """The layer that gets the shift, and the shift as it arrives there; else what is in the way."""
        if len(layer.node.users) != 1:
            return user_list(layer.node)
        relu = next(iter(layer.node.users))
        if relu.target is not torch.ops.aten.relu.default:
            return f"{relu.name} behind it is no relu"
        found = layer_ahead(relu, Affine(torch.ones_like(shift), shift))
        if isinstance(found, str) and self.through_padding:
            unshifted = layer_ahead(relu, Affine(torch.ones_like(shift), torch.zeros_like(shift)))
            if not isinstance(unshifted, str) and not unshifted[0].layout.transposed:
                # It pads, so it is a convolution, and no flattening lies before it: its channels are the first's.
                return unshifted[0], Affine(torch.ones_like(shift), shift)
        return found


def _set_bias(program: Program, rewriter: Rewriter, layer: Layer, change: torch.Tensor) -> None:
    if layer.bias is None:
        add_bias(program, rewriter, layer, change.to(program.tensor(layer.weight).dtype))
        return
    old = program.tensor(layer.bias).detach()
    rewriter.set_tensor(str(layer.bias.target), (old.double() + change).to(old.dtype))


def _note(rewriter: Rewriter, first: Layer, second: Layer, shift: torch.Tensor) -> None:
    where = "; inexact at its zero padding" if not second.sees_all else ""
    text = (
        f"bias of {first.node.name} absorbed into {second.node.name}: {int((shift > 0).sum())} of {len(shift)} "
        f"channels, by up to {float(shift.max()):.3g}{where}"
    )
    rewriter.note(Note(NoteKind.OPTIMIZATION, first.node.name, text))
