"""What every contender of the step benchmark shares: one network, one training step, and the protocol on its pipes.

A contender is a process of its own, so that peers with contradicting requirements can be measured in turns:

    <python> <script> --net resnet18 --batch 8 --size 224 --threads 1

It prints ``READY <note>`` when it can train, or ``FAILED <reason>`` and ends with 1. Then it answers each line of its
standard input with one line: ``step`` with the seconds of one training step, ``peak`` with the most memory in bytes
that the process held since READY; ``quit``, or the end of the input, ends it. What the peer itself prints goes to
standard error. This module needs torch alone: it also runs where fxquant is not installed.
"""

import argparse
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models import BUILDERS, randomise

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
LEARNING_RATE = 1e-6
SEED = 0
LONGEST_REASON = 300


@dataclass(frozen=True)
class Prepared:
    """A model that is ready for quantization-aware training, and what of it is quantized."""

    model: nn.Module
    note: str


Prepare: TypeAlias = Callable[[nn.Module, Tensor], Prepared]


@dataclass(frozen=True)
class Training:
    """One batch and all that a step on it needs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor

    def step(self) -> float:
        """Seconds of one step: gradients cleared, forward, cross entropy, backward, update."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.model(self.images), self.labels)
        torch.autograd.backward(loss)
        self.optimizer.step()
        return time.perf_counter() - start


def serve(prepare: Prepare, arguments: Sequence[str] | None = None) -> int:
    """Speak the protocol on standard input and output until told to quit; return the exit status.

    Arguments:
        prepare: given the float network in train mode and a batch of images (N, 3, H, W), returns what is trained.
        arguments: the command line, without the script's name.
    """
    replies = _claim_output()
    try:
        training, note = _set_up(prepare, arguments)
        print("READY", note, file=replies, flush=True)
        _reset_peak()
        _answer(training, sys.stdin, replies)
    except Exception as error:  # whatever a peer raises is a reason to name, not to die of
        print("FAILED", one_line(error), file=replies, flush=True)
        return 1
    return 0


def one_line(error: Exception) -> str:
    """The kind of `error` and what it says, on one line of bounded length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a contender: net, batch, size, threads."""
    parser = argparse.ArgumentParser(description="A contender of benchmarks/qat_step.py; it is driven by its pipes.")
    parser.add_argument("--net", required=True, help="a name of benchmarks/models.py")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default 8)")
    parser.add_argument("--size", type=int, default=224, help="height and width of an image (default 224)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    return parser.parse_args(arguments)


def build_net(name: str) -> nn.Module:
    """The network `name` of benchmarks/models.py in train mode, with weights that look trained.

    Raises:
        ValueError: the file has no such network.
    """
    if name not in BUILDERS:
        raise ValueError(f"no network '{name}' in benchmarks/models.py; it has {', '.join(BUILDERS)}")
    return randomise(BUILDERS[name](), SEED).train()


def count_quantizations(
    model: nn.Module, images: Tensor, activations: Iterable[nn.Module], weights: Iterable[nn.Module]
) -> str:
    """How often these quantizers run in one forward pass, so that step times can be read beside it.

    Calls are counted, not modules: a quantizer that several tensors share costs as often as it is called.
    """
    calls: Counter[str] = Counter()
    handles = [quantizer.register_forward_hook(_counter(calls, "activation")) for quantizer in activations]
    handles += [quantizer.register_forward_hook(_counter(calls, "weight")) for quantizer in weights]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return f"{calls['activation']} activation and {calls['weight']} weight quantizations a step"


def _counter(calls: Counter[str], kind: str) -> Callable[[nn.Module, object, object], None]:
    def count(module: nn.Module, inputs: object, output: object) -> None:
        calls[kind] += 1

    return count


def _claim_output() -> TextIO:
    """Standard output for replies alone; from here on others' prints go to standard error."""
    sys.stdout.flush()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def _set_up(prepare: Prepare, arguments: Sequence[str] | None) -> tuple[Training, str]:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    images = torch.randn(options.batch, 3, options.size, options.size)
    prepared = prepare(build_net(options.net), images)
    with torch.no_grad():
        classes = prepared.model(images).shape[1]
    labels = torch.randint(classes, (options.batch,))
    optimizer = torch.optim.SGD(prepared.model.parameters(), lr=LEARNING_RATE)
    return Training(prepared.model, optimizer, images, labels), prepared.note


def _answer(training: Training, requests: TextIO, replies: TextIO) -> None:
    for request in requests:
        match request.strip():
            case "step":
                print(f"{training.step():.6f}", file=replies, flush=True)
            case "peak":
                print(_peak_bytes(), file=replies, flush=True)
            case "quit":
                return
            case other:
                raise ValueError(f"unknown request '{other}'; known are step, peak, quit")


def _reset_peak() -> None:
    """Forget the peak of building and calibrating, where the kernel can."""
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return


def _peak_bytes() -> int:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
