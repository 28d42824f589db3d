"""`fxquant autoquant`: try post-training algorithms, in the order of cost, until a score is reached."""

from __future__ import annotations

import argparse

from fxquant.cli.parsing import Subparsers, add_command, add_output, positive
from fxquant.cli.searching import SEARCH, add_goal, add_search, add_searched, goal_of, run_search
from fxquant.tuning.auto_quant import auto_quantize

REPORT = "autoquant.json"


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
    add_searched(parser)
    add_goal(parser)
    parser.add_argument("--iterations", type=positive, help="AdaRound's iterations for each layer")
    add_search(parser, " to begin with")
    add_output(
        parser,
        "folder for the best model's files (as fxquant quantize writes them), its pipeline model.toml, "
        f"{REPORT} with all trials, and {SEARCH}/, which --resume goes on from",
    )
    parser.set_defaults(run=auto_quant)


def auto_quant(options: argparse.Namespace) -> int:
    """`fxquant autoquant`: 0 if the target is reached; 1 if not, and the best model is written all the same."""
    result = run_search(options, auto_quantize, (REPORT,), target=goal_of(options), iterations=options.iterations)
    return 0 if result.reached else 1
