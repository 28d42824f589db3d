"""`fxquant tune`: find the configuration of mixed precision that meets an accuracy criterion at the least cost."""

from __future__ import annotations

import argparse
import math
from itertools import islice
from pathlib import Path

from fxquant.cli.loading import first_batch, load_batches, load_evaluate, load_model
from fxquant.cli.parsing import MODEL_HELP, Subparsers, add_command, add_data, named, positive
from fxquant.encodings import VERSIONS
from fxquant.errors import ConfigError
from fxquant.evaluation import EVALUATED_ON
from fxquant.files import made_folder
from fxquant.lowering.lower import check_opset
from fxquant.sim import file_names
from fxquant.tuning.candidates import CANDIDATES, DEFAULT_CANDIDATES
from fxquant.tuning.criterion import Drop
from fxquant.tuning.mixed_precision import tune_precision
from fxquant.tuning.result import PLOT, REPORT, Cost, TuningResult

SEARCH = "search"


def add(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = add_command(
        subparsers,
        "tune",
        "find the mixed precision that meets an accuracy criterion at the least cost",
        "  fxquant tune mypackage.models:make_net --data images.npy --evaluate mypackage.scores:top1 \\\n"
        "      --criterion 1% --out out\n"
        "  fxquant tune ./model.py:make_net --data images/ --evaluate ./model.py:top1 --criterion '>=0.71' --out out "
        "--resume\n"
        "  fxquant tune net.pt2 --data images.npy --evaluate score.py:top1 --criterion 0.01 \\\n"
        "      --candidates float,int16_activations,int8_per_channel,w4a8 --cost bit-ops --out out",
    )
    parser.add_argument("model", help=MODEL_HELP)
    add_data(parser, required=True)
    _add_goal(parser)
    _add_search(parser)
    parser.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="folder for the chosen model's files (as fxquant quantize writes them), its pipeline model.toml, "
        f"{REPORT} with all that was tried, the Pareto front {PLOT}, and {SEARCH}/, which --resume goes on from",
    )
    parser.add_argument("--opset", type=positive, default=21, help="ONNX opset, 13 or later (default: %(default)s)")
    parser.add_argument(
        "--encodings",
        default="1.0.0",
        choices=VERSIONS,
        metavar="VERSION",
        help=f"version of model.encodings: {', '.join(VERSIONS)} (default: %(default)s)",
    )
    parser.set_defaults(run=tune)


def _add_goal(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--evaluate",
        required=True,
        metavar="CALLABLE",
        help="package.module:callable or file.py:callable; takes a callable like the model and gives a score, "
        "the higher the better",
    )
    parser.add_argument(
        "--criterion",
        required=True,
        type=criterion_of,
        help="the largest drop against the float model's score, as 0.01 or as 1%% of that score; "
        "or the score itself, as '>=0.85'",
    )
    parser.add_argument(
        "--cost",
        default=Cost.BIT_OPS.value,
        choices=[kind.value for kind in Cost],
        help="what is to be small: bit-operations, or the latency in onnxruntime on the first batch "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--candidates",
        type=lambda text: tuple(part.strip() for part in text.split(",")),
        default=DEFAULT_CANDIDATES,
        metavar="NAMES",
        help=f"what an operation may be, with commas: {', '.join(CANDIDATES)} "
        f"(default: {','.join(DEFAULT_CANDIDATES)})",
    )


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=named,
        default="int8_per_channel",
        help="pipeline to tune: packaged name or path (default: %(default)s)",
    )
    parser.add_argument(
        "--evaluate-on",
        default="onnxruntime",
        choices=EVALUATED_ON,
        help="what is evaluated: the exported file, or a simulation of it (default: %(default)s)",
    )
    parser.add_argument(
        "--max-trials", type=positive, default=100, help="the most configurations (default: %(default)s)"
    )
    parser.add_argument(
        "--sensitivity-batches",
        type=positive,
        default=2,
        help="batches that sensitivity is measured on (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random numbers (default: %(default)s)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on where an earlier run was stopped")
    again.add_argument("--overwrite", action="store_true", help="remove an earlier run")


def criterion_of(text: str) -> float | Drop:
    """A criterion from "1%" (a relative drop), "0.01" (a drop) or ">=0.85" (a score)."""
    number, is_score, is_relative = text.strip().removeprefix(">="), text.strip().startswith(">="), text.endswith("%")
    try:
        if is_score:
            value = float(number)
            if math.isfinite(value):
                return value
        else:
            value = float(number.removesuffix("%"))
            return Drop(value / 100 if is_relative else value, is_relative)
    except (ValueError, ConfigError):
        pass
    expected = "a drop of 0 or more (0.01), one with % (1%), or a score behind >= (>=0.85)"
    raise argparse.ArgumentTypeError(f"must be {expected}, is '{text}'")


def tune(options: argparse.Namespace) -> int:
    """`fxquant tune`: 0 if the criterion is met; 1 if not, and the best model is written all the same."""
    folder = Path(options.out)
    check_opset(options.opset)
    names = (*file_names("model"), "model.toml", REPORT, PLOT)
    with made_folder(folder, names):
        result = _tuned(options, folder)
        result.export(folder, opset=options.opset, encodings_version=options.encodings)
    print(f"\n{result}")
    print(f"wrote {', '.join(str(folder / name) for name in names)}")
    print(f"check it: fxquant parity {folder / 'model.onnx'} --data {options.data}")
    return 0 if result.met else 1


def _tuned(options: argparse.Namespace, folder: Path) -> TuningResult:
    batches = list(islice(load_batches(options.data, options.batch_size), options.max_batches))
    return tune_precision(
        load_model(options.model),
        first_batch(batches, options.data),
        batches,
        load_evaluate(options.evaluate),
        criterion=options.criterion,
        candidates=options.candidates,
        cost=options.cost,
        config=options.config,
        evaluate_on=options.evaluate_on,
        sensitivity_batches=options.sensitivity_batches,
        max_trials=options.max_trials,
        folder=folder / SEARCH,
        resume=options.resume,
        overwrite=options.overwrite,
        seed=options.seed,
        report=lambda trial: print(trial, flush=True),
    )
