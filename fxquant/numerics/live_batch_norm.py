"""Batch norm that stays live behind a layer, while the layer simulates its fold.

    r = gamma / sqrt(running_var + eps)              computed in float64, rounded once; so is the bias

    eval     weight = W * r      bias = beta + (b - running_mean) * r      y = layer(x)
    train    weight = W * r'     bias = b * r'                             y = BN(layer(x) / r')

eval is the folded layer, exactly as it is finalized: both ask the same operators. train normalises by its batch's own
statistics; there r' is r with |gamma| >= 1/32, so that a gamma of 0 stays finite and its channel keeps the codes by
which it is trained. BN undoes any scale, so r' takes no gradient: gamma and beta have theirs from BN, and in eval mode
from the fold. numerics/batch_statistics.py computes BN(z / r') without dividing z.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fxquant.numerics.batch_statistics import BatchStatistics, batch_statistics, normalise, statistics_of_peers
from fxquant.numerics.peers import Peers
from fxquant.numerics.recomputing import FirstForwards, is_recomputing

SMALLEST_GAMMA = 2.0**-5  # in r' alone: of a channel's 127 codes it leaves 4 where one scale serves all channels


def along_channels(values: torch.Tensor, weight: torch.Tensor, axis: int, groups: int) -> torch.Tensor:
    """`values` (channels,) shaped to multiply a weight along `axis`, of which axis 1 holds the channels of one group
    only.

    Row r of axis 0 belongs to group r // (rows / groups), so along axis 1 the result has shape (rows, channels /
    groups, 1, ...).
    """
    ones = (1,) * (weight.ndim - 2)
    if axis == 0:
        return values.view(-1, 1, *ones)
    rows = values.view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    return rows.view(*rows.shape, *ones)


def batch_norm_ratio(gamma: torch.Tensor | None, var: torch.Tensor, eps: float) -> torch.Tensor:
    """r, of shape (channels,) and the variance's dtype; gamma None stands for 1."""
    deviation = (var.double() + eps).sqrt()
    ratio = torch.ones_like(deviation) if gamma is None else gamma.double()
    return (ratio / deviation).to(var.dtype)


def batch_norm_shift(
    bias: torch.Tensor | None, beta: torch.Tensor | None, mean: torch.Tensor, ratio: torch.Tensor
) -> torch.Tensor:
    """The folded bias, of shape (channels,) and the ratio's dtype; bias and beta None stand for 0."""
    centred = -mean.double() if bias is None else bias.double() - mean.double()
    shift = centred * ratio.double()
    return (shift if beta is None else beta.double() + shift).to(ratio.dtype)


def scale_channels(weight: torch.Tensor, ratio: torch.Tensor, axis: int, groups: int) -> torch.Tensor:
    """The folded weight, in the dtype of the old one: each output channel, along `axis`, times its ratio."""
    return (weight * along_channels(ratio, weight, axis, groups)).to(weight.dtype)


_library: Any = torch.library  # it has no annotations
_LIBRARY = _library.Library("fxquant", "FRAGMENT")  # kept alive here: the operators live as long as it
for _schema, _function in (
    ("batch_norm_ratio(Tensor? gamma, Tensor var, float eps) -> Tensor", batch_norm_ratio),
    ("batch_norm_shift(Tensor? bias, Tensor? beta, Tensor mean, Tensor ratio) -> Tensor", batch_norm_shift),
    ("scale_channels(Tensor weight, Tensor ratio, int axis, int groups) -> Tensor", scale_channels),
):
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_function.__name__, _function, "CompositeImplicitAutograd")

BATCH_NORM_RATIO = torch.ops.fxquant.batch_norm_ratio.default
BATCH_NORM_SHIFT = torch.ops.fxquant.batch_norm_shift.default
SCALE_CHANNELS = torch.ops.fxquant.scale_channels.default


class ConstantModule(nn.Module):
    """A module that, outside training, computes a value from its arguments alone: of constants, a constant."""

    @abstractmethod
    def at_rest(self, *args: Any) -> torch.Tensor:
        """What it computes in eval mode, whatever mode it is in."""

    @abstractmethod
    def at_work(self, *args: Any) -> torch.Tensor:
        """What it computes in training mode, whatever mode it is in."""


