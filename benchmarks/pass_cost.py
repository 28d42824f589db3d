"""What the pass manager costs: milliseconds a node of the int8_per_channel prepare list as graphs grow, and a real net.

The graphs are residual chains of convolution, batch norm and ReLU with 4 channels, so that tensors cost nothing and the
graph's own handling is what is timed. A manager whose passes are linear shows the same milliseconds a node at every
size: the growth printed, largest size over the one before it, is then about 1.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx, nn

import fxquant
from benchmarks import lowered, models, runner
from benchmarks.networks import synthetic_images
from benchmarks.runner import Json, Verdict, progress
from fxquant.graph.module import ProgramModule
from fxquant.graph.program import Program, ValueType

CHANNELS, SIDE = 4, 4
# With 10 times the nodes a quadratic manager shows 10, an n log n one about 1.3.
LINEAR_GROWTH = 1.5
RESNET18_SECONDS = 3.0

EXAMPLES = """examples:
  python -m benchmarks.pass_cost                              100, 1,000 and 10,000 nodes, and ResNet18
  python -m benchmarks.pass_cost --nodes 500 5000 --runs 5 --json passes.json
"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    nodes: list[int]
    runs: int
    seed: int
    json: Path | None


@dataclass(frozen=True)
class Cost:
    """One prepare on a graph of `nodes` nodes: processor and wall-clock seconds, and wall-clock seconds of each pass.

    Everything runs on one thread, so the two agree on an idle machine, and the processor's stay true on a busy one.
    """

    nodes: int
    cpu_seconds: float
    seconds: float
    passes: dict[str, float]

    @property
    def milliseconds_per_node(self) -> float:
        """Processor milliseconds a node: the figure that stays level when everything is linear."""
        return 1e3 * self.cpu_seconds / self.nodes


