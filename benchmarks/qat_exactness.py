"""Codes in which a trained program's last `exact` evaluation differs from onnxruntime, net by net: 0.

Each row trains a small net on scikit-learn's digits under quantization (tests/training/nets.py, 32 steps), then
compares the program as it stands in eval mode with its export: activations in the `exact` and the `integer` simulation,
weights, biases, outputs, and all of them again after `finalize` in place. It exits with 1 where a code differs that is
promised: behind a float island, which is named, `exact` may round otherwise, and `integer` may not. A row in which
nothing was learned says so.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import runner
from benchmarks.runner import Json, progress
from tests.training.exactness import BATCH_NORMS, BITS, HELD_BACK, RANGES, TRAINED, Difference, Recipe, compare, trained
from tests.training.nets import NETS, examples

EXAMPLES = """examples:
  python -m benchmarks.qat_exactness                                        every net, range, batch norm and bit width
  python -m benchmarks.qat_exactness --nets residual nested --ranges lsq+ --json exactness.json
"""


@dataclass(frozen=True)
class Outcome:
    """One row: what was trained, what differed, and how long it took."""

    recipe: Recipe
    losses: tuple[float, float]
    has_learned: bool
    difference: Difference
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table and its totals; 1 if any code differs that is promised."""
    options = parse(arguments)
    torch.set_num_threads(1)
    recipes = [Recipe(*names) for names in itertools.product(options.nets, options.ranges, options.norms, options.bits)]
    outcomes = []
    for index, recipe in enumerate(recipes):
        outcomes.append(run(recipe))
        progress(f"{index + 1}/{len(recipes)} {recipe}: {outcomes[-1].difference.total} differ")
    facts = runner.environment(0)
    print(f"{runner.describe(facts)}\n\n{text(outcomes)}")
    if options.json is not None:
        runner.write_json(options.json, document(facts, outcomes))
    return int(any(one.difference.broken for one in outcomes))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.qat_exactness",
        description=__doc__.partition("\n")[0] if __doc__ else "",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    choices = {"nets": [*NETS], "ranges": [*RANGES], "norms": [*BATCH_NORMS], "bits": [*BITS]}
    for name, known in choices.items():
        parser.add_argument(f"--{name}", nargs="+", default=known, choices=known, metavar=name.upper())
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args(arguments)


def run(recipe: Recipe) -> Outcome:
    """Train and compare."""
    start = time.perf_counter()
    found = trained(recipe)
    images, _ = examples(recipe.net, HELD_BACK, TRAINED)
    with tempfile.TemporaryDirectory() as folder:
        difference = compare(found.sim, images, Path(folder))
    seconds = time.perf_counter() - start
    return Outcome(recipe, (found.loss_before, found.loss), found.has_learned, difference, seconds)


def text(outcomes: Sequence[Outcome]) -> str:
    """The table, and its total."""
    rows = [
        [
            one.recipe.net,
            one.recipe.ranges,
            one.recipe.batch_norm,
            one.recipe.bits,
            f"{one.losses[0]:.2f} -> {one.losses[1]:.2f}" + ("" if one.has_learned else " (nothing learned)"),
            f"{one.difference.compared:,}",
            str(one.difference.total),
            ", ".join((*one.difference.islands, *one.difference.uncertified)) or "-",
        ]
        for one in outcomes
    ]
    header = ["net", "ranges", "batch norm", "bits", "loss", "codes compared", "differing", "not promised"]
    names = ("compared", "total", "broken")
    compared, differing, broken = (sum(getattr(one.difference, name) for one in outcomes) for name in names)
    total = (
        f"total: {differing:,} of {compared:,} differ in {len(outcomes)} rows, {broken:,} of those that are promised"
    )
    return f"{runner.table(header, rows)}\n\n{total}"


def document(facts: dict[str, Json], outcomes: Sequence[Outcome]) -> dict[str, Json]:
    """The figures for the JSON file."""
    rows: list[Json] = [
        {
            **vars(one.recipe),
            "losses": list(one.losses),
            "has_learned": one.has_learned,
            "compared": one.difference.compared,
            "differing": dict(one.difference.differing),
            "uncertified": list(one.difference.uncertified),
            "islands": list(one.difference.islands),
            "seconds": one.seconds,
        }
        for one in outcomes
    ]
    return {"environment": facts, "rows": rows, "broken": sum(one.difference.broken for one in outcomes)}


if __name__ == "__main__":
    sys.exit(main())
