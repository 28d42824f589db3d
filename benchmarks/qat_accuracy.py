"""Accuracy on real data: float, PTQ and QAT at W8A8, W4A8 and W4A4, with fixed and with learned ranges.

A MobileNetV2-like and a ResNet-like net are trained here on Fashion-MNIST (or CIFAR-10), three seeds each, quantized
and trained on. Accuracy is that of the lowered net in onnxruntime on the 10,000 test images. After every run all codes
of the `exact` simulation are compared with onnxruntime's on 500 images; none may differ.

What is there is not repeated: stop it when you like and start it again with the same folder, and start it once for each
net to use two cores. A kill loses one run at most.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import assets, runner
from benchmarks.labelled_images import DATASETS, Dataset
from benchmarks.qat_accuracy_runs import W4A4, W4A8, W8A8, Method, Outcome, Recipe, Run, Setting, Store, TrainingPlan
from benchmarks.qat_accuracy_table import Results, document
from benchmarks.qat_accuracy_training import execute
from benchmarks.qat_networks import NETWORKS
from benchmarks.runner import progress
from fxquant.files import write_text

BITS = (W8A8, W4A8, W4A4)
FLOAT_SETTINGS = (Setting(Method.FLOAT), Setting(Method.FLOAT_LONGER))
QUANTIZED_METHODS = (Method.PTQ, Method.FIXED, Method.LEARNED)
SETTINGS = (*FLOAT_SETTINGS, *(Setting(method, bits) for bits in BITS for method in QUANTIZED_METHODS))
QUICK_SETTINGS = (*FLOAT_SETTINGS, *(Setting(method, W8A8) for method in QUANTIZED_METHODS))
FLOAT_EPOCHS, EPOCHS = 8, 1
EXAMPLES = """examples:
  python -m benchmarks.qat_accuracy                          everything on one core: hours
  python -m benchmarks.qat_accuracy --quick                  one seed, W8A8 only
  python -m benchmarks.qat_accuracy --nets mobilenet & python -m benchmarks.qat_accuracy --nets resnet
  python -m benchmarks.qat_accuracy --table --write benchmarks/results/qat_accuracy.md
  python -m benchmarks.qat_accuracy --data cifar10 --float-epochs 30 --epochs 3
"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    data: str
    nets: list[str]
    seeds: int
    quick: bool
    float_epochs: int
    epochs: int
    folder: Path | None
    table: bool
    write: Path | None
    threads: int

    @property
    def recipe(self) -> Recipe:
        """How nets are trained; rates were found on a third of an epoch with seed 0, which the table leaves out."""
        float_training = TrainingPlan(self.float_epochs, learning_rate=0.1, warmup=0.2)
        quantized_training = TrainingPlan(self.epochs, learning_rate=0.01, warmup=0.05, range_learning_rate=1e-3)
        return Recipe(self.data, float_training, quantized_training)

    @property
    def runs(self) -> list[Run]:
        """Seed by seed, so that a stopped matrix holds whole seeds."""
        seeds, settings = (1, QUICK_SETTINGS) if self.quick else (self.seeds, SETTINGS)
        return [Run(net, seed, setting) for seed in range(1, seeds + 1) for net in self.nets for setting in settings]

    @property
    def store(self) -> Store:
        """The folder asked for, else one in the cache."""
        return Store(self.folder or assets.cache_folder() / "qat_accuracy" / self.data)

    @property
    def command(self) -> str:
        """What gives the same figures from an empty folder."""
        parts = ["python -m benchmarks.qat_accuracy"]
        parts += [f"--data {self.data}"] if self.data != next(iter(DATASETS)) else []
        parts += [f"--seeds {self.seeds}"] if self.seeds != 3 else []
        parts += ["--quick"] if self.quick else []
        parts += [f"--float-epochs {self.float_epochs}"] if self.float_epochs != FLOAT_EPOCHS else []
        parts += [f"--epochs {self.epochs}"] if self.epochs != EPOCHS else []
        return " ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and print the table; the exit code is 1 where a code differs or a goal is missed.

    Where the data cannot be had nothing is run, and the exit code is 0.
    """
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    print(runner.describe(runner.environment(seed=0)))
    options.store.claim(options.recipe)
    if not options.table:
        try:
            dataset = DATASETS[options.data]()
        except assets.AssetAbsent as reason:
            print(f"{options.data}: skip {reason}")
            return 0
        for _ in measure(options, dataset):
            publish(options)
    return 0 if publish(options, show=True) else 1


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.qat_accuracy",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, data, nets = parser.add_argument, list(DATASETS), list(NETWORKS)
    add("--data", choices=data, default=data[0], help=f"which images (default: {data[0]})")
    add("--nets", nargs="+", choices=nets, default=nets, help="which nets (default: both)")
    add("--seeds", type=runner.positive, default=3, help="how many (default: 3)")
    add("--quick", action="store_true", help="one seed, W8A8 only")
    add("--float-epochs", type=runner.positive, default=FLOAT_EPOCHS, help=f"of float (default: {FLOAT_EPOCHS})")
    add("--epochs", type=runner.positive, default=EPOCHS, help=f"of QAT (default: {EPOCHS})")
    add("--folder", type=Path, help="where runs are kept (default: in the cache, one folder for each --data)")
    add("--table", action="store_true", help="run nothing: the table of what is there")
    add("--write", type=Path, metavar="FILE", help="write the table to this Markdown file too, after every run")
    add("--threads", type=runner.positive, default=1, help="threads of torch (default: 1)")
    return Options(**vars(parser.parse_args(arguments)))


def measure(options: Options, dataset: Dataset) -> Iterator[Outcome]:
    """Run what is missing, and yield each outcome."""
    runs = options.runs
    for number, run in enumerate(runs, start=1):
        was_there = options.store.find(run) is not None
        outcome = execute(run, options.recipe, dataset, options.store)
        if not was_there:
            progress(f"{number}/{len(runs)} {run}: {outcome}")
        yield outcome


def publish(options: Options, *, show: bool = False) -> bool:
    """Write the table of what is there where it is wanted, and print it if `show`; whether every goal is met so far."""
    wanted = options.runs if options.nets == list(NETWORKS) else replace(options, nets=list(NETWORKS)).runs
    results = Results.read(options.store, wanted)
    if options.write is not None:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.write, document(results, options.recipe, options.command))
    verdicts = results.verdicts()
    if show:
        print(f"\n{results.table()}\n")
        for verdict in verdicts:
            print(verdict)
    return all(verdict.is_kept for verdict in verdicts)


if __name__ == "__main__":
    sys.exit(main())
