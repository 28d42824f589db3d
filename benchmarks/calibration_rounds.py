"""One calibration taken apart, batch by batch, with float passes on the same batches in between."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import fxquant
from benchmarks.runner import Json
from fxquant.graph.program import Program
from fxquant.spec import parse_estimator

# Goals: calibration over float passes of the original model.
LIMITS = {"min-max": 1.1, "moving-average": 1.1}
OTHER_LIMIT = 1.5


@dataclass
class Clock:
    """One calibration, taken apart: seconds before the first batch, in each batch, and after the last one.

    `original` and `off` are the float passes on the same batches, which ran in between and count for themselves.
    """

    start: float = 0.0
    steps: list[float] = field(default_factory=list)
    end: float = 0.0
    search: float = 0.0
    original: list[float] = field(default_factory=list)
    off: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Seconds of calibration alone. The search lies within `end`."""
        return self.start + sum(self.steps) + self.end

    @property
    def over_float(self) -> float:
        """Calibration over the original model's passes."""
        return self.total / sum(self.original)

    @property
    def over_off(self) -> float:
        """Calibration over the passes of the prepared program with quantizers off."""
        return self.total / sum(self.off)


@dataclass(frozen=True)
class Case:
    """A network, images in a batch, and an estimator: of the activations, and of the weights."""

    network: str
    batch: int
    estimator: str
    weights: str

    @property
    def limit(self) -> float:
        """The goal for calibration over float passes."""
        return LIMITS.get(parse_estimator(self.estimator)[0], OTHER_LIMIT)

    def __str__(self) -> str:
        return f"{self.network} {self.batch} {self.estimator}"


@dataclass(frozen=True)
class Cost:
    """One case, and its rounds."""

    case: Case
    clocks: Sequence[Clock]

    def median(self, figure: Callable[[Clock], float]) -> float:
        """Median of a figure over the rounds."""
        return statistics.median(figure(clock) for clock in self.clocks)

    @property
    def batches(self) -> int:
        """How many batches each round had."""
        return len(self.clocks[0].original)

    @property
    def ratios(self) -> tuple[float, float]:
        """Calibration over the original model's passes, and over the prepared program's with quantizers off."""
        return self.median(lambda clock: clock.over_float), self.median(lambda clock: clock.over_off)

    def to_dict(self) -> dict[str, Json]:
        """The figures for the JSON file."""
        over_float, over_off = self.ratios
        seconds: list[Json] = [
            {
                "start": clock.start,
                "batches": list(clock.steps),
                "end": clock.end,
                "search_alone": clock.search,
                "original": list(clock.original),
                "quantizers_off": list(clock.off),
            }
            for clock in self.clocks
        ]
        figures: dict[str, Json] = {"network": self.case.network, "batch": self.case.batch}
        figures |= {"estimator": self.case.estimator, "weights": self.case.weights, "goal": self.case.limit}
        return {**figures, "over_float": over_float, "over_off": over_off, "seconds": seconds}


def time_calibration(program: Program, images: Sequence[Tensor], model: nn.Module, off: nn.Module) -> Clock:
    """Calibrate once, with a pass of both float forms before each batch; then search once more, by itself."""
    clock = Clock()
    last = time.perf_counter()

    def batches() -> Iterator[Tensor]:
        nonlocal last
        for number, batch in enumerate(images):
            elapsed = time.perf_counter() - last
            if number == 0:
                clock.start = elapsed
            else:
                clock.steps.append(elapsed)
            clock.original.append(one_pass(model, batch))
            clock.off.append(one_pass(off, batch))
            last = time.perf_counter()
            yield batch
        clock.steps.append(time.perf_counter() - last)
        last = time.perf_counter()

    fxquant.calibrate(program, batches(), progress=False)
    clock.end = time.perf_counter() - last
    clock.search = search_again(program)
    return clock


def one_pass(module: nn.Module, batch: Tensor) -> float:
    """Seconds of a forward without gradients."""
    with torch.no_grad():
        start = time.perf_counter()
        module(batch)
        return time.perf_counter() - start


def search_again(program: Program) -> float:
    """Seconds of turning all that the activations' estimators saw into grids."""
    observed = [
        module for node, module in program.fake_quant_nodes() if not module.follows and node.kwargs.get("observe", True)
    ]
    start = time.perf_counter()
    for module in observed:
        module.compute_encoding()
    return time.perf_counter() - start
