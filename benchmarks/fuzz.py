"""Random programs from torch to onnxruntime: no crash, and no differing code where the simulation promises codes.

Each program is drawn from (seed, number), quantized, exported and compared at every quantized tensor. A failure is
shrunk, printed and saved; the exit code is 1 where there was one, and where nothing was compared or too much refused.
"""

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import runner
from benchmarks.runner import Json, Verdict
from fxquant.errors import FxquantError
from fxquant.parity.simulation import SIMULATIONS
from fxquant.progress import track
from tests.fuzz.check import Outcome, Plan, check_program
from tests.fuzz.check import Verdict as Ending
from tests.fuzz.description import Description
from tests.fuzz.draw import draw_description, random_choices
from tests.fuzz.judge import Count, why_void
from tests.fuzz.repro import load_repro, save_repro
from tests.fuzz.shrink import Record, shrink

EXAMPLES = """examples:
  python -m benchmarks.fuzz                                          200 programs of seed 0
  python -m benchmarks.fuzz --examples 2000 --seed 7 --json fuzz.json --out fuzz/
  python -m benchmarks.fuzz --repro fuzz/7-113/description.json      one saved program again
"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    examples: int
    seed: int
    simulations: list[str]
    out: Path | None
    json: Path | None
    repro: Path | None
    most_trials: int

    @property
    def plan(self) -> Plan:
        """What is compared."""
        return Plan(tuple(self.simulations))


@dataclass(frozen=True)
class Failure:
    """A program that failed, as it was drawn and as small as it still fails in the same way."""

    number: int
    outcome: Outcome
    drawn: Description
    shrunk: Description

    def to_dict(self) -> dict[str, Json]:
        """The fields by name."""
        return {
            "number": self.number,
            "key": self.outcome.key,
            "text": self.outcome.text,
            "layers_drawn": len(self.drawn.layers),
            "shrunk": self.shrunk.to_json(),
        }

    def __str__(self) -> str:
        size = f"{len(self.drawn.layers)} layers, {len(self.shrunk.layers)} when shrunk"
        return f"program {self.number}: {self.outcome.key} ({size})\n{self.shrunk}\n{self.outcome.text.strip()}"


@dataclass
class Summary:
    """What was counted so far."""

    endings: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    standings: Counter[str] = field(default_factory=Counter)
    codes: Count = Count()

    def add(self, description: Description, outcome: Outcome) -> None:
        """Count one program."""
        self.endings[outcome.verdict.value] += 1
        self.operations.update({layer.kind for layer in description.layers})
        self.seconds.append(outcome.seconds["total"])
        self.codes += outcome.codes
        self.standings += outcome.standings
        if outcome.verdict is Ending.REFUSED:
            self.refusals[outcome.text] += 1

    @property
    def median_seconds(self) -> float:
        """Of a program."""
        return statistics.median(self.seconds)

    @property
    def high_seconds(self) -> float:
        """95 of 100 programs take less."""
        return sorted(self.seconds)[int(0.95 * (len(self.seconds) - 1))]

    def verdicts(self) -> list[Verdict]:
        """The promises."""
        count = sum(self.endings.values())
        refused = self.endings[Ending.REFUSED.value]
        crashed, faulty = self.endings[Ending.CRASHED.value], self.endings[Ending.FAULT.value]
        inherited = f", and {self.codes.inherited:,} overall" if self.codes.inherited else ""
        figures = (
            f"{self.codes.differing:,} of {self.codes.compared:,}{inherited}; {faulty} of {count} programs at fault"
        )
        void = why_void(count, refused, self.codes.compared)
        telling = f"{self.codes.compared:,} codes compared, {refused} of {count} programs refused"
        return [
            Verdict("0 crashes", crashed == 0, f"{crashed} of {count} programs"),
            Verdict("0 differing codes at certified nodes", faulty == 0 and self.codes.differing == 0, figures),
            Verdict("codes compared, few programs refused", not void, void or telling),
        ]

    def to_dict(self) -> dict[str, Json]:
        """The figures for the JSON file."""
        return {
            "programs": sum(self.endings.values()),
            "endings": dict(self.endings),
            "refusals": dict(self.refusals),
            "operations": dict(self.operations.most_common()),
            "tensors": dict(self.standings.most_common()),
            "codes_compared": self.codes.compared,
            "codes_differing": self.codes.differing,
            "codes_inherited": self.codes.inherited,
            "seconds": {"median": self.median_seconds, "p95": self.high_seconds, "total": sum(self.seconds)},
            "verdicts": [verdict.to_dict() for verdict in self.verdicts()],
        }

    def __str__(self) -> str:
        count = sum(self.endings.values())
        tensors = "\n".join(f"{number:7,} {name}" for name, number in self.standings.most_common())
        refusals = ", ".join(f"{number} {name}" for name, number in self.refusals.most_common()) or "none"
        rows = [[name, str(number), f"{number / count:.0%}"] for name, number in self.operations.most_common()]
        times = (
            f"median {self.median_seconds:.2f}, 95th percentile {self.high_seconds:.2f}, all {sum(self.seconds):.0f}"
        )
        return "\n".join(
            [
                runner.table(["operation", "programs", "share"], rows),
                "",
                f"programs: {count}; " + ", ".join(f"{number} {name}" for name, number in self.endings.most_common()),
                f"refused by: {refusals}",
                f"quantized tensors, over simulations and levels:\n{tensors}",
                f"seconds a program: {times}",
                *map(str, self.verdicts()),
            ]
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    options = parse(arguments)
    torch.set_num_threads(1)
    if options.repro is not None:
        return rerun(options.repro, options)
    facts = runner.environment(options.seed)
    print(runner.describe(facts), f"seed {options.seed}, simulations {', '.join(options.simulations)}", sep="\n")
    summary, failures = Summary(), list[Failure]()
    for number in track(range(options.examples), "fuzzing", total=options.examples):
        failure = one(number, options, summary, {failure.outcome.key for failure in failures})
        if failure is not None:
            failures.append(failure)
    print(f"\n{summary}")
    if options.json is not None:
        found: list[Json] = [failure.to_dict() for failure in failures]
        runner.write_json(options.json, {"environment": facts, **summary.to_dict(), "failures": found})
    return int(any(not verdict.is_kept for verdict in summary.verdicts()))


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--examples", type=runner.positive, default=200, help="programs (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the programs (default: 0)")
    parser.add_argument(
        "--simulations",
        nargs="+",
        choices=sorted(SIMULATIONS),
        default=["exact", "integer"],
        help="compared with onnxruntime (default: exact integer)",
    )
    parser.add_argument("--out", type=Path, help="save what fails to folders in this one, shrunk and as it was drawn")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--repro", type=Path, help="run a saved description (file or folder) instead, and print it")
    parser.add_argument(
        "--most-trials", type=runner.positive, default=300, help="programs tried while one is shrunk (default: 300)"
    )
    return Options(**vars(parser.parse_args(arguments)))


def one(number: int, options: Options, summary: Summary, known: set[str]) -> Failure | None:
    """Check program `number` and count it; a failure of a kind not `known` yet is shrunk, printed, saved, returned."""
    record = Record(random_choices(options.seed, number))
    description = draw_description(record)
    outcome = check_program(description, options.plan)
    summary.add(description, outcome)
    if not outcome.verdict.is_bad:
        return None
    if outcome.key in known:
        runner.progress(f"program {number}: {outcome.key}, as before")
        return None
    runner.progress(f"program {number}: {outcome.key}; shrinking")

    def fails_alike(candidate: Description) -> bool:
        return check_program(candidate, options.plan).key == outcome.key

    shrunk, _ = shrink(tuple(record.choices), fails_alike, options.most_trials)
    failure = Failure(number, check_program(shrunk, options.plan), description, shrunk)
    print(f"\n{failure}")
    if options.out is not None:
        folder = options.out / f"{options.seed}-{number}"
        save_repro(shrunk, folder, options.plan)
        save_repro(description, folder / "drawn", options.plan)
        runner.progress(f"saved to {folder}")
    return failure


def rerun(path: Path, options: Options) -> int:
    """Run a saved program again, and print how it ended; into `--out` if that is given."""
    try:
        description = load_repro(path)
    except (OSError, ValueError, FxquantError) as err:
        print(f"'{path}' is no saved description: {err}", file=sys.stderr)
        return 2
    if options.out is not None:
        outcome = save_repro(description, options.out, options.plan)
    else:
        outcome = check_program(description, options.plan)
    figures = f"{outcome.codes.differing:,} of {outcome.codes.compared:,} codes differ at certified nodes"
    print(f"{description}\n\n{outcome.verdict.value} {outcome.stage}: {figures}\n{outcome.text}")
    return int(outcome.verdict.is_bad)


if __name__ == "__main__":
    sys.exit(main())
