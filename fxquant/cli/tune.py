"""`fxquant tune`: find the configuration of mixed precision that reaches a target accuracy at the least cost."""

from __future__ import annotations

import argparse

from fxquant.cli.parsing import Subparsers, add_command, add_output, positive
from fxquant.cli.searching import SEARCH, add_goal, add_search, add_searched, goal_of, run_search
from fxquant.tuning.candidates import CANDIDATES, DEFAULT_CANDIDATES
from fxquant.tuning.mixed_precision import tune_precision
from fxquant.tuning.result import PLOT, REPORT, Cost


def add(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = add_command(
        subparsers,
        "tune",
        "find the mixed precision that reaches a target accuracy at the least cost",
        "  fxquant tune mypackage.models:make_net --data images.npy --evaluate mypackage.scores:top1 \\\n"
        "      --drop 1% --out out\n"
        "  fxquant tune ./model.py:make_net --data images/ --evaluate ./model.py:top1 --target 0.71 --out out "
        "--resume\n"
        "  fxquant tune net.pt2 --data images.npy --evaluate score.py:top1 --drop 0.01 \\\n"
        "      --candidates float,int16_activations,int8_per_channel,w4a8 --cost bit-ops --out out",
    )
    add_searched(parser)
    add_goal(parser)
    _add_choice(parser)
    add_search(parser, " to tune")
    _add_limits(parser)
    add_output(
        parser,
        "folder for the chosen model's files (as fxquant quantize writes them), its pipeline model.toml, "
        f"{REPORT} with all that was tried, the Pareto front {PLOT}, and {SEARCH}/, which --resume goes on from",
    )
    parser.set_defaults(run=tune)


def _add_choice(parser: argparse.ArgumentParser) -> None:
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


def tune(options: argparse.Namespace) -> int:
    """`fxquant tune`: 0 if the target is reached; 1 if not, and the best model is written all the same."""
    result = run_search(
        options,
        tune_precision,
        (REPORT, PLOT),
        target=goal_of(options),
        candidates=options.candidates,
        cost=options.cost,
        sensitivity_batches=options.sensitivity_batches,
        max_trials=options.max_trials,
    )
    return 0 if result.reached else 1
