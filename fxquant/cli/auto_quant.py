"""`fxquant autoquant`: try post-training algorithms, in the order of cost, until a score is reached."""

from __future__ import annotations

import argparse
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
from fxquant.tuning.auto_quant import auto_quantize
from fxquant.tuning.auto_quant_result import AutoQuantResult
from fxquant.tuning.criterion import Drop

SEARCH, REPORT = "search", "autoquant.json"


def add(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = add_command(
        subparsers,
        "autoquant",
        "try ranges, equalization, bias correction and AdaRound, cheapest first, until a score is reached",
        "  fxquant autoquant mypackage.models:make_net --data images.npy --evaluate mypackage.scores:top1 \\\n"
        "      --drop 0.01 --out out\n"
        "  fxquant autoquant ./model.py:make_net --data images/ --evaluate ./model.py:top1 --target 0.71 --out out "
        "--resume\n"
        "  fxquant autoquant net.pt2 --data images.npy --evaluate score.py:top1 --drop 1% --config w4a8 --out out",
    )
    parser.add_argument("model", help=MODEL_HELP)
    add_data(parser, required=True)
    _add_search(parser)
    parser.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="folder for the best model's files (as fxquant quantize writes them), its pipeline model.toml, "
        f"{REPORT} with all trials, and {SEARCH}/, which --resume goes on from",
    )
    parser.add_argument("--opset", type=positive, default=21, help="ONNX opset, 13 or later (default: %(default)s)")
    parser.add_argument(
        "--encodings",
        default="1.0.0",
        choices=VERSIONS,
        metavar="VERSION",
        help=f"version of model.encodings: {', '.join(VERSIONS)} (default: %(default)s)",
    )
    parser.set_defaults(run=auto_quant)


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--evaluate",
        required=True,
        metavar="CALLABLE",
        help="package.module:callable or file.py:callable; takes a callable like the model and gives a score, "
        "the higher the better",
    )
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--target", type=float, metavar="SCORE", help="the score to reach")
    goal.add_argument(
        "--drop", type=_drop, help="the largest drop against the float model's score: 0.01, or 1%% of that score"
    )
    parser.add_argument(
        "--config",
        type=named,
        default="int8_per_channel",
        help="pipeline to begin with: packaged name or path (default: %(default)s)",
    )
    parser.add_argument(
        "--evaluate-on",
        default="onnxruntime",
        choices=EVALUATED_ON,
        help="what is evaluated: the exported file, or a simulation of it (default: %(default)s)",
    )
    parser.add_argument("--iterations", type=positive, help="AdaRound's iterations for each layer")
    parser.add_argument("--seed", type=int, default=0, help="of random numbers (default: %(default)s)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on where an earlier run was stopped")
    again.add_argument("--overwrite", action="store_true", help="remove an earlier run")


def _drop(text: str) -> Drop:
    is_relative = text.endswith("%")
    try:
        number = float(text.removesuffix("%"))
        return Drop(number / 100 if is_relative else number, is_relative)
    except (ValueError, ConfigError):
        raise argparse.ArgumentTypeError(f"must be a number of 0 or more, or one with %, is '{text}'") from None


def auto_quant(options: argparse.Namespace) -> int:
    """`fxquant autoquant`: 0 if the target is reached; 1 if not, and the best model is written all the same."""
    folder = Path(options.out)
    check_opset(options.opset)
    names = (*file_names("model"), "model.toml", REPORT)
    with made_folder(folder, names):
        result = _searched(options, folder)
        result.export(folder, opset=options.opset, encodings_version=options.encodings)
    print(f"\n{result}")
    print(f"wrote {', '.join(str(folder / name) for name in names)}")
    print(f"check it: fxquant parity {folder / 'model.onnx'} --data {options.data}")
    return 0 if result.reached else 1


def _searched(options: argparse.Namespace, folder: Path) -> AutoQuantResult:
    batches = list(islice(load_batches(options.data, options.batch_size), options.max_batches))
    return auto_quantize(
        load_model(options.model),
        first_batch(batches, options.data),
        batches,
        load_evaluate(options.evaluate),
        target=options.target if options.drop is None else options.drop,
        config=options.config,
        evaluate_on=options.evaluate_on,
        iterations=options.iterations,
        folder=folder / SEARCH,
        resume=options.resume,
        overwrite=options.overwrite,
        seed=options.seed,
        report=lambda trial: print(trial, flush=True),
    )
