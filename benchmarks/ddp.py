"""Two processes of DistributedDataParallel against one with the same global batches: grids, weights and codes.

scikit-learn's digits, the demo's net trained in float, then quantization-aware training (int8_per_channel_qat) by each
kind of range. Processes get every other example of a batch. The row "reordered" is one process again, with the examples
of each batch in the processes' order: what float summation alone does. "not synchronised" is DistributedDataParallel
without fxquant.synchronise. Differences are the largest, relative: of a tensor's largest weight, and of each scale.
Codes are those of the logits of the 360 test images in `exact`, each training's on its own grid.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import fxquant
from benchmarks import runner
from benchmarks.runner import Json, Verdict, progress
from fxquant.demo.digits import load_digits, train
from fxquant.demo.net import DigitsNet
from fxquant.numerics.fake_quant import FakeQuant

PRESET, BATCH, CALIBRATION_BATCHES, FLOAT_EPOCHS = "int8_per_channel_qat", 64, 4, 4
KINDS = {"static": "static", "moving average": "moving-average(0.01)", "lsq+": "lsq+"}
ONE, REORDERED, TOGETHER, APART = "one process", "reordered", "synchronised", "not synchronised"
WAYS = (ONE, REORDERED, TOGETHER, APART)
MOST_WEIGHTS, MOST_SCALES = 1e-2, 1e-2

EXAMPLES = """examples:
  python -m benchmarks.ddp                                three kinds of ranges, 40 steps, 2 processes
  python -m benchmarks.ddp --steps 200 --processes 4 --json ddp.json
"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    steps: int
    processes: int
    seed: int
    json: Path | None


@dataclass(frozen=True)
class Job:
    """One training of one kind of ranges, from the float state in a file; each process writes its result there."""

    training: str
    options: Options
    way: str
    folder: str

    @property
    def start(self) -> Path:
        """Where the float state is."""
        return Path(self.folder) / "float.pt"

    def result(self, rank: int) -> Path:
        """Where process `rank` writes what it ended with."""
        return Path(self.folder) / f"{rank}.pt"


@dataclass(frozen=True)
class Outcome:
    """What a training ended with: weights and scales by name, zero points beside them, logits, and their step."""

    weights: dict[str, Tensor]
    scales: dict[str, Tensor]
    zero_points: dict[str, Tensor]
    logits: Tensor
    top1: float

    def has_grids_of(self, other: "Outcome") -> bool:
        """Bitwise."""
        return _equal(self.scales, other.scales) and _equal(self.zero_points, other.zero_points)

    def has_weights_of(self, other: "Outcome") -> bool:
        """Bitwise; running statistics included."""
        return _equal(self.weights, other.weights)


@dataclass(frozen=True)
class Row:
    """One training beside that of one process."""

    kind: str
    way: str
    are_grids_same: bool | None
    are_weights_same: bool | None
    weights: float
    scales: float
    codes: int
    top1: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 where synchronised processes differ, or end elsewhere than one does."""
    options = parse(arguments)
    torch.set_num_threads(1)
    facts = runner.environment(options.seed)
    print(runner.describe(facts))
    progress(f"float, {FLOAT_EPOCHS} epochs")
    torch.manual_seed(options.seed)
    net = DigitsNet()
    train(net, load_digits(options.seed), epochs=FLOAT_EPOCHS, seed=options.seed)
    rows = [row for kind in KINDS for row in measure(kind, net, options)]
    print(f"\n{render(rows)}\n")
    verdicts = judge(rows)
    print(*verdicts, sep="\n")
    if options.json is not None:
        kept: list[Json] = [verdict.to_dict() for verdict in verdicts]
        figures: list[Json] = [dict(vars(row)) for row in rows]
        runner.write_json(options.json, {"environment": facts, "rows": figures, "verdicts": kept})
    return int(any(not verdict.is_kept for verdict in verdicts))


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ddp",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=runner.positive, default=40, help="of training (default: 40)")
    processes = f"of gloo, dividing the batch of {BATCH} (default: 2)"
    parser.add_argument("--processes", type=runner.positive, default=2, help=processes)
    parser.add_argument("--seed", type=int, default=0, help="of the net and the data's order (default: 0)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = Options(**vars(parser.parse_args(arguments)))
    if BATCH % options.processes:
        parser.error(f"--processes: expected a divisor of {BATCH}, got {options.processes}")
    return options


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """What fxquant promises of synchronised processes."""
    together = [row for row in rows if row.way == TOGETHER]
    weights, scales = max(row.weights for row in together), max(row.scales for row in together)
    same = sum(bool(row.are_grids_same and row.are_weights_same) for row in together)
    return [
        Verdict("all processes end with the same bits", same == len(together), f"{same} of {len(together)} trainings"),
        Verdict(
            f"as one process within {MOST_WEIGHTS:g} (weights) and {MOST_SCALES:g} (scales)",
            weights <= MOST_WEIGHTS and scales <= MOST_SCALES,
            f"{weights:.1e} and {scales:.1e}",
        ),
    ]


def measure(kind: str, net: nn.Module, options: Options) -> list[Row]:
    """Each way to train beside one process's."""
    found = {}
    for way in WAYS:
        progress(f"{kind}, {way}")
        with tempfile.TemporaryDirectory() as folder:
            job = Job(KINDS[kind], options, way, folder)
            torch.save(net.state_dict(), job.start)
            count = options.processes if way in (TOGETHER, APART) else 1
            multiprocessing.spawn(work, (job, count), nprocs=count)  # type: ignore[attr-defined, no-untyped-call]
            found[way] = [torch.load(job.result(rank), weights_only=False) for rank in range(count)]
    return [compare(kind, way, outcomes, found[ONE][0]) for way, outcomes in found.items()]


