"""What calibration costs: its time over that of float passes on the same batches, and its peak memory.

Batch by batch in turn: a float pass of the original model (eval, no_grad), one of the prepared program with its
quantizers off ("off": batch norm is folded there, so that it may be faster), and calibration's own step. A round's
ratio is the whole of `fxquant.calibrate` over the sum of the passes on the same batches: the checks and resets at the
start, all batches, and at the end the search for ranges and the weights' grids. The figure is the median of the
rounds. "search ms" is the search repeated by itself. Peak memory is that of a process of its own for each number of
batches. Weights are random, batches are synthetic images. The exit code is 1 where a goal is missed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import fxquant
from benchmarks import models, peak_memory, runner
from benchmarks.calibration_rounds import Case, Clock, Cost, one_pass, time_calibration
from benchmarks.networks import synthetic_images
from benchmarks.runner import Json, Verdict, progress
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import Mode
from fxquant.progress import track
from fxquant.spec import ESTIMATORS, SpecOverride

BUILDERS: dict[str, Callable[[], nn.Module]] = {"mobilenet_v2": models.MobileNetV2, "resnet18": models.ResNet18}
PIPELINE = "int8_per_channel"
# Two runs of one and the same calibration differ by up to this much in peak memory (README.md).
MEMORY_TOLERANCE = 0.02
MEGABYTE = 2**20

HEADER = [
    "network, batch, estimator",
    "float ms",
    "off ms",
    "x float",
    "x off",
    "goal",
    "start ms",
    "end ms",
    "search ms",
]
EXAMPLES = """examples:
  python -m benchmarks.calibration_cost                          both networks, batch 8 and 32, every estimator
  python -m benchmarks.calibration_cost --networks resnet18 --batches 8 --estimators min-max "percentile(99.9)"
  python -m benchmarks.calibration_cost --weights same --no-memory --json calibration.json
"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    networks: list[str]
    batches: list[int]
    estimators: list[str]
    weights: str
    images: int
    size: int
    rounds: int
    threads: int
    seed: int
    memory: bool
    memory_batches: list[int]
    json: Path | None


@dataclass(frozen=True)
class Peak:
    """Peak memory of one case, in bytes by number of batches."""

    case: Case
    peaks: dict[int, int]

    @property
    def growth(self) -> float:
        """The peak at the most batches over that at the fewest."""
        return self.peaks[max(self.peaks)] / self.peaks[min(self.peaks)]


