"""What contenders of benchmarks/adaround_cost.py share: one ResNet18 block, its samples, and the protocol on the pipes.

A contender is a process of its own:

    <python> <script> --iterations 50 --samples 64 --size 56 --threads 1

It prints ``READY <note>``, or ``FAILED <reason>`` and ends with 1. Then it answers each line ``learn`` of its standard
input with one line of JSON, the fields of `Learned`; ``quit``, or the end of the input, ends it. This module needs
torch alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TextIO

import torch
from torch import Tensor, nn

from benchmarks.models import BasicBlock, randomise
from benchmarks.peak_memory import peak_bytes
from benchmarks.peers.contender import one_line

CHANNELS, BATCH, SEED = 64, 32, 0


@dataclass(frozen=True)
class Task:
    """A block in eval mode, samples (N, 64, size, size) in batches, and how many iterations each layer takes.

    positions: at how many positions of each sample's output layers are compared, if that can be chosen; None: at all.
    """

    block: nn.Module
    batches: list[Tensor]
    iterations: int
    positions: int | None = None


@dataclass(frozen=True)
class Rounded:
    """What a contender made: a callable that computes the block with rounded weights, and what it can tell of itself.

    `losses` are each layer's first and last one, `off_grid` counts weights that are no grid points; None if it does not
    tell.
    """

    block: Callable[[Tensor], Tensor]
    losses: list[tuple[float, float]] | None = None
    off_grid: int | None = None


@dataclass(frozen=True)
class Learned:
    """One run: seconds, the most memory meanwhile, squared error of the block's output over the squared float output,
    and what `Rounded` tells.
    """

    seconds: float
    peak: int
    error: float
    losses: list[tuple[float, float]] | None
    off_grid: int | None


Learn = Callable[[Task], Rounded]


def serve(learn: Learn, note: str, arguments: Sequence[str] | None = None) -> int:
    """Speak the protocol until told to quit; return the exit status."""
    replies = _claimed_output()
    try:
        task = make_task(parse(arguments))
        print("READY", note, file=replies, flush=True)
        for line in sys.stdin:
            if line.strip() != "learn":
                break
            print(json.dumps(asdict(measured(learn, task))), file=replies, flush=True)
    except Exception as error:  # whatever a peer raises is a reason to name, not to die of
        print("FAILED", one_line(error), file=replies, flush=True)
        return 1
    return 0


def measured(learn: Learn, task: Task) -> Learned:
    """Let a contender learn, under the clock."""
    found: list[Rounded] = []
    seconds: list[float] = []

    def run() -> None:
        start = time.perf_counter()
        found.append(learn(task))
        seconds.append(time.perf_counter() - start)

    peak = peak_bytes(run)
    return Learned(seconds[0], peak, _error(found[0], task), found[0].losses, found[0].off_grid)


def _error(found: Rounded, task: Task) -> float:
    error = power = 0.0
    with torch.no_grad():
        for batch in task.batches:
            wanted = task.block(batch)
            error += float((found.block(batch) - wanted).square().sum())
            power += float(wanted.square().sum())
    return error / power


def make_task(options: argparse.Namespace) -> Task:
    """layer1.0 of a ResNet18 whose weights look trained, and samples that look like what goes into it."""
    torch.set_num_threads(options.threads)
    block = randomise(BasicBlock(CHANNELS, CHANNELS, 1), SEED).eval()
    generator = torch.Generator().manual_seed(SEED)
    samples = torch.randn(options.samples, CHANNELS, options.size, options.size, generator=generator)
    samples = torch.relu(samples + torch.randn(options.samples, CHANNELS, 1, 1, generator=generator))
    return Task(block, list(torch.split(samples, BATCH)), options.iterations, options.positions)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a contender."""
    parser = argparse.ArgumentParser(
        description="A contender of benchmarks/adaround_cost.py; it is driven by its pipes."
    )
    parser.add_argument("--iterations", type=int, default=50, help="of each layer (default 50)")
    parser.add_argument("--positions", type=int, help="of each sample's output (default all)")
    parser.add_argument("--samples", type=int, default=64, help="inputs of the block (default 64)")
    parser.add_argument("--size", type=int, default=56, help="height and width of one (default 56)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    return parser.parse_args(arguments)


def _claimed_output() -> TextIO:
    """Standard output for replies alone; from here on others' prints go to standard error."""
    sys.stdout.flush()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies
