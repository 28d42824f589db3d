"""`fxquant analyze`: which layers a quantized model loses accuracy by, as a table, JSON and an HTML page."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

from fxquant.analysis import AnalysisReport
from fxquant.analysis.analyze import TRIALS, analyze
from fxquant.capture import capture
from fxquant.cli.loading import first_batch, load_batches, load_evaluate, load_model, require_model_name
from fxquant.cli.parsing import MODEL_HELP, Subparsers, add_command, add_data, named, not_negative, positive
from fxquant.errors import FxquantError, StorageError
from fxquant.evaluation import quantized
from fxquant.files import made_folder, together
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
        "--suggest",
        type=not_negative,
        default=3,
        help="layers that placement rules are printed for, if they do harm; 0 for none (default: %(default)s)",
    )
    parser.add_argument("--seed", type=not_negative, default=0, help="of random generators (default: %(default)s)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with an analysis of --out that was interrupted")
    again.add_argument("--overwrite", action="store_true", help="remove an earlier analysis of --out")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`fxquant analyze`."""
    folder = None if options.out is None else Path(options.out)
    _require_free(options, folder)
    seed_epoch(options.seed, 0)
    evaluate = None if options.evaluate is None else load_evaluate(options.evaluate)
    batches = list(islice(load_batches(options.data, options.batch_size), options.max_batches))
    quantize = _quantizer(options, batches, folder)
    with nullcontext() if folder is None else made_folder(folder, (JSON_NAME, HTML_NAME, TRIALS)):
        report = analyze(
            quantize(),
            batches,
            evaluate,
            folder=folder,
            resume=options.resume,
            overwrite=options.overwrite,
            seed=options.seed,
        )
        written = _write(report, options, folder)
    _show(report, options, written)
    return 0


def _require_free(options: argparse.Namespace, folder: Path | None) -> None:
    """Refuse a folder of an earlier run before anything is computed, unless the user says what is to become of it."""
    if folder is None:
        given = "--resume" if options.resume else "--overwrite"
        if options.resume or options.overwrite:
            raise FxquantError(f"analyze {given}", expected="--out, the folder of the earlier run", got="none")
    elif not (options.resume or options.overwrite) and (folder / TRIALS).exists():
        raise StorageError(
            f"'{folder / TRIALS}' is there already",
            expected="a folder without an earlier run",
            remedy="--resume goes on with that run, --overwrite removes it; or give another folder.",
        )


def _quantizer(options: argparse.Namespace, batches: list[Batch], folder: Path | None) -> Callable[[], Program]:
    """What gives a saved program, or a model quantized by --config on --data; all that it needs is read already."""
    if options.program.endswith(".fxq"):
        if options.config is not None:
            got = f"--config {options.config}"
            raise FxquantError("analyze: a .fxq file is quantized already", expected="no --config", got=got)
        program = load_program(options.program)
        return lambda: program
    require_model_name(options.program, "a .fxq file, ")
    pipeline = load_pipeline(options.config or _CONFIG)
    captured = capture(load_model(options.program), first_batch(batches, options.data))
    unfinished = None if folder is None else folder / "unfinished"
    return partial(quantized, captured, pipeline, batches, unfinished, progress=sys.stderr.isatty())


def _show(report: AnalysisReport, options: argparse.Namespace, written: list[Path]) -> None:
    """Print JSON alone where that is asked for; else the table, the rules and the names of the files."""
    if options.json == "-":
        print(json.dumps(report.to_dict(), indent=1))
        return
    print(report.table(max(_NARROWEST, shutil.get_terminal_size((_NARROWEST, 24)).columns), options.top))
    if options.suggest:
        print(f"\n{report.suggestions(options.suggest)}", end="")
    if written:
        print(f"\nwrote {', '.join(map(str, written))}")


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
