"""What each range estimator does to a trained network's answers: top-1, agreement with float, and the logits' SQNR.

Every row is a network that was calibrated on photos, exported, and run by onnxruntime on other photos, which carry
labels. The activations' ranges are found by the row's estimator; the weights' by min-max, as the presets have
it, and in the rows "weights too" by the same estimator (not for min-max and moving-average: a weight is one tensor, and
the moving average of one is min-max). "W4A8" has weights of 4 bits per channel. The reference is the float network.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

import fxquant
from benchmarks import assets, lowered, photos, runner
from benchmarks.kernels import open_session
from benchmarks.networks import NETWORKS
from benchmarks.quality import Logits, Quality, judge
from benchmarks.runner import Json, progress
from fxquant.graph.pipeline import Pipeline
from fxquant.progress import track
from fxquant.spec import ESTIMATORS, SpecOverride, parse_estimator

TRAINED = [name for name, network in NETWORKS.items() if network.weights is not None]
MIN_MAX, MSE = "min-max", "mse"
# On one tensor these are min-max.
MIN_MAX_ON_WEIGHTS = (MIN_MAX, "moving-average")
MOST_PHOTOS = 101
BATCH = 17
HEADER = ["weights, estimator", "top-1", "agree", "SQNR dB", "calibrate s"]
EXAMPLES = """examples:
  python -m benchmarks.estimators                                     MobileNetV2, every estimator
  python -m benchmarks.estimators --net efficientnet_lite0 --json estimators.json
  python -m benchmarks.estimators --estimators min-max mse "percentile(99.9)" --schemes per-channel
"""


@dataclass(frozen=True)
class Scheme:
    """A preset, and how its weights' ranges are found: by the activations' estimator ("same"), or by one of its own."""

    name: str
    preset: str
    weights: str = MIN_MAX
    weight_bits: int | None = None

    def pipeline(self, estimator: str) -> Pipeline:
        """The preset with `estimator` for the activations."""
        own = estimator if self.weights == "same" else self.weights
        weight = SpecOverride(bits=self.weight_bits, estimator=own)
        return fxquant.load_pipeline(self.preset).override(SpecOverride(estimator=estimator), weight)

    def tells_apart(self, estimator: str) -> bool:
        """Whether the row differs from that of the scheme whose weights are by min-max."""
        return self.weights != "same" or parse_estimator(estimator)[0] not in MIN_MAX_ON_WEIGHTS


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("per-tensor", "int8_per_tensor"),
        Scheme("per-tensor, weights too", "int8_per_tensor", weights="same"),
        Scheme("per-channel", "int8_per_channel"),
        Scheme("per-channel, weights too", "int8_per_channel", weights="same"),
        Scheme("W4A8, weights min-max", "int8_per_channel", weight_bits=4),
        Scheme("W4A8, weights mse", "int8_per_channel", weights=MSE, weight_bits=4),
    )
}


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    net: str
    estimators: list[str]
    schemes: list[str]
    calibration_images: int
    threads: int
    json: Path | None


@dataclass(frozen=True)
class Photos:
    """Photos to calibrate on, and others with their accepted classes."""

    calibration: Tensor
    labelled: Tensor
    labels: list[tuple[int, ...]]


@dataclass(frozen=True)
class Row:
    """One quantized network: its quality, and the seconds that calibration took."""

    scheme: str
    estimator: str
    quality: Quality
    seconds: float

    def cells(self) -> list[str]:
        """The row of the table."""
        return [f"{self.scheme}: {self.estimator}", *quality_cells(self.quality), f"{self.seconds:.1f}"]

    def to_dict(self) -> dict[str, Json]:
        """The figures for the JSON file."""
        figures: dict[str, Json] = {"scheme": self.scheme, "estimator": self.estimator}
        return {**figures, **self.quality.to_dict(), "calibration_seconds": self.seconds}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 0, also where the weights or photos cannot be had."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    facts = runner.environment(seed=0)
    print(runner.describe(facts))
    document: dict[str, Json] = {"environment": facts, "net": options.net, "threads": options.threads}
    try:
        model, found = NETWORKS[options.net].load(seed=0), gather(options)
    except assets.AssetAbsent as reason:
        print(f"{options.net}: skip {reason}")
        document["skipped"] = str(reason)
    else:
        reference = float_logits(model, found.labelled)
        rows = measure(model, found, reference, options)
        own = judge(reference, reference, found.labels)
        print(f"\n{options.net}: {len(found.calibration)} photos calibrate, {own.photos} others are judged\n")
        print(render(own, rows))
        document |= {"float": own.to_dict(), "rows": [row.to_dict() for row in rows]}
        document["calibration_images"] = len(found.calibration)
    if options.json is not None:
        runner.write_json(options.json, document)
    return 0


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.estimators",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, schemes = parser.add_argument, list(SCHEMES)
    add("--net", choices=TRAINED, default=TRAINED[0], help=f"which network (default: {TRAINED[0]})")
    add("--estimators", nargs="+", type=runner.estimator, default=list(ESTIMATORS), help="which (default: all)")
    add("--schemes", nargs="+", choices=schemes, default=schemes, metavar="SCHEME", help=f"of {'; '.join(schemes)}")
    add("--calibration-images", type=runner.positive, default=64, help=f"at most {MOST_PHOTOS} (default: 64)")
    add("--threads", type=runner.positive, default=1, help="threads of torch and onnxruntime (default: 1)")
    add("--json", type=Path, help="write every figure to this file")
    given = parser.parse_args(arguments)
    if given.calibration_images > MOST_PHOTOS:
        parser.error(f"--calibration-images: at most {MOST_PHOTOS}, as many as there are photos")
    return Options(**vars(given))


def gather(options: Options) -> Photos:
    """The photos as the network wants them. Raises AssetAbsent where a package cannot be had."""
    preprocessing, labelled = NETWORKS[options.net].preprocessing, photos.labelled()
    calibration = photos.load(photos.calibration(options.calibration_images), preprocessing)
    return Photos(calibration, photos.load(labelled, preprocessing), [photo.labels for photo in labelled])


def float_logits(model: nn.Module, images: Tensor) -> Logits:
    """The float network's answers, (N, classes)."""
    with torch.no_grad():
        logits: Logits = torch.cat([model(batch) for batch in torch.split(images, BATCH)]).numpy()
    return logits


