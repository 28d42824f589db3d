"""What the exact simulation costs: its time over that of float fake quantization, evaluating and training.

Both are forms of one program with the same parameters (`program.simulate`). They run in turn, a pair at a time, and the
figure is the median of the pairs' ratios. Evaluating is a forward without gradients; training is a forward in training
mode and a backward, without the optimizer's step. In both, weights' grids follow the weights. Layers whose sums may
exceed 2^24, which float32 cannot add up in one go, are listed: they cost more.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import fxquant
from benchmarks import models, runner
from benchmarks.networks import synthetic_images
from benchmarks.runner import Json, Timings, Verdict, progress
from fxquant.graph.program import Program
from fxquant.simulation import Strategy, strategies

FORMS = ("float", "exact")
LIMITS = {"mobilenet_v2": 1.15, "resnet18": 1.3}
BUILDERS = {"mobilenet_v2": models.MobileNetV2, "resnet18": models.ResNet18}

EXAMPLES = """examples:
  python -m benchmarks.exact_cost                                 both networks, batch 8 at 160 x 160, 1 thread
  python -m benchmarks.exact_cost --networks resnet18 --size 224 --batch 16 --threads 4
  python -m benchmarks.exact_cost --rounds 31 --json exact.json
"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    networks: list[str]
    batch: int
    size: int
    rounds: int
    threads: int
    seed: int
    json: Path | None


@dataclass(frozen=True)
class Cost:
    """One network: seconds of each form, evaluating and training, and how its products are added up, by layer."""

    network: str
    evaluating: Timings
    training: Timings
    strategies: dict[str, Strategy]

    @property
    def ratios(self) -> tuple[float, float]:
        """Exact over float: evaluating, training."""
        return self.evaluating.ratio("exact", "float"), self.training.ratio("exact", "float")

    @property
    def beyond(self) -> dict[str, Strategy]:
        """The layers that float32 cannot add up in one go."""
        return {name: strategy for name, strategy in self.strategies.items() if strategy.parts != 1}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 where the exact form costs more than promised."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    facts = runner.environment(options.seed)
    print(runner.describe(facts))
    costs = [measure(network, options) for network in options.networks]
    print(f"\n{render(costs)}\n")
    for cost in costs:
        print(f"{cost.network}: {len(cost.beyond)} of {len(cost.strategies)} products are beyond the certificate")
        print("".join(f"  {name}: {strategy}\n" for name, strategy in cost.beyond.items()))
    verdicts = [judge(cost) for cost in costs]
    print(*verdicts, sep="\n")
    if options.json is not None:
        runner.write_json(options.json, document(facts, options, costs, verdicts))
    return int(any(not verdict.is_kept for verdict in verdicts))


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exact_cost",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(BUILDERS)
    parser.add_argument("--networks", nargs="+", choices=names, default=names, help="which (default: all)")
    parser.add_argument("--batch", type=runner.positive, default=8, help="images in a batch (default: 8)")
    parser.add_argument("--size", type=runner.positive, default=160, help="their height and width (default: 160)")
    parser.add_argument("--rounds", type=runner.positive, default=15, help="pairs that are measured (default: 15)")
    parser.add_argument("--threads", type=runner.positive, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (default: 0)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    return Options(**vars(parser.parse_args(arguments)))


def measure(network: str, options: Options) -> Cost:
    """Time both forms of one network, on random weights and images."""
    progress(f"{network}: capture, prepare, calibrate")
    images = synthetic_images(options.batch, options.size, options.seed)
    program = fxquant.capture(models.randomise(BUILDERS[network](), options.seed), images)
    fxquant.load_pipeline("int8_per_channel").prepare(program)
    fxquant.calibrate(program, [images], progress=False)
    found = strategies(program, images)
    progress(f"{network}: {options.rounds} pairs of evaluations, {options.rounds} of training steps")
    evaluating, training = (
        runner.interleave({form: partial(step, program, form, images) for form in FORMS}, options.rounds)
        for step in (evaluate, train)
    )
    return Cost(network, evaluating, training, found)


def evaluate(program: Program, form: str, images: torch.Tensor) -> None:
    """A forward in evaluation mode, without gradients."""
    program.simulate = form
    program.module.eval()
    with torch.no_grad():
        program.module(images)


def train(program: Program, form: str, images: torch.Tensor) -> None:
    """A forward in training mode and a backward."""
    program.simulate = form
    program.module.train()
    program.module.zero_grad(set_to_none=True)
    program.module(images).square().mean().backward()


def judge(cost: Cost) -> Verdict:
    """What fxquant promises about the exact form, against what was measured."""
    limit = LIMITS[cost.network]
    evaluating, training = cost.ratios
    promise = f"{cost.network}: exact at most {limit:g} times float, evaluating and training"
    return Verdict(promise, max(cost.ratios) <= limit, f"{evaluating:.3f} and {training:.3f}")


def render(costs: Sequence[Cost]) -> str:
    """Two rows a network."""
    rows = [
        [
            f"{cost.network} {name}",
            f"{1e3 * timings.median('float'):.0f}",
            f"{1e3 * timings.median('exact'):.0f}",
            f"{timings.ratio('exact', 'float'):.3f}",
            f"{timings.minimum_ratio('exact', 'float'):.3f}",
        ]
        for cost in costs
        for name, timings in (("evaluating", cost.evaluating), ("training", cost.training))
    ]
    return runner.table(["", "float ms", "exact ms", "x float", "x float (fastest)"], rows)


def document(
    facts: dict[str, Json], options: Options, costs: Sequence[Cost], verdicts: Sequence[Verdict]
) -> dict[str, Json]:
    """The figures for the JSON file."""
    return {
        "environment": facts,
        "batch": options.batch,
        "size": options.size,
        "networks": {
            cost.network: {
                "evaluating_ratio": cost.ratios[0],
                "training_ratio": cost.ratios[1],
                "evaluating": cost.evaluating.to_dict(),
                "training": cost.training.to_dict(),
                "largest_sum": {name: strategy.largest for name, strategy in cost.strategies.items()},
                "beyond_certificate": {name: str(strategy) for name, strategy in cost.beyond.items()},
            }
            for cost in costs
        },
        "verdicts": [verdict.to_dict() for verdict in verdicts],
    }


if __name__ == "__main__":
    sys.exit(main())
