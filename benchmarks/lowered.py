"""fxquant's side of the comparison: a module in, an integer ONNX file out, the seconds of each step, and its parity."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

import fxquant
from benchmarks.runner import Json
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Program
from fxquant.parity import ParityReport

T = TypeVar("T")
PIPELINE = "int8_per_channel"


@dataclass(frozen=True)
class Lowered:
    """The finalized program, and what each step took: wall-clock and processor seconds by step."""

    program: Program
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]


def without_calibration(seconds: dict[str, float]) -> float:
    """All steps but calibration, whose time is the network's own, times the number of images."""
    return sum(taken for step, taken in seconds.items() if step != "calibrate")


def quantize(model: nn.Module, images: Tensor, path: Path, pipeline: Pipeline | None = None) -> Lowered:
    """Capture `model`, prepare, calibrate on `images` (N, 3, H, W) in batches of 8, finalize, and write `path`.

    `pipeline` is int8_per_channel by default.
    """
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}

    def timed(step: str, call: Callable[[], T]) -> T:
        start, cpu_start = time.perf_counter(), time.process_time()
        outcome = call()
        seconds[step], cpu_seconds[step] = time.perf_counter() - start, time.process_time() - cpu_start
        return outcome

    batches = [images[start : start + 8] for start in range(0, len(images), 8)]
    program = timed("capture", lambda: fxquant.capture(model, (images[:2],)))
    pipeline = fxquant.load_pipeline(PIPELINE) if pipeline is None else pipeline
    timed("prepare", lambda: pipeline.prepare(program))
    timed("calibrate", lambda: fxquant.calibrate(program, batches, progress=False))
    timed("finalize", lambda: pipeline.finalize(program))
    timed("export", lambda: fxquant.export_onnx(program, path))
    return Lowered(program, seconds, cpu_seconds)


@dataclass(frozen=True)
class Parity:
    """What differs between the simulation and onnxruntime, in codes.

    `worst_local_steps` and `worst_local_fraction` are over all nodes, each given onnxruntime's own inputs; the fraction
    is that node's differing codes over its codes. `text` is fxquant's own table, node by node.
    """

    worst_local_steps: float
    worst_local_fraction: float
    text: str
    figures: dict[str, Json]

    @classmethod
    def of(cls, report: ParityReport) -> "Parity":
        """Read the two figures off fxquant's report."""
        fraction = max((row.local.fraction for row in report.code_rows), default=0.0)
        return cls(report.worst_local_steps, fraction, str(report), report.to_dict())

    def to_dict(self) -> dict[str, Json]:
        """fxquant's report in full, and the two figures that the promise is about."""
        worst: dict[str, Json] = {
            "worst_local_steps": self.worst_local_steps,
            "worst_local_fraction": self.worst_local_fraction,
        }
        return {**worst, "report": self.figures}


def compare(lowered: Lowered, path: Path, images: Tensor) -> Parity:
    """Compare the program with `path`, which was exported from it, at every quantized tensor, on `images`."""
    return Parity.of(fxquant.check_parity(lowered.program, path, [images], progress=False))
