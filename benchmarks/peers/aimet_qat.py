"""Contender: AIMET, whose ranges are always learned in QAT, with its default configuration (per-channel weights).

Batch norm stays live, as its recipe with re-estimated statistics has it: weights are quantized as they are, not as
folded, and no quantizer stands between a layer and its batch norm.
"""

import sys
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.contender import Prepared, count_quantizations, serve

PARAMETERS = ".param_quantizers."
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def prepare(net: nn.Module, images: Tensor) -> Prepared:
    """Make functions modules, insert quantizers, and compute their ranges from one batch."""
    declared = declare_torchvision()
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel
    from aimet_torch.v2.quantization.base import QuantizerBase

    sim = QuantizationSimModel(prepare_model(net.eval()), images, default_output_bw=8, default_param_bw=8)
    sim.compute_encodings(lambda model: model(images))
    model: nn.Module = sim.model.train()
    quantizers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizerBase)}
    weights = [module for name, module in quantizers.items() if PARAMETERS in name]
    activations = [module for name, module in quantizers.items() if PARAMETERS not in name]
    counts = count_quantizations(model, images, activations, weights)
    rest = f"batch norm live and apart, unfolded weights; all ranges learned{declared}"
    return Prepared(model, f"AIMET {metadata.version('aimet-torch')}: {counts}; {rest}")


def declare_torchvision() -> str:
    """Declare the two operators without which torchvision, that AIMET imports, cannot be imported beside a CPU torch.

    Nothing here calls them. Returns what to say of it: nothing where torchvision's own operators load.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        torch.library.define("torchvision::nms", SIGNATURE)
        torch.library.define("torchvision::qnms", SIGNATURE)
        return "; torchvision's operators nms and qnms declared empty"
    return ""


if __name__ == "__main__":
    sys.exit(serve(prepare))
