"""Post-training algorithms on real and on rescaled nets: naive, +CLE, +bias correction, +AdaRound, in one table.

W8A8 and W4A8, per-tensor and per-channel; top-1, agreement with the float net, the logits' SQNR, seconds, and the codes
that differ between `exact` simulation and the exported file in onnxruntime, which is what is judged. Beside it
onnxruntime's quantize_static on the same images, and AIMET in an environment of its own on the same weights and images.

A finished row is kept: stop it when you like and start it again, and start it once for each net to use several cores.
The exit code is 1 where a promise is broken; what cannot be had here is skipped with the reason.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import fxquant
from benchmarks import assets, baseline, runner
from benchmarks.ptq_nets import NETS, SEED, Net, Samples, cache
from benchmarks.ptq_peers import Aimet
from benchmarks.ptq_rows import (
    BITS,
    Cell,
    Method,
    Outcome,
    Side,
    cells,
    float_answers,
    measure_fxquant,
    measure_onnxruntime,
    pipeline,
)
from benchmarks.ptq_table import Table, render, verdicts
from benchmarks.quality import Logits, judge
from benchmarks.runner import Json, progress
from fxquant.errors import FxquantError
from fxquant.files import make_folder
from fxquant.graph.program import Program
from fxquant.trials import TrialLog

ITERATIONS = 500
MOST_PHOTOS = 101
EXAMPLES = """examples:
  python -m benchmarks.ptq --methods naive +CLE +BC           minutes
  python -m benchmarks.ptq --venvs ~/peers --json ptq.json    everything, with AIMET beside it: hours
  python -m benchmarks.ptq --nets mobilenet_v2 & python -m benchmarks.ptq --nets efficientnet_lite0
  python -m benchmarks.ptq --table                            what is there, judged
"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    nets: list[str]
    methods: list[str]
    sides: list[str]
    bits: list[int]
    venvs: Path | None
    iterations: int
    calibration_images: int
    threads: int
    folder: Path | None
    fresh: bool
    table: bool
    json: Path | None

    def recipe(self, net: Net) -> dict[str, Json]:
        """What every row depends on, beside the sources; iterations are in the keys of those that have any."""
        octaves = net.octaves if net.is_rescaled else 0.0
        versions = runner.environment(SEED)["versions"]
        return {"calibration_images": self.calibration_images, "seed": SEED, "octaves": octaves, "versions": versions}

    def log(self, net: Net) -> TrialLog:
        """The net's finished rows; those of other options lie in another file."""
        recipe = self.recipe(net)
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
        path = self.place / f"{net.name}-{digest}.json"
        return TrialLog(path, recipe, resume=True, overwrite=self.fresh and not self.table)

    @property
    def place(self) -> Path:
        """The folder of results."""
        return self.folder or cache()

    @property
    def cells(self) -> list[Cell]:
        """The rows of each net."""
        sides = [side for side in Side if side.value in self.sides]
        found = cells(sides, [method for method in Method if method.value in self.methods])
        return [cell for cell in found if cell.bits in self.bits]


