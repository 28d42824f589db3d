"""int8 networks side by side: float, onnxruntime's quantize_static and fxquant's int8_per_channel, in one run.

For each network: latency of int8 over float at each batch size (the three sessions timed in turn), the kernels that
onnxruntime really runs, fxquant's parity with onnxruntime at every quantized tensor, and what quantization did to the
answers on labelled photos. The exit code is 1 where a promise is broken, 0 otherwise, also where something was skipped.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks import assets, baseline, lowered, photos, runner
from benchmarks.kernels import Session, open_session
from benchmarks.networks import NETWORKS, Network, unlabelled_images
from benchmarks.quality import Quality, judge
from benchmarks.runner import Json, Timings, Verdict, progress

FLOAT, STATIC, FXQUANT = "float", "quantize_static", "fxquant"
VARIANTS = (FLOAT, STATIC, FXQUANT)
# Two sessions of one and the same file differ by up to this much here (README.md says how that was measured).
LATENCY_TOLERANCE = 0.03

EXAMPLES = """examples:
  python -m benchmarks.versus_quantize_static                                  all three networks, batch 1 and 8
  python -m benchmarks.versus_quantize_static --models mobilenet_v2 --batches 1 --runs 50
  python -m benchmarks.versus_quantize_static --json int8.json --keep models/  figures and .onnx files for later
"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    models: list[str]
    batches: list[int]
    runs: int
    calibration_images: int
    parity_images: int
    threads: int
    seed: int
    json: Path | None
    keep: Path | None


