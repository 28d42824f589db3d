"""`fxquant analyze`: which layers a quantized model loses accuracy by, as a table, JSON and an HTML page."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from itertools import islice
from pathlib import Path

from fxquant.analysis import AnalysisReport
from fxquant.analysis.analyze import TRIALS, analyze
from fxquant.capture import capture
from fxquant.cli.loading import first_batch, load_batches, load_evaluate, load_model, require_model_name
from fxquant.cli.parsing import MODEL_HELP, Subparsers, add_command, add_data, named, positive
from fxquant.errors import FxquantError
from fxquant.evaluation import quantized
from fxquant.files import make_folder, together
from fxquant.graph.batches import Batch
from fxquant.graph.pipeline import load_pipeline
from fxquant.graph.program import Program
from fxquant.graph.storage import load_program
from fxquant.training.seeding import seed_epoch

JSON_NAME, HTML_NAME = "analysis.json", "analysis.html"
_CONFIG = "int8_per_channel"
_NARROWEST = 120  # columns of the table where the output is no terminal, or a narrow one


def add(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = add_command(
        subparsers,
        "analyze",
        "measure which layers, weights and activations a quantized model loses accuracy by",
        "  fxquant analyze mypackage.models:make_net --data images.npy --out analysis\n"
        "  fxquant analyze model.py:make_net --data images/ --config int8_per_tensor --max-batches 4 --html page.html\n"
        "  fxquant analyze model.py:make_net --data images/ --evaluate model.py:accuracy --out analysis --resume\n"
        "  fxquant analyze out/model.fxq --data images.npy --json -",
    )
    parser.add_argument("program", help=f"a calibrated or finalized .fxq file, or a model: {MODEL_HELP}")
    add_data(parser, required=True)
    parser.add_argument("--config", type=named, help=f"pipeline of a model: packaged name or path (default: {_CONFIG})")
    parser.add_argument(
        "--evaluate",
        metavar="CALLABLE",
        help="package.module:callable or file.py:callable that takes what is called like the model and gives a score, "
        "the higher the better (default: the SQNR of the outputs)",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help=f"write {JSON_NAME} and {HTML_NAME} there, and what --resume reads"
    )
    parser.add_argument("--json", metavar="FILE", help="write the report to FILE; '-' prints JSON alone")
    parser.add_argument("--html", metavar="FILE", help="write the page to FILE")
    parser.add_argument("--top", type=positive, default=30, help="layers in the table (default: %(default)s)")
    parser.add_argument(
        "--suggest", type=positive, default=3, help="layers that placement rules are printed for (default: %(default)s)"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of random generators (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with an analysis of --out that was interrupted")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`fxquant analyze`."""
    if options.resume and options.out is None:
        raise FxquantError("analyze --resume", expected="--out, the folder of the run to go on with", got="none")
    folder = None if options.out is None else Path(options.out)
    if folder is not None:
        make_folder(folder, (JSON_NAME, HTML_NAME, TRIALS))
    seed_epoch(options.seed, 0)
    evaluate = None if options.evaluate is None else load_evaluate(options.evaluate)
    batches = list(islice(load_batches(options.data, options.batch_size), options.max_batches))
    report = analyze(
        _program(options, batches, folder),
        batches,
        evaluate,
        folder=folder,
        resume=options.resume,
        overwrite=not options.resume,
        seed=options.seed,
    )
    written = _write(report, options, folder)
    if options.json == "-":
        print(json.dumps(report.to_dict(), indent=1))
        return 0
    print(report.table(max(_NARROWEST, shutil.get_terminal_size((_NARROWEST, 24)).columns), options.top))
    print(f"\n{report.suggestions(options.suggest)}", end="")
    if written:
        print(f"\nwrote {', '.join(map(str, written))}")
    return 0


def _program(options: argparse.Namespace, batches: list[Batch], folder: Path | None) -> Program:
    """A saved program, or a model quantized by --config on --data."""
    if options.program.endswith(".fxq"):
        if options.config is not None:
            got = f"--config {options.config}"
            raise FxquantError("analyze: a .fxq file is quantized already", expected="no --config", got=got)
        return load_program(options.program)
    require_model_name(options.program, "a .fxq file, ")
    pipeline = load_pipeline(options.config or _CONFIG)
    captured = capture(load_model(options.program), first_batch(batches, options.data))
    unfinished = None if folder is None else folder / "unfinished"
    return quantized(captured, pipeline, batches, unfinished, progress=sys.stderr.isatty())


def _write(report: AnalysisReport, options: argparse.Namespace, folder: Path | None) -> list[Path]:
    """Write the files that were asked for; all of them, or none."""
    json_paths = [folder / JSON_NAME] if folder is not None else []
    html_paths = [folder / HTML_NAME] if folder is not None else []
    json_paths += [Path(options.json)] if options.json not in (None, "-") else []
    html_paths += [Path(options.html)] if options.html is not None else []
    with together():
        for path in json_paths:
            report.save_json(path)
        for path in html_paths:
            report.save_html(path)
    return [*json_paths, *html_paths]


def _seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, is '{text}'") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, is {value}")
    return value
