"""Move outliers of linear layers' inputs into their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.errors import ConfigError, PassError
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Note, NoteKind, Program, Stage, describe
from fxquant.graph.rewriter import Rewriter
from fxquant.graph.segment import values_of
from fxquant.graph.statistics import ChannelStatistics, statistics_of
from fxquant.progress import track

from .fold_batch_norm import shared_tensors
from .smoothing import Absorber, Group, absorber_of, groups_of, why_fixed

aten = torch.ops.aten
_LARGEST = 1e5  # factors beyond it, or below its inverse, belong to channels that are all but dead
_NEGLIGIBLE = 1e-4  # factors that differ from 1 by less are rounding


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Divide the input channels of linear layers by s and multiply the weights by it, so that neither has outliers
    (Xiao et al., 2022, arXiv:2211.10438, eq. 4):

        s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)        (X / s) (W s)^T = X W^T

    max|X_j| is taken over the batches and over all readers' inputs, max|W_j| over all readers' weights: layers that
    read one value (q, k and v) share a factor. 1 / s goes into what makes the value:

    1. The weight and bias of a layer norm or RMS norm.
    2. The rows of the weight, and the bias, of a linear layer; relu, leaky relu and reshapes that keep the last axis
       may stand between. Of what is known of its output (fxquant.graph.statistics) the same.
    3. A constant that is multiplied there, as an RMS norm taken apart has its weight.
    4. With `insert_mul`, where none of these is possible, a new multiplication in front of the linear layers. It helps
       where its input stays in float: an integer multiplication quantizes that first, outliers and all.

    Channels that are 0 throughout, or whose factor would exceed 1e5 either way, keep theirs. Values are taken from the
    last to the first, as a linear layer's rows (case 2) are changed before its columns are looked at: so a second run
    finds nothing to do. Declines, with the reason: something else reads the value, too (the residual of a post-norm
    block); nothing in front can absorb the factors; a tensor is shared, tied, computed or read twice.

    Belongs in front of assign-specs, behind decompose-attention and fold-batch-norm. Memory: one batch at a time.
    Contract: PRESERVES.

    Arguments:
        alpha: how much of the difficulty moves into the weights, 0 to 1.
        insert_mul: case 4.
    """

    alpha: float = 0.5
    insert_mul: bool = False

    name: ClassVar[str] = "smooth-quant"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError("smooth-quant: alpha", expected="0 to 1", got=str(self.alpha))

    @property
    def needs_data(self) -> bool:
        """It measures the inputs of layers."""
        return True

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Measure all values in one pass over the data, then smooth from the last to the first."""
        groups = [group for group in groups_of(program) if group.readers]
        smoother = _Smoother(program, rewriter, shared_tensors(program), self)
        possible = [group for group in groups if smoother.may_smooth(group)]
        if not possible:
            return
        largest = _largest_inputs(program, rewriter, possible)
        for group in reversed(possible):
            smoother.smooth(group, largest)


def _largest_inputs(program: Program, rewriter: Rewriter, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """max|X_j| (float64) over all batches, of each value that a linear layer reads, by name."""
    names = list(dict.fromkeys(reader.input.name for group in groups for reader in group.readers))
    largest: dict[str, torch.Tensor] = {}
    batches = track(rewriter.data.batches, "smooth-quant: measuring", show=rewriter.data.progress)
    for values in values_of(program, batches, names):
        for name, value in values.items():
            found = value.detach().double().abs().reshape(-1, value.shape[-1])
            if not len(found):
                continue
            found = found.amax(0)
            largest[name] = torch.maximum(largest[name], found) if name in largest else found
    for name in names:
        if name not in largest or not bool(torch.isfinite(largest[name]).all()):
            got = "nothing seen" if name not in largest else "NaN or Inf"
            raise PassError(f"value '{name}'", place=describe(program.node(name)), expected="finite numbers", got=got)
    return largest


@dataclass(frozen=True)
class _Smoother:
    """Smooths values of one program."""

    program: Program
    rewriter: Rewriter
    shared: dict[int, str]  # id of a tensor that others see too -> how
    options: SmoothQuant

    def may_smooth(self, group: Group) -> bool:
        """Whether a value can be smoothed; if not, its readers are near misses."""
        reason = self._why_not(group)
        for reader in group.readers if reason else ():
            self.rewriter.miss(reader.node, f"{reader.node.name} not smoothed: {reason}")
        return not reason

    def _why_not(self, group: Group) -> str:
        for reader in group.readers:
            fixed = why_fixed(self.program, reader.weight, self.shared)
            if fixed:
                return f"weight of {reader.node.name}: {fixed}"
        found = self._absorber(group)
        return found if isinstance(found, str) and not self.options.insert_mul else ""

    def _absorber(self, group: Group) -> Absorber | str:
        if group.others:
            return f"{group.origin.name} is read by {', '.join(group.others)} as well"
        reader = group.readers[0]
        channels = self.program.tensor(reader.weight).shape[reader.axis]
        found = absorber_of(self.program, group.origin, channels)
        if isinstance(found, str):
            return found
        fixed = [reason for one in found.tensors if (reason := why_fixed(self.program, one, self.shared))]
        return f"{group.origin.name} in front cannot absorb it: {fixed[0]}" if fixed else found

    def smooth(self, group: Group, largest: dict[str, torch.Tensor]) -> None:
        """Scale a value's channels and their readers' weights."""
        inputs = torch.stack([largest[reader.input.name] for reader in group.readers]).amax(0)
        weights = [self.program.tensor(one.weight).detach().double().abs().amax(1 - one.axis) for one in group.readers]
        weight = torch.stack(weights).amax(0)
        factors = smoothing_factors(inputs, weight, self.options.alpha)
        if bool(((factors - 1.0).abs() < _NEGLIGIBLE).all()):
            for reader in group.readers:
                self.rewriter.miss(reader.node, f"{reader.node.name} not smoothed: its channels are balanced already")
            return
        absorber = self._absorber(group)
        if isinstance(absorber, str):
            self._insert(group, factors)
        else:
            self._absorb(group, absorber, factors)
        for reader in group.readers:
            along = factors if reader.axis == 1 else factors.unsqueeze(1)
            self._multiply(reader.weight, along)
        text = (
            f"largest input {float(inputs.max()):.3g} -> {float((inputs / factors).max()):.3g}, "
            f"largest weight {float(weight.max()):.3g} -> {float((weight * factors).max()):.3g}"
        )
        self.rewriter.note(Note(NoteKind.OPTIMIZATION, group.origin.name, f"smooth-quant: {text}"))

    def _absorb(self, group: Group, absorber: Absorber, factors: torch.Tensor) -> None:
        """Cases 1 to 3."""
        for tensor in absorber.tensors:
            is_matrix = group.origin.target is aten.linear.default and self.program.tensor(tensor).ndim == 2
            self._multiply(tensor, factors.reciprocal().unsqueeze(1) if is_matrix else factors.reciprocal())
        known = statistics_of(group.origin)
        if known is not None:
            mean, std = known.tensors()
            inverse = factors.reciprocal().cpu()
            self.rewriter.set_statistics(group.origin, ChannelStatistics.of(mean * inverse, std * inverse))

    def _insert(self, group: Group, factors: torch.Tensor) -> None:
        """Case 4: one multiplication for each value that is read."""
        products: dict[fx.Node, fx.Node] = {}
        for reader in group.readers:
            value = reader.input
            if value not in products:
                products[value] = self._product(value, factors, before=reader.node)
            self.rewriter.replace_input(reader.node, value, products[value])

    def _product(self, value: fx.Node, factors: torch.Tensor, before: fx.Node) -> fx.Node:
        path = f"{value.name}_smoothing"
        while hasattr(self.program.module, path):
            path += "_"
        dtype = value.meta["type"].dtype
        self.rewriter.add_tensor(path, factors.reciprocal().to(dtype), parameter=False)
        constant = self.rewriter.get_attr(path, name=path, before=before, like=value)
        args = (value, constant)
        return self.rewriter.call_function(
            aten.mul.Tensor, args, name=f"{value.name}_smooth", before=before, like=value
        )

    def _multiply(self, node: fx.Node, factors: torch.Tensor) -> None:
        tensor = self.program.tensor(node)
        self.rewriter.set_tensor(str(node.target), (tensor.detach().double() * factors).to(tensor.dtype))


def smoothing_factors(inputs: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """s (float64) from max|X_j| and max|W_j|, both float64 of shape (channels,); 1 where no factor makes sense."""
    factors = inputs.pow(alpha) / weight.pow(1.0 - alpha)
    is_sound = (inputs > 0) & (weight > 0) & (factors >= 1.0 / _LARGEST) & (factors <= _LARGEST)
    return torch.where(is_sound, factors, torch.ones_like(factors))