@dataclass(frozen=True)
class Images:
    """Calibration images, and labelled ones where photos and trained weights are to be had; `skipped` says why not."""

    calibration: Tensor
    labelled: Tensor | None = None
    labels: list[tuple[int, ...]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """Everything measured on one network."""

    network: Network
    sessions: dict[str, Session]
    timings: dict[int, Timings]
    quality: dict[str, Quality]
    parity: lowered.Parity
    seconds: dict[str, float]
    verdicts: list[Verdict]
    skipped: list[str]

    def to_dict(self) -> dict[str, Json]:
        """The figures for the JSON file."""
        return {
            "weights": self.network.weights_named,
            "variants": {name: self._variant(name) for name in VARIANTS},
            "fxquant_seconds": dict(self.seconds),
            "parity": self.parity.to_dict(),
            "verdicts": [verdict.to_dict() for verdict in self.verdicts],
            "skipped": list(self.skipped),
        }

    def _variant(self, name: str) -> dict[str, Json]:
        latency: dict[str, Json] = {
            str(batch): {
                "median_seconds": timings.median(name),
                "min_seconds": timings.minimum(name),
                "over_float": timings.ratio(name, FLOAT),
                "min_over_min_float": timings.minimum_ratio(name, FLOAT),
            }
            for batch, timings in self.timings.items()
        }
        quality = self.quality.get(name)
        return {
            "kernels": self.sessions[name].kernels.to_dict(),
            "latency_by_batch": latency,
            "quality": None if quality is None else quality.to_dict(),
        }

    def rows(self) -> list[list[str]]:
        """One table row for each variant."""
        return [self._row(name) for name in VARIANTS]

    def _row(self, name: str) -> list[str]:
        row = [f"{self.network.name} {name}", str(self.sessions[name].kernels)]
        for timings in self.timings.values():
            row += [f"{1e3 * timings.median(name):.2f}", f"{timings.ratio(name, FLOAT):.3f}"]
        quality = self.quality.get(name)
        if quality is None:
            return [*row, "-", "-", "-"]
        sqnr = "-" if quality.sqnr_db is None else f"{quality.sqnr_db:.1f}"
        return [*row, f"{quality.top1:.3f}", f"{quality.agreement:.3f}", sqnr]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    facts = runner.environment(options.seed)
    print(runner.describe(facts), f"onnxruntime threads {options.threads}", sep="\n")
    results: list[Result] = []
    skipped: dict[str, Json] = {}
    for name in options.models:
        try:
            results.append(measure(NETWORKS[name], options))
        except assets.AssetAbsent as reason:
            progress(f"{name}: skipped: {reason}")
            skipped[name] = str(reason)
    print(render(results, skipped, options))
    if options.json is not None:
        networks: dict[str, Json] = {result.network.name: result.to_dict() for result in results}
        document: dict[str, Json] = {"environment": facts, "options": as_json(options), "networks": networks}
        runner.write_json(options.json, {**document, "skipped": skipped})
    return int(any(not verdict.is_kept for result in results for verdict in result.verdicts))


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.versus_quantize_static",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS), help="which networks")
    parser.add_argument("--batches", nargs="+", type=runner.positive, default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--runs", type=runner.positive, default=30, help="timed rounds a batch size (default: 30)")
    parser.add_argument("--calibration-images", type=runner.positive, default=32, help="at most 101 (default: 32)")
    parser.add_argument(
        "--parity-images", type=runner.positive, default=4, help="images compared code by code (default: 4)"
    )
    parser.add_argument(
        "--threads", type=runner.positive, default=1, help="threads of torch and onnxruntime (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights and images (default: 0)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--keep", type=Path, help="leave the .onnx files in this folder")
    return Options(**vars(parser.parse_args(arguments)))


def as_json(options: Options) -> dict[str, Json]:
    """The options that decide a figure."""
    return {
        "batches": list(options.batches),
        "runs": options.runs,
        "calibration_images": options.calibration_images,
        "parity_images": options.parity_images,
        "threads": options.threads,
    }


def measure(network: Network, options: Options) -> Result:
    """Build the three ONNX files of one network and measure them. Raises AssetAbsent without its weights."""
    model = network.load(options.seed)
    images = gather(network, options)
    with ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        paths = {name: folder / f"{network.name}_{name}.onnx" for name in VARIANTS}
        progress(f"{network.name}: float export and quantize_static, {len(images.calibration)} calibration images")
        baseline.export_float(model, images.calibration, paths[FLOAT])
        baseline.quantize_statically(paths[FLOAT], paths[STATIC], images.calibration)
        progress(f"{network.name}: fxquant int8_per_channel")
        program = lowered.quantize(model, images.calibration, paths[FXQUANT])
        sessions = {name: open_session(path, options.threads) for name, path in paths.items()}
        timings = {batch: time_batch(network, sessions, batch, images, options.runs) for batch in options.batches}
        progress(f"{network.name}: parity on {options.parity_images} images")
        parity = lowered.compare(program, paths[FXQUANT], images.calibration[: options.parity_images])
    return Result(
        network=network,
        sessions=sessions,
        timings=timings,
        quality=evaluate(network, sessions, images),
        parity=parity,
        seconds=program.seconds,
        verdicts=judge_promises(model, sessions, timings, parity),
        skipped=images.skipped,
    )


def gather(network: Network, options: Options) -> Images:
    """The images of one network; without photos calibration is on synthetic ones, and there is no accuracy."""
    calibration, absent = unlabelled_images(network, options.calibration_images, options.seed)
    if absent:
        return Images(calibration, skipped=[f"calibration photos (synthetic images instead): {absent}", "accuracy"])
    if network.weights is None:
        return Images(calibration, skipped=["accuracy: the weights are random"])
    try:
        chosen = photos.labelled()
        labelled = photos.load(chosen, network.preprocessing)
    except assets.AssetAbsent as reason:
        return Images(calibration, skipped=[f"accuracy: {reason}"])
    return Images(calibration, labelled, [photo.labels for photo in chosen])


def time_batch(network: Network, sessions: dict[str, Session], batch: int, images: Images, runs: int) -> Timings:
    """Time the sessions in turn on one batch of calibration images (repeated where there are too few)."""
    progress(f"{network.name}: latency at batch {batch}, {runs} rounds of {len(sessions)} sessions")
    repeats = -(-batch // len(images.calibration))
    feed = images.calibration.repeat(repeats, 1, 1, 1)[:batch].numpy()

    def call(session: Session) -> NDArray[numpy.float32]:
        return session.run(feed)

    calls = {name: (lambda session=session: call(session)) for name, session in sessions.items()}
    return runner.interleave(calls, runs)


def evaluate(network: Network, sessions: dict[str, Session], images: Images) -> dict[str, Quality]:
    """Each variant's answers on the labelled photos, {} where there are none."""
    if images.labelled is None:
        return {}
    progress(f"{network.name}: {len(images.labels)} labelled photos")
    batches = [batch.numpy() for batch in torch.split(images.labelled, 17)]
    logits = {name: numpy.concatenate([session.run(b) for b in batches]) for name, session in sessions.items()}
    return {name: judge(answers, logits[FLOAT], images.labels) for name, answers in logits.items()}


def judge_promises(
    model: nn.Module, sessions: dict[str, Session], timings: dict[int, Timings], parity: lowered.Parity
) -> list[Verdict]:
    """What fxquant promises about such networks, against what was measured."""
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    kernels = sessions[FXQUANT].kernels
    promise = f"{convolutions} convolutions and the classifier on integers, no Q/DQ left inside"
    verdicts = [Verdict(promise, kernels.is_all_integer(convolutions, 1), str(kernels))]
    for batch, timing in timings.items():
        ratio = timing.ratio(FXQUANT, STATIC)
        promise = f"batch {batch} no slower than quantize_static (+{LATENCY_TOLERANCE:.0%})"
        verdicts.append(Verdict(promise, ratio <= 1 + LATENCY_TOLERANCE, f"{ratio:.3f} of its time"))
    worst = f"{parity.worst_local_steps:g} steps, {parity.worst_local_fraction:.2e} of a node's codes at most"
    return [*verdicts, Verdict("local parity within 1 step", parity.worst_local_steps <= 1, worst)]


def render(results: list[Result], skipped: dict[str, Json], options: Options) -> str:
    """The tables and verdicts for a person."""
    header = ["network, variant", "integer kernels"]
    for batch in options.batches:
        header += [f"b{batch} ms", "x float"]
    header += ["top-1", "agree", "SQNR dB"]
    parts = [runner.table(header, [row for result in results for row in result.rows()])] if results else []
    for result in results:
        parts.append(f"{result.network.name} ({result.network.weights_named} weights)\n{result.parity.text}")
        lines = [str(verdict) for verdict in result.verdicts] + [f"skip {reason}" for reason in result.skipped]
        parts.append("\n".join(f"{result.network.name}: {line}" for line in lines))
    parts += [f"{name}: skip {reason}" for name, reason in skipped.items()]
    return "\n" + "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
