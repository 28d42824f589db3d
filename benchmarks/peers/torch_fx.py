"""Contender: QAT of torch.ao.quantization in FX graph mode, with the qconfigs that it has for x86.

Batch norm stays live: the fused module convolves with the weight folded by the running statistics, divides by the
same factor, and normalises with the batch's statistics.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase, get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.contender import Prepared, count_quantizations, serve

BACKEND = "x86"
WEIGHT_SUFFIX = ".weight_fake_quant"


def prepare(net: nn.Module, images: Tensor) -> Prepared:
    """Fuse, insert fake quantizers, and let them see one batch."""
    torch.backends.quantized.engine = BACKEND
    model = prepare_qat_fx(net, get_default_qat_qconfig_mapping(BACKEND), (images,))
    quantizers = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantizeBase)}
    weights = [module for name, module in quantizers.items() if name.endswith(WEIGHT_SUFFIX)]
    activations = [module for name, module in quantizers.items() if not name.endswith(WEIGHT_SUFFIX)]
    counts = count_quantizations(model, images, activations, weights)
    rest = "batch norm live, its folded weight simulated; ranges are moving averages"
    return Prepared(model, f"torch {torch.__version__} FX {BACKEND}: {counts}; {rest}")


if __name__ == "__main__":
    sys.exit(serve(prepare))