@dataclass(frozen=True)
class MemoryTask:
    """What a child process measures."""

    case: Case
    count: int
    size: int
    threads: int
    seed: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 where a goal is missed."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    facts = runner.environment(options.seed)
    print(runner.describe(facts))
    print(f"{options.images} images, {options.rounds} rounds, threads {options.threads}, weights by {options.weights}")
    costs = [cost for network in options.networks for cost in measure(network, options)]
    peaks = measure_memory(options) if options.memory else []
    verdicts = [*(judge(cost) for cost in costs), *(judge_memory(peak) for peak in peaks)]
    print(f"\n{render(costs)}\n")
    if peaks:
        print(f"{render_memory(peaks)}\n")
    print(*verdicts, sep="\n")
    if options.json is not None:
        runner.write_json(options.json, document(facts, options, costs, peaks, verdicts))
    return int(any(not verdict.is_kept for verdict in verdicts))


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration_cost",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, names, every = parser.add_argument, list(BUILDERS), list(ESTIMATORS)
    add("--networks", nargs="+", choices=names, default=names, help="which (default: all)")
    add("--batches", nargs="+", type=runner.positive, default=[8, 32], help="images in a batch (default: 8 32)")
    add("--estimators", nargs="+", type=runner.estimator, default=every, help="of the activations (default: all)")
    add("--weights", type=weights, default="min-max", help="the weights' estimator, or 'same' (default: min-max)")
    add("--images", type=runner.positive, default=128, help="in all batches of a calibration (default: 128)")
    add("--size", type=runner.positive, default=224, help="their height and width (default: 224)")
    add("--rounds", type=runner.positive, default=3, help="calibrations of each case (default: 3)")
    add("--threads", type=runner.positive, default=1, help="torch's threads (default: 1)")
    add("--seed", type=int, default=0, help="of weights and images (default: 0)")
    add("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
    add("--memory-batches", nargs=2, type=runner.positive, default=[4, 16], help="numbers of batches (default: 4 16)")
    add("--json", type=Path, help="write every figure to this file")
    given = parser.parse_args(arguments)
    if any(given.images % batch for batch in given.batches):
        parser.error(f"--images {given.images}: expected a multiple of each of --batches")
    if len(set(given.memory_batches)) == 1:
        parser.error("--memory-batches: expected two different numbers")
    return Options(**vars(given))


def weights(text: str) -> str:
    """An estimator or "same", for argparse."""
    return text if text == "same" else runner.estimator(text)


def cases(network: str, batch: int, options: Options) -> list[Case]:
    """The cases of one network at one batch size."""
    return [
        Case(network, batch, name, name if options.weights == "same" else options.weights)
        for name in options.estimators
    ]


def measure(network: str, options: Options) -> list[Cost]:
    """Time every estimator at every batch size on one network, with random weights."""
    model = models.randomise(BUILDERS[network](), options.seed)
    progress(f"{network}: capture and prepare {1 + len(options.estimators)} programs")
    off = switched_off(prepare(model, options.size, options.seed))
    programs = {
        case.estimator: prepare(model, options.size, options.seed, case)
        for case in cases(network, options.batches[0], options)
    }
    costs = []
    for batch in options.batches:
        images = torch.split(synthetic_images(options.images, options.size, options.seed), batch)
        progress(f"{network}: {options.rounds} rounds of {len(programs)} estimators, {len(images)} batches of {batch}")
        clocks: dict[str, list[Clock]] = {name: [] for name in programs}
        work = [name for _ in range(options.rounds) for name in programs]
        one_pass(model, images[0]), one_pass(off.module, images[0])
        for name in track(work, f"{network}, batch {batch}", total=len(work)):
            clocks[name].append(time_calibration(programs[name], images, model, off.module))
        costs += [Cost(case, clocks[case.estimator]) for case in cases(network, batch, options)]
    return costs


def prepare(model: nn.Module, size: int, seed: int, case: Case | None = None) -> Program:
    """The program of the preset, ready to be calibrated by the case's estimators."""
    program = fxquant.capture(model, (synthetic_images(2, size, seed),))
    pipeline = fxquant.load_pipeline(PIPELINE)
    if case is not None:
        activation, weight = SpecOverride(estimator=case.estimator), SpecOverride(estimator=case.weights)
        pipeline = pipeline.override(activation=activation, weight=weight)
    pipeline.prepare(program)
    return program


def switched_off(program: Program) -> Program:
    """The program in eval mode, with all its quantizers off."""
    program.module.eval()
    for _, module in program.fake_quant_nodes():
        module.mode = Mode.OFF
    return program


def measure_memory(options: Options) -> list[Peak]:
    """Peak memory of each network and estimator at the first batch size, each number of batches in its own process."""
    chosen = [case for network in options.networks for case in cases(network, options.batches[0], options)]
    progress(f"peak memory: {len(chosen) * len(options.memory_batches)} processes")
    tasks = [
        MemoryTask(case, count, options.size, options.threads, options.seed)
        for case in chosen
        for count in sorted(options.memory_batches)
    ]
    peaks: dict[Case, dict[int, int]] = {case: {} for case in chosen}
    for task in track(tasks, "peak memory", total=len(tasks)):
        peaks[task.case][task.count] = peak_memory.in_child(calibration_peak, task)
    return [Peak(case, found) for case, found in peaks.items()]


def calibration_peak(task: MemoryTask) -> int:
    """Peak of this process in bytes while it calibrates on `task.count` batches, which are made one at a time."""
    torch.set_num_threads(task.threads)
    model = models.randomise(BUILDERS[task.case.network](), task.seed)
    program = prepare(model, task.size, task.seed, task.case)
    batches = (synthetic_images(task.case.batch, task.size, task.seed + number) for number in range(task.count))
    return peak_memory.peak_bytes(lambda: fxquant.calibrate(program, batches, progress=False))


def judge(cost: Cost) -> Verdict:
    """The goal for calibration's time, against what was measured."""
    over_float, over_off = cost.ratios
    promise = f"{cost.case}: calibration at most {cost.case.limit:g} times the float passes"
    return Verdict(promise, over_float <= cost.case.limit, f"{over_float:.3f} ({over_off:.3f} with quantizers off)")


def judge_memory(peak: Peak) -> Verdict:
    """Peak memory does not grow with the number of batches."""
    few, many = min(peak.peaks), max(peak.peaks)
    promise = f"{peak.case}: peak memory of {many} batches that of {few} (+{MEMORY_TOLERANCE:.0%})"
    return Verdict(promise, peak.growth <= 1 + MEMORY_TOLERANCE, f"{peak.growth:.3f}")


def render(costs: Sequence[Cost]) -> str:
    """One row a case: milliseconds a batch of both float forms, ratios, and calibration's fixed parts."""
    return runner.table(HEADER, [_row(cost) for cost in costs])


def _row(cost: Cost) -> list[str]:
    def milliseconds(figure: Callable[[Clock], float]) -> str:
        return f"{1e3 * cost.median(figure):.0f}"

    over_float, over_off = cost.ratios
    return [
        str(cost.case),
        milliseconds(lambda clock: sum(clock.original) / cost.batches),
        milliseconds(lambda clock: sum(clock.off) / cost.batches),
        f"{over_float:.3f}",
        f"{over_off:.3f}",
        f"{cost.case.limit:g}",
        milliseconds(lambda clock: clock.start),
        milliseconds(lambda clock: clock.end),
        milliseconds(lambda clock: clock.search),
    ]


def render_memory(peaks: Sequence[Peak]) -> str:
    """One row a case: peak megabytes by number of batches."""
    counts = sorted(peaks[0].peaks)
    rows = [
        [str(peak.case), *(f"{peak.peaks[count] / MEGABYTE:.0f}" for count in counts), f"{peak.growth:.3f}"]
        for peak in peaks
    ]
    return runner.table(["peak MB", *(f"{count} batches" for count in counts), "growth"], rows)


def document(
    facts: dict[str, Json],
    options: Options,
    costs: Sequence[Cost],
    peaks: Sequence[Peak],
    verdicts: Sequence[Verdict],
) -> dict[str, Json]:
    """The figures for the JSON file."""
    memory: list[Json] = [
        {
            "network": peak.case.network,
            "batch": peak.case.batch,
            "estimator": peak.case.estimator,
            "peak_bytes_by_batches": {str(count): found for count, found in peak.peaks.items()},
        }
        for peak in peaks
    ]
    return {
        "environment": facts,
        "images": options.images,
        "size": options.size,
        "rounds": options.rounds,
        "weights": options.weights,
        "costs": [cost.to_dict() for cost in costs],
        "memory": memory,
        "verdicts": [verdict.to_dict() for verdict in verdicts],
    }


if __name__ == "__main__":
    sys.exit(main())
