"""Contender: torchao's QAT on exported graphs (PT2E), with the quantizer that it has for x86 through Inductor.

Batch norm stays live, as in torch's FX mode, but in ATen operations. The exported graph is bound to its batch size.
"""

import sys
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.contender import Prepared, count_quantizations, serve


def prepare(net: nn.Module, images: Tensor) -> Prepared:
    """Export, annotate, insert fake quantizers, and let them see one batch."""
    from torchao.quantization.pt2e import FakeQuantizeBase, move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    exported = torch.export.export(net, (images,)).module()
    model = move_exported_model_to_train(prepare_qat_pt2e(exported, quantizer))
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantizeBase)]
    weights = [quantizer for quantizer in quantizers if quantizer.is_per_channel]
    activations = [quantizer for quantizer in quantizers if not quantizer.is_per_channel]
    counts = count_quantizations(model, images, activations, weights)
    rest = "batch norm live, its folded weight simulated; ranges are moving averages; the network's output in float"
    return Prepared(model, f"torchao {metadata.version('torchao')} PT2E X86Inductor: {counts}; {rest}")


if __name__ == "__main__":
    sys.exit(serve(prepare))
