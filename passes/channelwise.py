"""The algebra of a channel-wise affine map, a * x + d, next to a layer with a weight (float64 inside, rounded once at
the end).

    batch norm          a = gamma / sqrt(var + eps)            d = beta - mean * a
    behind a layer      a (W x + b) + d  =  (a W) x + (a b + d)          a along W's output channels
    before a layer      W (a x + d) + b  =  (W a) x + (b + sum W d)      a along W's input channels, the sum over them
                                                                         and over the kernel

The last line needs every tap of the kernel to read a * x + d: zero padding, and the borders of a transposed
convolution, leave some out, and it then holds only where d = 0. Weights are laid out as torch does: (out, in / groups,
*kernel), or (in, out / groups, *kernel) if transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxquant.numerics.live_batch_norm import along_channels


@dataclass(frozen=True, eq=False)
class Affine:
    """x -> scale * x + shift for each channel; both float64, of shape (channels,)."""

    scale: torch.Tensor
    shift: torch.Tensor

    def repeated(self, times: int) -> Affine:
        """The same map for features of which `times` in a row belong to one channel, as flattening lays them out."""
        return Affine(self.scale.repeat_interleave(times), self.shift.repeat_interleave(times))


@dataclass(frozen=True)
class WeightLayout:
    """Where a weight has its channels; a linear's is the default."""

    transposed: bool = False
    groups: int = 1


def batch_norm_affine(
    gamma: torch.Tensor | None, beta: torch.Tensor | None, mean: torch.Tensor, var: torch.Tensor, eps: float
) -> Affine:
    """What a batch norm does in eval mode; all of shape (channels,), gamma and beta None where affine=False."""
    scale = (var.detach().double() + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.detach().double()
    shift = -mean.detach().double() * scale
    return Affine(scale, shift if beta is None else shift + beta.detach().double())


def fold_behind(
    weight: torch.Tensor, bias: torch.Tensor | None, affine: Affine, layout: WeightLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the layer that computes affine(layer(x)), in the dtypes of the old ones (bias None: the
    weight's)."""
    factor = along_channels(affine.scale, weight, 1 if layout.transposed else 0, layout.groups)
    folded = affine.shift if bias is None else affine.scale * bias.detach().double() + affine.shift
    return (weight.detach().double() * factor).to(weight.dtype), folded.to(weight.dtype if bias is None else bias.dtype)


def fold_before(
    weight: torch.Tensor, bias: torch.Tensor | None, affine: Affine, layout: WeightLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the layer that computes layer(affine(x)); a transposed one needs shift = 0, as padding
    does."""
    wide, axis = weight.detach().double(), 0 if layout.transposed else 1
    outputs = weight.shape[1] * layout.groups if layout.transposed else weight.shape[0]
    if layout.transposed:
        assert not bool(affine.shift.any()), "the borders of a transposed convolution do not see the shift"
        moved = wide.new_zeros(outputs)
    else:
        moved = (wide * along_channels(affine.shift, weight, axis, layout.groups)).flatten(1).sum(1)
    folded = moved if bias is None else bias.detach().double() + moved
    new_weight = (wide * along_channels(affine.scale, weight, axis, layout.groups)).to(weight.dtype)
    return new_weight, folded.to(weight.dtype if bias is None else bias.dtype)