@dataclass(frozen=True)
class Bench:
    """One net, loaded, with what all its rows share."""

    net: Net
    module: nn.Module
    samples: Samples
    reference: Logits
    captured: Program
    float_path: Path
    aimet: Aimet
    options: Options

    def measure(self, cell: Cell) -> Outcome:
        """One row; an error of fxquant's is an outcome."""
        iterations = self.options.iterations
        if cell.side is Side.AIMET:
            return self.aimet.measure(self.net, self.module, cell, self.samples, self.reference, iterations)
        if cell.side is Side.ONNXRUNTIME:
            return measure_onnxruntime(self.float_path, cell, self.samples, self.reference)
        rounds = iterations if cell.method is Method.ADAROUND else 0
        try:
            chosen = pipeline(cell, iterations)
            folder = self._resumed(cell) if rounds else None
            outcome = measure_fxquant(self.captured, chosen, self.samples, self.reference, folder)
        except FxquantError as error:
            return Outcome(skipped=f"{type(error).__name__}: {error}", is_broken=True)
        return replace(outcome, iterations=rounds)

    def _resumed(self, cell: Cell) -> Path:
        """Where AdaRound keeps its finished layers, so that a kill loses one layer."""
        name = cell.key(self.options.iterations).replace(" ", "_")
        folder = self.options.place / f"{self.net.name}-layers" / name
        make_folder(folder)
        return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and print the table; returns the exit code."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    facts = runner.environment(SEED)
    print(runner.describe(facts))
    aimet = Aimet.find(options.venvs)
    tables: dict[str, Table] = {}
    skipped: dict[str, str] = {}
    for name in options.nets:
        try:
            table = read(NETS[name], options) if options.table else run(NETS[name], aimet, options)
        except assets.AssetAbsent as reason:
            skipped[name] = str(reason)
        else:
            tables |= {} if table is None else {name: table}
    judged = verdicts(with_origins(tables, options))
    print(render(tables, judged, skipped))
    if options.json is not None:
        nets: dict[str, Json] = {name: table.to_dict() for name, table in tables.items()}
        found: dict[str, Json] = {"nets": nets, "verdicts": [verdict.to_dict() for verdict in judged]}
        reasons: dict[str, Json] = dict(skipped)
        shared: dict[str, Json] = {"iterations": options.iterations, "calibration_images": options.calibration_images}
        document: dict[str, Json] = {"environment": facts, **shared}
        runner.write_json(options.json, {**document, **found, "skipped": reasons})
    return int(any(not verdict.is_kept for verdict in judged))


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ptq",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, nets = parser.add_argument, list(NETS)
    methods, sides = [method.value for method in Method], [side.value for side in Side]
    add("--nets", nargs="+", choices=nets, default=nets, metavar="NET", help=f"of {', '.join(nets)} (default: all)")
    add("--methods", nargs="+", choices=methods, default=methods, help="which (default: all)")
    add("--sides", nargs="+", choices=sides, default=sides, help="whose rows (default: all)")
    add("--bits", nargs="+", type=int, choices=BITS, default=list(BITS), help="of weights (default: 8 and 4)")
    add("--venvs", type=Path, metavar="DIR", help="environments of benchmarks.qat_step_peers --make, for AIMET's rows")
    add("--iterations", type=runner.positive, default=ITERATIONS, help=f"of AdaRound a layer (default: {ITERATIONS})")
    add("--calibration-images", type=runner.positive, default=64, help=f"photos, at most {MOST_PHOTOS} (default: 64)")
    add("--threads", type=runner.positive, default=1, help="of torch and onnxruntime (default: 1)")
    add("--folder", type=Path, help="where finished rows are kept (default: in the cache)")
    add("--fresh", action="store_true", help="forget the rows that are kept")
    add("--table", action="store_true", help="run nothing: the table of what is there")
    add("--json", type=Path, metavar="FILE", help="write every figure to this file")
    given = parser.parse_args(arguments)
    if given.calibration_images > MOST_PHOTOS:
        parser.error(f"--calibration-images: at most {MOST_PHOTOS}, as many as there are photos")
    return Options(**vars(given))


def run(net: Net, aimet: Aimet, options: Options) -> Table:
    """Measure the rows that are missing, each kept at once. Raises AssetAbsent without weights or data."""
    log = options.log(net)
    with tempfile.TemporaryDirectory() as folder:
        module, samples = net.load(), net.samples(options.calibration_images)
        reference = float_answers(module, samples)
        own = judge(reference, reference, samples.labels)
        log.put("float", Outcome(own).to_dict())
        float_path = Path(folder) / "float.onnx"
        baseline.export_float(module, samples.calibration, float_path)
        captured = fxquant.capture(module, (samples.calibration[:2],))
        bench = Bench(net, module, samples, reference, captured, float_path, aimet, options)
        rows = {cell: measured(bench, cell, log) for cell in options.cells}
    return Table(net, own, rows)


def measured(bench: Bench, cell: Cell, log: TrialLog) -> Outcome:
    """A kept row, or a new one that is then kept; a row that did not run is asked for again the next time."""
    key = cell.key(bench.options.iterations)
    found = log.get(key)
    if found is not None:
        return Outcome.of(found)
    progress(f"{bench.net.name}: {key}")
    outcome = replace(bench.measure(cell), commit=str(runner.environment(SEED)["commit"]))
    if outcome.quality is not None:
        log.put(key, outcome.to_dict())
    return outcome


def read(net: Net, options: Options) -> Table | None:
    """The rows that are kept; None without any."""
    log = options.log(net)
    own = log.get("float")
    if own is None:
        return None
    found = {cell: log.get(cell.key(options.iterations)) for cell in options.cells}
    quality = Outcome.of(own).quality
    assert quality is not None
    return Table(net, quality, {cell: Outcome.of(record) for cell, record in found.items() if record is not None})


def with_origins(tables: Mapping[str, Table], options: Options) -> dict[str, Table]:
    """The tables, each behind the kept table of its origin where that is not among them, for judging."""
    known = dict(tables)
    for table in tables.values():
        origin = NETS[table.net.origin]
        kept = None if origin.name in known else read(origin, replace(options, fresh=False))
        known |= {} if kept is None else {origin.name: kept}
    return known


if __name__ == "__main__":
    sys.exit(main())
