"""Rows of the post-training table: who quantizes by which method, the pipeline that does it, and what was found.

Methods add up: naive; +CLE (ReLU6 made ReLU as far as outputs keep 30 dB, cross-layer equalization, high biases
absorbed); +BC (and biases corrected, then ranges estimated anew); +AdaRound (and weights rounded by AdaRound before
biases are corrected). At 4 bits the weights' ranges are found by their squared error in every row, naive ones too:
min-max would lose far more, and flatter what follows.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

import fxquant
from benchmarks import baseline
from benchmarks.kernels import open_session
from benchmarks.ptq_nets import SEED, Samples
from benchmarks.quality import Logits, Quality, judge
from fxquant.evaluation import lowered, quantized
from fxquant.graph.passes import Pass
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Program
from fxquant.spec import SpecOverride

PRESETS = {False: "int8_per_tensor", True: "int8_per_channel"}
BITS = (8, 4)
FOLDED = "fold-batch-norm"
EQUALIZING = ("replace-relu6", "cross-layer-equalization", "absorb-high-bias")
OPTIONS: Mapping[str, Mapping[str, Any]] = {"replace-relu6": {"least_db": 30.0}}  # as int8_per_tensor_dfq has it
PARITY_IMAGES = 2


class Side(Enum):
    """Who quantizes."""

    FXQUANT = "fxquant"
    ONNXRUNTIME = "onnxruntime"
    AIMET = "AIMET"


class Method(Enum):
    """What is done beyond calibration; each does what those before it do."""

    NAIVE = "naive"
    CLE = "+CLE"
    BIAS = "+BC"
    ADAROUND = "+AdaRound"


OFFERED = {
    Side.FXQUANT: tuple(Method),
    Side.ONNXRUNTIME: (Method.NAIVE,),
    Side.AIMET: (Method.NAIVE, Method.CLE, Method.ADAROUND),
}


@dataclass(frozen=True)
class Cell:
    """One row of a net: who, how, with which scales, and bits of the weights (activations have 8)."""

    side: Side
    method: Method
    is_per_channel: bool
    bits: int

    def __str__(self) -> str:
        scales = "per-channel" if self.is_per_channel else "per-tensor"
        return f"W{self.bits}A8 {scales} {self.side.value} {self.method.value}"

    def key(self, iterations: int) -> str:
        """The name of its record: iterations decide AdaRound alone."""
        return f"{self} {iterations}" if self.method is Method.ADAROUND else str(self)


def cells(sides: Sequence[Side], methods: Sequence[Method]) -> Iterator[Cell]:
    """The rows of a net, cheap methods first, so that a run that is stopped has most of them."""
    for method in methods:
        for bits in BITS:
            for is_per_channel in (False, True):
                for side in sides:
                    if method in OFFERED[side]:
                        yield Cell(side, method, is_per_channel, bits)


@dataclass(frozen=True)
class Outcome:
    """What a row found.

    Arguments:
        skipped: why there is nothing else; "" where it ran.
        is_broken: whether that is a fault: of fxquant, which runs everywhere, and not of a peer.
        differing: codes of certified values that `exact` simulation and onnxruntime give otherwise, of `compared`; None
            where nothing is compared.
        iterations: of AdaRound for each layer; 0 elsewhere.
    """

    quality: Quality | None = None
    seconds: float = 0.0
    compared: int | None = None
    differing: int | None = None
    note: str = ""
    commit: str = ""
    iterations: int = 0
    skipped: str = ""
    is_broken: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Outcome":
        """From `to_dict`'s values."""
        quality = record["quality"]
        return cls(**{**record, "quality": None if quality is None else Quality(**quality)})


def pipeline(cell: Cell, iterations: int) -> Pipeline:
    """The preset with the method's passes behind the folding of batch norms, and behind calibration.

    Raises ConfigError for a pass that the catalogue does not have.
    """
    preset = fxquant.load_pipeline(PRESETS[cell.is_per_channel])
    if cell.bits < 8:
        preset = preset.override(weight=SpecOverride(bits=cell.bits, estimator="mse"))
    if cell.method is Method.NAIVE:
        return preset
    prepare = list(preset.prepare_passes)
    place = [item.name for item in prepare].index(FOLDED) + 1
    prepare[place:place] = [_made(preset, name) for name in EQUALIZING]
    return preset.changed(prepare=prepare, optimize=list(_optimizing(preset, cell.method, iterations)))


def _optimizing(preset: Pipeline, method: Method, iterations: int) -> Iterator[Pass]:
    if method is Method.ADAROUND:
        yield _made(preset, "adaround", iterations=iterations, seed=SEED)
    if method in (Method.BIAS, Method.ADAROUND):
        yield _made(preset, "correct-bias")
        yield _made(preset, "recalibrate")


def _made(preset: Pipeline, name: str, **options: Any) -> Pass:
    """A pass of the preset's catalogue, with the options that are the same in every row, and these."""
    chosen: dict[str, Any] = {**OPTIONS.get(name, {}), **options}
    found: Pass = replace(preset.make_pass(name), **chosen)  # type: ignore[type-var]  # every pass is a dataclass
    return found


def measure_fxquant(
    captured: Program, chosen: Pipeline, samples: Samples, reference: Logits, folder: Path | None
) -> Outcome:
    """Quantize, export, judge what onnxruntime answers, and compare codes; `folder` is where AdaRound resumes."""
    start = time.monotonic()
    program = quantized(captured, chosen, samples.batches(), folder=folder, progress=True)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.onnx"
        final = lowered(program, chosen)
        fxquant.export_onnx(final, path)
        seconds = time.monotonic() - start
        report = fxquant.check_parity(final, path, [samples.judged[:PARITY_IMAGES]], simulation="exact", progress=False)
        quality = judge(answers(path, samples), reference, samples.labels)
    return Outcome(quality, seconds, report.codes_compared, report.certified_differing)


def measure_onnxruntime(float_path: Path, cell: Cell, samples: Samples, reference: Logits) -> Outcome:
    """onnxruntime.quantization.quantize_static at the settings of benchmarks/baseline.py, on the same images."""
    if cell.bits != 8:
        return Outcome(skipped="quantize_static gives 4-bit weights to MatMul and Gather alone")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "static.onnx"
        baseline.quantize_statically(float_path, path, samples.calibration, per_channel=cell.is_per_channel)
        seconds = time.monotonic() - start
        return Outcome(judge(answers(path, samples), reference, samples.labels), seconds)


def answers(path: Path, samples: Samples) -> Logits:
    """What onnxruntime gives for the judged images, (N, classes)."""
    session = open_session(path, torch.get_num_threads())
    return numpy.concatenate([session.run(batch.numpy()) for batch in torch.split(samples.judged, samples.batch)])


def float_answers(net: torch.nn.Module, samples: Samples) -> Logits:
    """The float net's logits of the judged images, (N, classes)."""
    with torch.no_grad():
        found: list[Tensor] = [net(batch) for batch in torch.split(samples.judged, samples.batch)]
    logits: Logits = torch.cat(found).numpy()
    return logits
