"""`fxquant tune`: find the configuration of mixed precision that meets an accuracy criterion at the least cost."""

from __future__ import annotations

import argparse
import math

from fxquant.cli.parsing import Subparsers, add_command, add_output, positive
from fxquant.cli.searching import SEARCH, add_search, add_searched, drop_of, run_search
from fxquant.tuning.candidates import CANDIDATES, DEFAULT_CANDIDATES
from fxquant.tuning.criterion import Drop
from fxquant.tuning.mixed_precision import tune_precision
from fxquant.tuning.result import PLOT, REPORT, Cost


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
    add_searched(parser)
    _add_goal(parser)
    add_search(parser, " to tune")
    _add_limits(parser)
    add_output(
        parser,
        "folder for the chosen model's files (as fxquant quantize writes them), its pipeline model.toml, "
        f"{REPORT} with all that was tried, the Pareto front {PLOT}, and {SEARCH}/, which --resume goes on from",
    )
    parser.set_defaults(run=tune)


def _add_goal(parser: argparse.ArgumentParser) -> None:
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


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-trials", type=positive, default=100, help="the most configurations (default: %(default)s)"
    )
    parser.add_argument(
        "--sensitivity-batches",
        type=positive,
        default=2,
        help="batches that sensitivity is measured on (default: %(default)s)",
    )


def criterion_of(text: str) -> float | Drop:
    """A criterion from "1%" (a relative drop), "0.01" (a drop) or ">=0.85" (a score)."""
    found = _score(text) if text.strip().startswith(">=") else drop_of(text)
    if found is None:
        expected = "a drop of 0 or more (0.01), one with % (1%), or a score behind >= (>=0.85)"
        raise argparse.ArgumentTypeError(f"must be {expected}, is '{text}'")
    return found


def _score(text: str) -> float | None:
    try:
        value = float(text.strip().removeprefix(">="))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def tune(options: argparse.Namespace) -> int:
    """`fxquant tune`: 0 if the criterion is met; 1 if not, and the best model is written all the same."""
    result = run_search(
        options,
        tune_precision,
        (REPORT, PLOT),
        criterion=options.criterion,
        candidates=options.candidates,
        cost=options.cost,
        sensitivity_batches=options.sensitivity_batches,
        max_trials=options.max_trials,
    )
    return 0 if result.met else 1
