"""Contender: Brevitas, programmatic quantization of the traced graph; BREVITAS_JIT=1 compiles its quantizers.

Batch norm is kept instead of merged, so that it stays live: weights are quantized as they are, not as folded.
Activations have Brevitas' own defaults: u8 behind a ReLU, symmetric s8 elsewhere, scales that are learned after
calibration. Its preprocessing removes dropout.
"""

import sys
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.contender import Prepared, count_quantizations, serve


def prepare(net: nn.Module, images: Tensor) -> Prepared:
    """Trace, quantize layers, activations and residuals, and calibrate on one batch."""
    from brevitas import config
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import COMPUTE_LAYER_MAP, preprocess_for_quantize, quantize
    from brevitas.proxy.parameter_quant import WeightQuantProxyFromInjectorBase
    from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
    from brevitas.quant import Int8WeightPerChannelFloat

    layers = dict(COMPUTE_LAYER_MAP)
    for kind in (nn.Conv2d, nn.Linear):
        layer, options = layers[kind]
        layers[kind] = layer, {**options, "weight_quant": Int8WeightPerChannelFloat}
    graph = preprocess_for_quantize(net, relu6_to_relu=False, merge_bn=False)
    model = quantize(graph, compute_layer_map=layers)
    with torch.no_grad(), calibration_mode(model):
        model(images)
    model.train()
    weights = [module for module in model.modules() if isinstance(module, WeightQuantProxyFromInjectorBase)]
    activations = [module for module in model.modules() if isinstance(module, ActQuantProxyFromInjectorBase)]
    enabled = [module for module in activations if module.is_quant_enabled]
    counts = count_quantizations(model, images, enabled, weights)
    rest = "batch norm live and apart, unfolded weights; activation scales learned; JIT "
    return Prepared(
        model, f"Brevitas {metadata.version('brevitas')}: {counts}; {rest}{'on' if config.JIT_ENABLED else 'off'}"
    )


if __name__ == "__main__":
    sys.exit(serve(prepare))
