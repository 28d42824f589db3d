"""What `autoquant` and `tune` share: options, drops as text, the arguments of a search, and what is told at its end."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fxquant.cli.loading import first_batch, load_batches, load_evaluate, load_model
from fxquant.cli.parsing import MODEL_HELP, add_config, add_data
from fxquant.errors import ConfigError
from fxquant.evaluation import EVALUATED_ON
from fxquant.files import made_folder
from fxquant.lowering.lower import check_opset
from fxquant.sim import file_names
from fxquant.tuning.target import Drop

SEARCH = "search"  # the folder within --out that --resume goes on from


class Found(Protocol):
    """What a search found: writes the best model, and prints what was tried."""

    def export(self, folder: str | Path, *, opset: int, encodings_version: str) -> Path: ...


Result = TypeVar("Result", bound=Found)


def add_searched(parser: argparse.ArgumentParser) -> None:
    """The model, its data, and what gives a score."""
    parser.add_argument("model", help=MODEL_HELP)
    add_data(parser, required=True)
    parser.add_argument(
        "--evaluate",
        required=True,
        metavar="CALLABLE",
        help="package.module:callable or file.py:callable; takes a callable like the model and gives a score, "
        "the higher the better",
    )


def add_goal(parser: argparse.ArgumentParser) -> None:
    """The score that is to be reached, in either of two forms; `goal_of` reads it."""
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--target", type=score, metavar="SCORE", help="the score to reach")
    goal.add_argument(
        "--drop", type=drop, help="the largest drop against the float model's score: 0.01, or 1%% of that score"
    )


def goal_of(options: argparse.Namespace) -> float | Drop:
    """What add_goal's options say."""
    found: float | Drop = options.target if options.drop is None else options.drop
    return found


def add_search(parser: argparse.ArgumentParser, purpose: str) -> None:
    """How the search is run; `purpose` is that of the pipeline, for the help."""
    add_config(parser, purpose)
    parser.add_argument(
        "--evaluate-on",
        default="onnxruntime",
        choices=EVALUATED_ON,
        help="what is evaluated: the exported file, or a simulation of it (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random numbers (default: %(default)s)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on where an earlier run was stopped")
    again.add_argument("--overwrite", action="store_true", help="remove an earlier run")


def score(text: str) -> float:
    """A finite score."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, is '{text}'")
    return value


def drop(text: str) -> Drop:
    """A drop from "0.01", or a relative one from "1%"."""
    is_relative = text.endswith("%")
    try:
        number = float(text.removesuffix("%"))
        return Drop(number / 100 if is_relative else number, is_relative)
    except (ValueError, ConfigError):
        raise argparse.ArgumentTypeError(f"must be a number of 0 or more, or one with %, is '{text}'") from None


def run_search(
    options: argparse.Namespace, search: Callable[..., Result], more_names: tuple[str, ...], **own: Any
) -> Result:
    """What `search` finds with the options that all searches have, and with its `own`; its files lie in --out then."""
    folder = Path(options.out)
    check_opset(options.opset)
    names = (*file_names("model"), "model.toml", *more_names)
    with made_folder(folder, names):
        batches = list(islice(load_batches(options.data, options.batch_size), options.max_batches))
        with made_folder(folder / SEARCH):
            found = search(
                load_model(options.model),
                first_batch(batches, options.data),
                batches,
                load_evaluate(options.evaluate),
                config=options.config,
                evaluate_on=options.evaluate_on,
                folder=folder / SEARCH,
                resume=options.resume,
                overwrite=options.overwrite,
                seed=options.seed,
                report=lambda trial: print(trial, flush=True),
                **own,
            )
        found.export(folder, opset=options.opset, encodings_version=options.encodings)
    print(f"\n{found}")
    print(f"wrote {', '.join(str(folder / name) for name in names)}")
    print(f"check it: fxquant parity {folder / 'model.onnx'} --data {options.data}")
    return found
