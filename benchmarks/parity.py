"""Simulated codes against onnxruntime's: networks x simulations x optimisation levels x threads, every code compared.

A cell compares every quantized tensor twice: each side on its own values ("differ"), and the simulation fed with
onnxruntime's own codes ("local"), so that one float island does not hide what follows it. At levels ALL and EXTENDED
the exact and integer simulations promise every code at certified nodes, and every convolution and matrix product
an integer kernel: the exit code is 1 where that is broken, 0 otherwise, also where a network was skipped. Levels BASIC
and DISABLED run no integer kernels: they round as floats do, and are shown, not judged.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from benchmarks import assets, runner
from benchmarks.parity_cases import CASES, MOST_PHOTOS, Case, Prepared, Remembered, prepare
from benchmarks.parity_cells import Cell, merged_rows, nodes_line
from benchmarks.runner import Json, progress
from fxquant.parity import Level, RuntimeOptions, check_parity
from fxquant.parity.simulation import SIMULATIONS
from fxquant.progress import track

IMAGES_A_BATCH = 4
HEADER = ["model", "simulation", "levels", "threads", "codes", "differ", "steps", "local", "steps", "certified"]
HEADER += ["logits", "steps", "first to differ locally"]

EXAMPLES = """examples:
  python -m benchmarks.parity                                      every network, simulation and level; 1, 2 threads
  python -m benchmarks.parity --models encoder pool_net --images 8 two networks on 8 photos
  python -m benchmarks.parity --simulations exact --levels ALL --threads 1 --json parity.json
"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    models: list[str]
    simulations: list[str]
    levels: list[Level]
    threads: list[int]
    images: int
    calibration_images: int
    seed: int
    json: Path | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    options = parse(arguments)
    facts = runner.environment(options.seed)
    print(runner.describe(facts))
    cells: list[Cell] = []
    skipped: dict[str, Json] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            try:
                prepared = make(CASES[name], Path(folder), options)
            except assets.AssetAbsent as reason:
                progress(f"{name}: skipped: {reason}")
                skipped[name] = str(reason)
                continue
            skipped.update({name: prepared.skipped} if prepared.skipped else {})
            cells += compare(prepared, options)
    print(render(cells, skipped))
    if options.json is not None:
        document: dict[str, Json] = {"environment": facts, "cells": [cell.to_dict() for cell in cells]}
        runner.write_json(options.json, {**document, "skipped": skipped})
    return int(any(cell.faults for cell in cells))


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    levels = [level.value for level in Level]
    add = parser.add_argument
    add("--models", nargs="+", choices=list(CASES), default=list(CASES), metavar="MODEL", help=f"of {', '.join(CASES)}")
    add("--simulations", nargs="+", choices=list(SIMULATIONS), default=list(SIMULATIONS), help="which (default: all)")
    add("--levels", nargs="+", choices=levels, default=levels, help="of onnxruntime's optimisation (default: all)")
    add("--threads", nargs="+", type=runner.positive, default=[1, 2], help="of onnxruntime (default: 1 2)")
    add(
        "--images",
        type=runner.positive,
        default=2,
        help=f"photos compared, in batches of {IMAGES_A_BATCH} (default: 2)",
    )
    add("--calibration-images", type=runner.positive, default=32, help="other photos to calibrate on (default: 32)")
    add("--seed", type=int, default=0, help="of random weights and images (default: 0)")
    add("--json", type=Path, help="write every cell to this file")
    given = parser.parse_args(arguments)
    if given.images + given.calibration_images > MOST_PHOTOS:
        parser.error(f"--images and --calibration-images: at most {MOST_PHOTOS} together, as many as there are photos")
    given.levels = [Level(level) for level in given.levels]
    return Options(**vars(given))


def make(case: Case, folder: Path, options: Options) -> Prepared:
    """Quantize and export one network."""
    progress(
        f"{case.name}: W{case.weight_bits}A{case.activation_bits}, {options.calibration_images} calibration images"
    )
    return prepare(case, folder, options.images, options.calibration_images, options.seed)


def compare(prepared: Prepared, options: Options) -> list[Cell]:
    """All cells of one network; what does not depend on level and threads is computed once: simulations, constants."""
    name = prepared.case.name
    batches = list(torch.split(prepared.images, IMAGES_A_BATCH))
    remembered = {simulation: Remembered(SIMULATIONS[simulation]) for simulation in options.simulations}
    grid = list(product(options.simulations, options.levels, options.threads))
    progress(f"{name}: {len(grid)} comparisons of {len(prepared.images)} images")
    cells: list[Cell] = []
    for simulation, level, threads in track(grid, f"comparing {name}", total=len(grid)):
        asked = RuntimeOptions(level, threads)
        report = check_parity(
            prepared.program,
            prepared.path,
            batches,
            options=asked,
            simulation=remembered[simulation],
            progress=False,
            check_stored=not cells,
        )
        cells.append(Cell.of(name, asked, report))
    return cells


def render(cells: list[Cell], skipped: dict[str, Json]) -> str:
    """The table, the kinds of nodes, and the faults, for a person."""
    parts = [runner.table(HEADER, merged_rows(cells))] if cells else []
    judged = {cell.case: cell for cell in cells if cell.is_judged}
    parts += ["\n".join(nodes_line(cell) for cell in judged.values())] if judged else []
    parts += ["\n".join(f"{name}: skip {reason}" for name, reason in skipped.items())] if skipped else []
    faults = [f"FAULT {_place(cell)}: {fault}" for cell in cells for fault in cell.faults]
    parts.append("\n".join(faults) if faults else verdict(cells))
    return "\n" + "\n\n".join(parts)


def verdict(cells: list[Cell]) -> str:
    """One line on a grid without faults."""
    judged = [cell for cell in cells if cell.is_judged]
    if not judged:
        return "NOTHING JUDGED: no exact or integer simulation at level ALL or EXTENDED"
    codes = sum(cell.figures.compared for cell in judged)
    return f"EXACT at every certified node: {codes:,} codes in {len(judged)} judged comparisons of {len(cells)}"


def _place(cell: Cell) -> str:
    return f"{cell.case} {cell.simulation} {cell.options.level.value} threads {cell.options.threads}"


if __name__ == "__main__":
    sys.exit(main())