def chosen(options: Options) -> Iterator[tuple[Scheme, str]]:
    """The rows of the table, those left out that would repeat another."""
    for name in options.schemes:
        for estimator in options.estimators:
            if SCHEMES[name].tells_apart(estimator):
                yield SCHEMES[name], estimator


def measure(model: nn.Module, found: Photos, reference: Logits, options: Options) -> list[Row]:
    """Quantize and judge every row of the table."""
    work = list(chosen(options))
    progress(f"{options.net}: {len(work)} quantized networks")
    rows = []
    for scheme, estimator in track(work, options.net, total=len(work)):
        progress(f"{options.net}: {scheme.name}, {estimator}")
        rows.append(measure_row(model, found, reference, scheme, estimator, options.threads))
    return rows


def measure_row(
    model: nn.Module, found: Photos, reference: Logits, scheme: Scheme, estimator: str, threads: int
) -> Row:
    """Calibrate, export, and judge what onnxruntime answers on the labelled photos."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.onnx"
        made = lowered.quantize(model, found.calibration, path, scheme.pipeline(estimator))
        session = open_session(path, threads)
    logits = numpy.concatenate([session.run(batch.numpy()) for batch in torch.split(found.labelled, BATCH)])
    return Row(scheme.name, estimator, judge(logits, reference, found.labels), made.seconds["calibrate"])


def render(own: Quality, rows: Sequence[Row]) -> str:
    """The table: the float network first."""
    return runner.table(HEADER, [["float", *quality_cells(own), "-"], *(row.cells() for row in rows)])


def quality_cells(quality: Quality) -> list[str]:
    """Top-1, agreement and SQNR as the table has them."""
    sqnr = "-" if quality.sqnr_db is None else f"{quality.sqnr_db:.1f}"
    return [f"{quality.top1:.3f}", f"{quality.agreement:.3f}", sqnr]


if __name__ == "__main__":
    sys.exit(main())
