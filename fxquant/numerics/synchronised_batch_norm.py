"""Batch norms that a model keeps as modules, normalising by the batches of all peers in training mode.

They are their plain kinds to passes, to lowering and in program files.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxquant.numerics.live_batch_norm import BatchStatisticsNorm
from fxquant.numerics.peers import Peers


class _Synchronised(BatchStatisticsNorm):
    """Without peers (in a pickled copy), and in eval mode, what the plain kind does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise `input`, channels on axis 1."""
        if self.peers is None or not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self._normalised(input, torch.ones(self.num_features, dtype=torch.float32, device=input.device))


class SynchronisedBatchNorm1d(_Synchronised, nn.BatchNorm1d):
    """A BatchNorm1d with peers."""


class SynchronisedBatchNorm2d(_Synchronised, nn.BatchNorm2d):
    """A BatchNorm2d with peers."""


class SynchronisedBatchNorm3d(_Synchronised, nn.BatchNorm3d):
    """A BatchNorm3d with peers."""


_KINDS: dict[type[nn.Module], type[_BatchNorm]] = {
    nn.BatchNorm1d: SynchronisedBatchNorm1d,
    nn.BatchNorm2d: SynchronisedBatchNorm2d,
    nn.BatchNorm3d: SynchronisedBatchNorm3d,
}


def plain_kind(module: nn.Module) -> type[nn.Module]:
    """The class of a module; of a synchronised batch norm, the one that it stands for."""
    return next((plain for plain, kind in _KINDS.items() if type(module) is kind), type(module))


def synchronised(norm: _BatchNorm, peers: Peers) -> _BatchNorm:
    """A twin of a plain batch norm, in its mode, that shares its tensors; a synchronised one gets these peers."""
    twin = norm
    if type(norm) in _KINDS:
        options = (norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        twin = _KINDS[type(norm)](*options)
        twin.__dict__.update(norm.__dict__)
    if isinstance(twin, BatchStatisticsNorm):
        twin.peers = peers
    return twin