class ChainBuilder:
    """Writes a residual chain in the normal form that capture leaves: a unit is 4 nodes, and each second one adds."""

    def __init__(self, seed: int) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()
        self._generator = torch.Generator().manual_seed(seed)

    def build(self, nodes: int) -> Program:
        """A program of at least `nodes` nodes, and at most 9 more."""
        value = shortcut = self._place(self.graph.placeholder("x"), "", "")
        units = 0
        while len(self.graph.nodes) < nodes - 1:
            value = self._unit(value, f"units.{units}")
            units += 1
            if units % 2 == 0:
                value = self._call(torch.ops.aten.add.Tensor, (value, shortcut), f"add_{units}", "")
                shortcut = value
        self.graph.output(value)
        self.root.eval()
        return Program(ProgramModule(self.root, self.graph), name=f"chain of {len(self.graph.nodes)} nodes")

    def _unit(self, value: fx.Node, path: str) -> fx.Node:
        """Convolution 3x3 without bias, batch norm, ReLU: 4 nodes with the weight's."""
        conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        with torch.no_grad():
            conv.weight.normal_(0.0, 0.05, generator=self._generator)
        self._add_module(f"{path}.conv", conv)
        self._add_module(f"{path}.bn", nn.BatchNorm2d(CHANNELS))
        name = path.replace(".", "_")
        weight = self.graph.create_node("get_attr", f"{path}.conv.weight", name=f"{name}_conv_weight")
        weight.meta["type"] = ValueType(tuple(conv.weight.shape), torch.float32)
        arguments = (value, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        out = self._call(torch.ops.aten.convolution.default, arguments, f"{name}_conv", f"{path}.conv", "Conv2d")
        out = self.graph.create_node("call_module", f"{path}.bn", (out,), name=f"{name}_bn")
        self._place(out, f"{path}.bn", "BatchNorm2d")
        return self._call(torch.ops.aten.relu.default, (out,), f"{name}_relu", f"{path}.relu", "ReLU")

    def _call(
        self, target: fx.node.Target, args: tuple[fx.node.Argument, ...], name: str, path: str, kind: str = ""
    ) -> fx.Node:
        return self._place(self.graph.create_node("call_function", target, args, name=name), path, kind)

    def _place(self, node: fx.Node, path: str, kind: str) -> fx.Node:
        shape = ("s0", CHANNELS, SIDE, SIDE)
        node.meta = {"type": ValueType(shape, torch.float32), "module_path": path, "module_class": kind, "source": ""}
        return node

    def _add_module(self, path: str, module: nn.Module) -> None:
        owner = self.root
        *parents, attribute = path.split(".")
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        owner.add_module(attribute, module)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 where the cost grows faster than linear or ResNet18 takes too long."""
    options = parse(arguments)
    torch.set_num_threads(1)
    facts = runner.environment(options.seed)
    print(runner.describe(facts))
    costs = [measure(nodes, options) for nodes in sorted(options.nodes)]
    growths = growth(costs)
    print(f"\n{render(costs, growths)}\n")
    progress("resnet18: capture, prepare, lower; twice, the first to warm up")
    warm = time_resnet18(options.seed)
    verdicts = judge(growths, lowered.without_calibration(warm.cpu_seconds))
    steps = ", ".join(f"{step} {taken:.2f} (cpu {warm.cpu_seconds[step]:.2f})" for step, taken in warm.seconds.items())
    wall = lowered.without_calibration(warm.seconds)
    print(f"resnet18 warm: {wall:.2f} s of wall clock without calibration: {steps}\n")
    print(*verdicts, sep="\n")
    if options.json is not None:
        kept: list[Json] = [verdict.to_dict() for verdict in verdicts]
        runner.write_json(options.json, {**document(facts, costs, growths, warm), "verdicts": kept})
    return int(any(not verdict.is_kept for verdict in verdicts))


def judge(growths: Sequence[float], resnet18_seconds: float) -> list[Verdict]:
    """What fxquant promises about its own speed, against what was measured in processor seconds."""
    worst = max(growths, default=1.0)
    level = f"cost a node grows at most {LINEAR_GROWTH:g} times from size to size"
    return [
        Verdict(level, worst <= LINEAR_GROWTH, f"{worst:.2f} times"),
        Verdict(
            f"resnet18 from module to ONNX file within {RESNET18_SECONDS:g} s of the processor, warm",
            resnet18_seconds <= RESNET18_SECONDS,
            f"{resnet18_seconds:.2f} s without calibration",
        ),
    ]


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pass_cost",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = [100, 1_000, 10_000]
    sizes = "graph sizes (default: 100 1000 10000)"
    parser.add_argument("--nodes", nargs="+", type=runner.positive, default=default, help=sizes)
    runs = "runs of each size; the fastest counts (default: 3)"
    parser.add_argument("--runs", type=runner.positive, default=3, help=runs)
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    return Options(**vars(parser.parse_args(arguments)))


def measure(nodes: int, options: Options) -> Cost:
    """Prepare a fresh chain of `nodes` nodes `runs` times; the fastest run counts."""
    best: Cost | None = None
    for run in range(options.runs):
        progress(f"{nodes} nodes, run {run + 1} of {options.runs}")
        program = ChainBuilder(options.seed).build(nodes)
        size = len(program.graph.nodes)
        pipeline = fxquant.load_pipeline(lowered.PIPELINE)
        start, cpu_start = time.perf_counter(), time.process_time()
        trace = pipeline.prepare(program)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        if best is None or cpu_seconds < best.cpu_seconds:
            best = Cost(size, cpu_seconds, seconds, {entry.pass_name: entry.seconds for entry in trace})
    assert best is not None
    return best


def growth(costs: Sequence[Cost]) -> list[float]:
    """Milliseconds a node of each size over those of the size before it."""
    return [
        larger.milliseconds_per_node / smaller.milliseconds_per_node for smaller, larger in itertools.pairwise(costs)
    ]


def time_resnet18(seed: int) -> lowered.Lowered:
    """Each step of ResNet18 at 224 x 224 timed from module to ONNX file, once everything is imported and warm."""
    model = models.randomise(models.ResNet18(), seed)
    images = synthetic_images(2, 224, seed)
    with tempfile.TemporaryDirectory() as folder:
        lowered.quantize(model, images, Path(folder) / "cold.onnx")
        return lowered.quantize(model, images, Path(folder) / "warm.onnx")


def render(costs: Sequence[Cost], growths: Sequence[float]) -> str:
    """One row a size, and the three slowest passes of the largest."""
    rows = [
        [
            str(cost.nodes),
            f"{1e3 * cost.seconds:.1f}",
            f"{1e3 * cost.cpu_seconds:.1f}",
            f"{cost.milliseconds_per_node:.3f}",
            ratio,
        ]
        for cost, ratio in zip(costs, ["-", *(f"{ratio:.2f}" for ratio in growths)], strict=True)
    ]
    slowest = sorted(costs[-1].passes.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in slowest)
    table = runner.table(["nodes", "wall ms", "cpu ms", "cpu ms a node", "growth"], rows)
    return f"{table}\nslowest at {costs[-1].nodes} nodes: {named}"


def document(
    facts: dict[str, Json], costs: Sequence[Cost], growths: Sequence[float], resnet18: lowered.Lowered
) -> dict[str, Json]:
    """The figures for the JSON file."""
    sizes: list[Json] = [
        {
            "nodes": cost.nodes,
            "prepare_seconds": cost.seconds,
            "prepare_cpu_seconds": cost.cpu_seconds,
            "cpu_milliseconds_per_node": cost.milliseconds_per_node,
            "pass_seconds": dict(cost.passes),
        }
        for cost in costs
    ]
    return {
        "environment": facts,
        "sizes": sizes,
        "growth_of_cpu_milliseconds_per_node": list(growths),
        "resnet18_warm_seconds": dict(resnet18.seconds),
        "resnet18_warm_cpu_seconds": dict(resnet18.cpu_seconds),
    }


if __name__ == "__main__":
    sys.exit(main())
