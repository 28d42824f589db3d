"""The pass catalogue, imported as fxquant.passes; one pass a file, listed here by the name that configs use."""

from __future__ import annotations

from fxquant.graph.passes import Pass

from .absorb_activation import AbsorbActivation
from .assign_specs import AssignSpecs
from .convolve_batch_norm import ConvolveBatchNorm
from .decompose_attention import DecomposeAttention
from .decompose_silu import DecomposeSilu
from .expose_global_pool import ExposeGlobalPool
from .fold_batch_norm import FoldBatchNorm
from .fold_constants import FoldConstants
from .fold_padding import FoldPadding
from .freeze_batch_norm import FreezeBatchNorm
from .freeze_observers import FreezeObservers
from .insert_fake_quant import InsertFakeQuant
from .quantize_bias import QuantizeBias
from .remove_identity import RemoveIdentity
from .select_per_channel import SelectPerChannel
from .settle_encodings import SettleEncodings
from .share_encodings import ShareEncodings

_PASSES: tuple[type[Pass], ...] = (
    AbsorbActivation,
    AssignSpecs,
    ConvolveBatchNorm,
    DecomposeAttention,
    DecomposeSilu,
    ExposeGlobalPool,
    FoldBatchNorm,
    FoldConstants,
    FoldPadding,
    FreezeBatchNorm,
    FreezeObservers,
    InsertFakeQuant,
    QuantizeBias,
    RemoveIdentity,
    SelectPerChannel,
    SettleEncodings,
    ShareEncodings,
)

CATALOG: dict[str, type[Pass]] = {kind.name: kind for kind in _PASSES}

__all__ = ["CATALOG", *(kind.__name__ for kind in _PASSES)]
