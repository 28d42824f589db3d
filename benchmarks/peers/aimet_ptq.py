"""Contender of benchmarks/ptq.py: AIMET's post-training methods on a net and images from a file.

    <python> aimet_ptq.py --job job.pt --out folder --method +CLE --bits 8 --iterations 500 --threads 1 [--per-channel]

`job.pt` has the float net and the images (Job.save in benchmarks/ptq_peers.py). The answers are `logits.npy`, and
`answer.json` with seconds and a note, or with the reason under "failed"; what AIMET prints is nobody's answer. Logits
are those of its simulation. Ranges are by min-max, and by its "tf enhanced" at 4 bits, for weights and activations
alike. Its equalization leaves ReLU6 alone, so where the job says so ReLU stands in its place, as its guide advises.
"""

import argparse
import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.models import SamePadConv2d
from benchmarks.peers.aimet_qat import declare_torchvision
from benchmarks.peers.contender import one_line
from benchmarks.rescaled import with_relu

PER_TENSOR, PER_CHANNEL = "default_config.json", "default_config_per_channel.json"
ENCODINGS = "rounded"


def main() -> int:
    """Do the job and leave the answer; 1 where AIMET failed."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    try:
        # weights_only=False: the file is written by the benchmark that started this process.
        job = torch.load(options.job, weights_only=False)
        declared = declare_torchvision()
        start = time.monotonic()
        simulation = simulate(job, options)
        answer: dict[str, Any] = {"seconds": time.monotonic() - start}
        with torch.no_grad():
            logits = torch.cat([simulation(batch) for batch in torch.split(job["judged"], job["batch"])])
        numpy.save(options.out / "logits.npy", logits.numpy())
        answer["note"] = f"AIMET {metadata.version('aimet-torch')}, simulated{declared}"
    except Exception as error:  # whatever a peer raises is a reason to name, not to die of
        answer = {"failed": one_line(error)}
    (options.out / "answer.json").write_text(json.dumps(answer))
    return int("failed" in answer)


def parse() -> argparse.Namespace:
    """The command line above."""
    parser = argparse.ArgumentParser(description="A contender of benchmarks/ptq.py, which starts it.")
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", choices=["naive", "+CLE", "+AdaRound"], required=True)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--per-channel", action="store_true")
    return parser.parse_args()


def simulate(job: dict[str, Any], options: argparse.Namespace) -> nn.Module:
    """AIMET's calibrated simulation of the job's net."""
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.cross_layer_equalization import equalize_model
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel

    net, batches = job["net"].eval(), torch.split(job["calibration"], job["batch"])
    example = batches[0][:1]
    if options.method != "naive" and job["replaces_relu6"]:
        net = with_relu(net)
    model = prepare_model(with_plain_padding(net))
    if options.method == "naive":
        fold_all_batch_norms(model, None, example)
    else:
        equalize_model(model, dummy_input=example)
    if options.method == "+AdaRound":
        model = rounded(model, batches, options)
    simulation = QuantizationSimModel(
        model,
        example,
        quant_scheme="tf_enhanced" if options.bits < 8 else "tf",
        default_output_bw=8,
        default_param_bw=options.bits,
        config_file=PER_CHANNEL if options.per_channel else PER_TENSOR,
    )
    if options.method == "+AdaRound":
        simulation.set_and_freeze_param_encodings(str(options.out / f"{ENCODINGS}.encodings"))
    simulation.compute_encodings(lambda calibrated: [calibrated(batch) for batch in batches])
    calibrated: nn.Module = simulation.model
    return calibrated


def rounded(model: nn.Module, batches: tuple[Tensor, ...], options: argparse.Namespace) -> nn.Module:
    """The model with AIMET's AdaRound on every layer, at its own defaults but the iterations."""
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.common.defs import QuantScheme

    enhanced, plain = QuantScheme.post_training_tf_enhanced, QuantScheme.post_training_tf
    found: nn.Module = Adaround.apply_adaround(
        model,
        batches[0][:1],
        AdaroundParameters(
            list(batches), len(batches), options.iterations, forward_fn=lambda module, batch: module(batch)
        ),
        str(options.out),
        ENCODINGS,
        default_param_bw=options.bits,
        default_quant_scheme=enhanced if options.bits < 8 else plain,
        default_config_file=PER_CHANNEL if options.per_channel else PER_TENSOR,
    )
    return found


def with_plain_padding(net: nn.Module) -> nn.Module:
    """The net with padding modules before plain convolutions: AIMET knows exact types, and no padding inside."""
    for name, module in list(net.named_modules()):
        if isinstance(module, SamePadConv2d):
            net.set_submodule(name, _padded(module))
    return net


def _padded(conv: SamePadConv2d) -> nn.Module:
    size: Any
    stride: Any
    padding: Any
    size, stride, padding = conv.kernel_size, conv.stride, conv.padding
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, size, stride, padding, groups=conv.groups, bias=False)
    plain.weight = conv.weight
    outside: Any = tuple(conv.outside)
    return nn.Sequential(nn.ZeroPad2d(outside), plain) if outside else plain


if __name__ == "__main__":
    sys.exit(main())