def compare(kind: str, way: str, outcomes: list[Outcome], one: Outcome) -> Row:
    """The first process's outcome beside one process's, and beside the other processes'."""
    first, *others = outcomes
    return Row(
        kind,
        way,
        all(first.has_grids_of(other) for other in others) if others else None,
        all(first.has_weights_of(other) for other in others) if others else None,
        max(float((first.weights[name] - tensor).abs().max() / tensor.abs().max()) for name, tensor in _real(one)),
        max(float(((first.scales[name] - scale) / scale).abs().max()) for name, scale in one.scales.items()),
        int((first.logits != one.logits).sum()),
        first.top1,
    )


def render(rows: Sequence[Row]) -> str:
    """The table."""
    header = ["ranges", "way", "same grids", "same weights", "weights differ", "scales differ", "codes differ", "top-1"]
    said = {None: "-", True: "yes", False: "no"}
    return runner.table(
        header,
        [
            [
                row.kind,
                row.way,
                said[row.are_grids_same],
                said[row.are_weights_same],
                f"{row.weights:.1e}",
                f"{row.scales:.1e}",
                str(row.codes),
                f"{row.top1:.3f}",
            ]
            for row in rows
        ],
    )


# --- in each process --------------------------------------------------------------------------------------------------


def work(rank: int, job: Job, count: int) -> None:
    """Train in process `rank` of `count`, and write the outcome."""
    torch.set_num_threads(1)
    if count > 1:
        file = f"file://{job.folder}/group"
        dist.init_process_group("gloo", init_method=file, rank=rank, world_size=count)
    torch.save(trained(job, rank, count), job.result(rank))
    if count > 1:
        dist.destroy_process_group()


def trained(job: Job, rank: int, count: int) -> Outcome:
    """Calibrate and train on this process's share of each batch."""
    digits, steps = load_digits(job.options.seed), job.options.steps
    net = DigitsNet()
    net.load_state_dict(torch.load(job.start))
    choice = fxquant.SpecOverride(training=job.training)
    sim = fxquant.QuantSim(net.train(), digits.train_images[:BATCH], PRESET, activation=choice)
    if job.way == TOGETHER:
        fxquant.synchronise(sim.program)
    batches = [_share(part, job, rank, count) for part in _orders(len(digits.train_images), steps, job.options.seed)]
    sim.compute_encodings([digits.train_images[batch] for batch in batches[:CALIBRATION_BATCHES]])
    sim.model.train()
    model: nn.Module = DistributedDataParallel(sim.model) if count > 1 else sim.model
    optimizer = torch.optim.SGD(fxquant.parameter_groups(model, 1e-2, 1e-4), lr=1e-2, momentum=0.9)
    for batch in batches:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return _outcome(sim, digits.test_images, digits.test_labels)


def _orders(examples: int, steps: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(examples, (BATCH,), generator=generator) for _ in range(steps)]


def _share(batch: Tensor, job: Job, rank: int, count: int) -> Tensor:
    if job.way != REORDERED:
        return batch[rank::count]
    return torch.cat([batch[first :: job.options.processes] for first in range(job.options.processes)])


def _outcome(sim: fxquant.QuantSim, images: Tensor, labels: Tensor) -> Outcome:
    sim.model.eval()
    sim.program.simulate = "exact"
    with torch.no_grad():
        logits = sim.model(images)
    quantizers = {path: module for path, module in sim.model.named_modules() if isinstance(module, FakeQuant)}
    state = {name: tensor for name, tensor in sim.model.state_dict().items() if not name.startswith("fake_quants")}
    output = sim.program.graph.output_node().all_input_nodes[0]
    last = sim.program.fake_quant(output)
    assert last is not None
    return Outcome(
        state,
        {path: module.scale.clone() for path, module in quantizers.items()},
        {path: module.zero_point.clone() for path, module in quantizers.items()},
        last.codes(logits),
        float((logits.argmax(dim=1) == labels).float().mean()),
    )


def _real(outcome: Outcome) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in outcome.weights.items() if tensor.is_floating_point()]


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


if __name__ == "__main__":
    sys.exit(main())
