"""The pass catalogue, imported as fxquant.passes; one pass a file, listed here by the name that configs use."""

from __future__ import annotations

from fxquant.graph.passes import Pass

from .absorb_activation import AbsorbActivation
from .absorb_high_bias import AbsorbHighBias
from .adaround import AdaRound
from .apply_placement import ApplyPlacement
from .assign_specs import AssignSpecs
from .convolve_batch_norm import ConvolveBatchNorm
from .correct_bias import CorrectBias
from .cross_layer_equalization import CrossLayerEqualization
from .decompose_attention import DecomposeAttention
from .decompose_silu import DecomposeSilu
from .drop_output_specs import DropOutputSpecs
from .expose_global_pool import ExposeGlobalPool
from .fix_output_scales import FixOutputScales
from .fold_batch_norm import FoldBatchNorm
from .fold_constants import FoldConstants
from .fold_live_batch_norm import FoldLiveBatchNorm
from .fold_padding import FoldPadding
from .freeze_batch_norm import FreezeBatchNorm
from .freeze_observers import FreezeObservers
from .gptq import Gptq
from .insert_fake_quant import InsertFakeQuant
from .narrow_first_weights import NarrowFirstWeights
from .quantize_bias import QuantizeBias
from .recalibrate import Recalibrate
from .reconstruct_blocks import ReconstructBlocks
from .remove_identity import RemoveIdentity
from .replace_relu6 import ReplaceRelu6
from .select_per_block import SelectPerBlock
from .select_per_channel import SelectPerChannel
from .sequential_mse import SequentialMse
from .settle_encodings import SettleEncodings
from .share_encodings import ShareEncodings
from .simulate_batch_norm_fold import SimulateBatchNormFold
from .smooth_quant import SmoothQuant

_PASSES: tuple[type[Pass], ...] = (
    AbsorbActivation,
    AbsorbHighBias,
    AdaRound,
    ApplyPlacement,
    AssignSpecs,
    ConvolveBatchNorm,
    CorrectBias,
    CrossLayerEqualization,
    DecomposeAttention,
    DecomposeSilu,
    DropOutputSpecs,
    ExposeGlobalPool,
    FixOutputScales,
    FoldBatchNorm,
    FoldConstants,
    FoldLiveBatchNorm,
    FoldPadding,
    FreezeBatchNorm,
    FreezeObservers,
    Gptq,
    InsertFakeQuant,
    NarrowFirstWeights,
    QuantizeBias,
    Recalibrate,
    ReconstructBlocks,
    RemoveIdentity,
    ReplaceRelu6,
    SelectPerBlock,
    SelectPerChannel,
    SequentialMse,
    SettleEncodings,
    ShareEncodings,
    SimulateBatchNormFold,
    SmoothQuant,
)

CATALOG: dict[str, type[Pass]] = {kind.name: kind for kind in _PASSES}

__all__ = ["CATALOG", *(kind.__name__ for kind in _PASSES)]