class BatchNormRatio(ConstantModule):
    """r, and r' in training mode."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self._firsts: FirstForwards[torch.Tensor] = FirstForwards()  # r' of each: they move the variance

    def at_rest(self, *args: Any) -> torch.Tensor:
        """r of (gamma, variance)."""
        ratio: torch.Tensor = BATCH_NORM_RATIO(*args, self.eps)
        return ratio

    def at_work(self, *args: Any) -> torch.Tensor:
        """r' of (gamma, variance)."""
        gamma, var = args
        if gamma is not None:
            gamma = gamma.detach()  # first: what autograd saves here, a recomputation would lack
            gamma = torch.where(gamma < 0, gamma.clamp(max=-SMALLEST_GAMMA), gamma.clamp(min=SMALLEST_GAMMA))
        return self.at_rest(gamma, var)

    def forward(self, gamma: torch.Tensor | None, var: torch.Tensor) -> torch.Tensor:
        """r or r', by mode."""
        if not self.training:
            return self.at_rest(gamma, var)
        if is_recomputing():
            return self._firsts.of_this()
        ratio = self.at_work(gamma, var)
        if not torch.compiler.is_compiling():
            self._firsts.keep(ratio)
        return ratio

    def extra_repr(self) -> str:
        """eps, for printing."""
        return f"eps={self.eps:g}"


class BatchNormShift(ConstantModule):
    """The folded bias; in training mode the layer's own, times r'."""

    def at_rest(self, *args: Any) -> torch.Tensor:
        """The folded bias of (bias, beta, mean, ratio)."""
        shift: torch.Tensor = BATCH_NORM_SHIFT(*args)
        return shift

    def at_work(self, *args: Any) -> torch.Tensor:
        """The layer's own bias, times the ratio, of (bias, beta, mean, ratio)."""
        bias, _, _, ratio = args
        made: torch.Tensor = torch.zeros_like(ratio) if bias is None else (bias * ratio).to(ratio.dtype)
        return made

    def forward(
        self, bias: torch.Tensor | None, beta: torch.Tensor | None, mean: torch.Tensor, ratio: torch.Tensor
    ) -> torch.Tensor:
        """The bias, by mode."""
        return (self.at_work if self.training else self.at_rest)(bias, beta, mean, ratio)


class BatchStatisticsNorm(nn.modules.batchnorm._BatchNorm):
    """Base of the batch norms that compute BN(input / ratio) as batch_statistics.py does, and with all peers."""

    peers: Peers | None = None

    def _normalised(self, rows: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        """`rows` (N, C, ...) / `ratio`, normalised by the batch, which moves the running statistics."""
        if self.peers is None and rows.numel() == 0:
            return functional.batch_norm(rows, None, None, self.weight, self.bias, training=True)
        statistics = batch_statistics(rows) if self.peers is None else statistics_of_peers(rows, self.peers)
        if statistics.count < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {rows.shape}")
        if not is_recomputing():  # checkpointing's second forward is of the same batch
            self._keep(statistics, ratio)
        return normalise(rows, statistics, ratio, self.weight, self.bias, self.eps, self.peers)

    @torch.no_grad()
    def _keep(self, statistics: BatchStatistics, ratio: torch.Tensor) -> None:
        """Move the running statistics towards a batch's of input / ratio (its unbiased variance)."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.running_mean is None or self.running_var is None:
            return
        mean = statistics.mean / ratio
        var = statistics.var / ratio.square() * (statistics.count / (statistics.count - 1))
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.lerp_(new.to(running.dtype), self._share(running.dtype))

    def _share(self, dtype: torch.dtype) -> float | torch.Tensor:
        """Of the newest batch in the running statistics; momentum None: all batches count the same."""
        if self.momentum is not None or self.num_batches_tracked is None:
            return self.momentum or 0.0
        return self.num_batches_tracked.to(dtype).reciprocal()


class LiveBatchNorm(BatchStatisticsNorm):
    """The batch norm behind a layer that simulates its fold: in eval mode, nothing.

    It holds the batch norm's tensors under their own names; `ratio` and `shift` have its mode and none.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.ratio = BatchNormRatio(eps)
        self.shift = BatchNormShift()

    @classmethod
    def of(cls, norm: nn.modules.batchnorm._BatchNorm) -> LiveBatchNorm:
        """A twin of `norm`, in its mode, that shares its tensors."""
        twin = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        twin._parameters = dict(norm._parameters)
        twin._buffers = dict(norm._buffers)
        twin._non_persistent_buffers_set = set(norm._non_persistent_buffers_set)
        return twin.train(norm.training)

    def forward(  # type: ignore[override]  # it is told what to undo
        self, input: torch.Tensor, ratio: torch.Tensor, channels_last: bool = False
    ) -> torch.Tensor:
        """Normalise `input` / `ratio` in training mode; channels on axis 1, or on the last one."""
        if not self.training:
            return input
        rows = input.flatten(0, -2) if channels_last else input
        out = self._normalised(rows, ratio)
        return out.view(input.shape) if channels_last else out

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Any rank: capture saw it pass the model's own check."""
