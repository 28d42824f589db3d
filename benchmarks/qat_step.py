"""What a step of quantization-aware training costs: its time over that of the float network, and its peak memory.

Every contender is a process with the same network, batch and optimizer; they take steps in turn, a round at a time,
and the figure is the median of a round's ratios, beside the quarter points between which half of the rounds lie. Peak
memory is that of a whole process since it was ready to train. Peers run in environments of their own
(`benchmarks/qat_step_peers.py` makes them); whoever cannot run is listed with the reason.

    live     batch norm in training mode, the folded weight simulated, all outputs quantized
    folded   batch norm folded first
    learned  live, with learned ranges of activations (LSQ+)
    exact    live, in the exact simulation
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import runner
from benchmarks.qat_step_peers import peers
from benchmarks.qat_step_rounds import Race, race
from benchmarks.qat_step_worker import FORMS
from benchmarks.runner import Json, Verdict

BASE = "float"
LIMITS = {"resnet18": 1.15, "mobilenet_v2": 1.4}  # of `live`
MEBIBYTE = 2.0**20

EXAMPLES = """examples:
  python -m benchmarks.qat_step                                 both networks, batch 8 at 224 x 224, 1 thread
  python -m benchmarks.qat_step --venvs ~/peers --rounds 21     beside the peers that are installed there
  python -m benchmarks.qat_step --networks resnet18 --forms live learned --compile
  python -m benchmarks.qat_step --batch 32 --size 160 --threads 4 --json step.json
"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    networks: list[str]
    forms: list[str]
    compile: bool
    venvs: Path | None
    batch: int
    size: int
    rounds: int
    threads: int
    json: Path | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 where a step costs more than promised, or could not be measured."""
    options = parse(arguments)
    facts = runner.environment(seed=0)
    print(runner.describe(facts))
    shared = [f"--{name}={getattr(options, name)}" for name in ("batch", "size", "threads")]
    races = [race(network, commands(options), shared, options.rounds) for network in options.networks]
    for one in races:
        print(f"\n{render(one)}\n")
    verdicts = [judge(one) for one in races if "live" in options.forms]
    print(*verdicts, sep="\n")
    if options.json is not None:
        runner.write_json(options.json, document(facts, options, races, verdicts))
    return int(any(not verdict.is_kept for verdict in verdicts) or any(BASE not in one.seconds for one in races))


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.qat_step",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    networks, forms = list(LIMITS), [form for form in FORMS if form != BASE]
    parser.add_argument("--networks", nargs="+", choices=networks, default=networks, help="which (default: all)")
    parser.add_argument("--forms", nargs="*", choices=forms, default=forms, help="of fxquant (default: all)")
    parser.add_argument("--compile", action="store_true", help="float and live once more, by torch.compile")
    parser.add_argument("--venvs", type=Path, help="folder of the peers' environments; without it they are left out")
    parser.add_argument("--batch", type=runner.positive, default=8, help="images in a batch (default: 8)")
    parser.add_argument("--size", type=runner.positive, default=224, help="their height and width (default: 224)")
    parser.add_argument("--rounds", type=runner.positive, default=9, help="steps that are measured (default: 9)")
    parser.add_argument("--threads", type=runner.positive, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    return Options(**vars(parser.parse_args(arguments)))


def commands(options: Options) -> dict[str, Sequence[str] | str]:
    """By contender, what starts it or why it cannot be started; the float network first."""
    worker = [sys.executable, "-m", "benchmarks.qat_step_worker", "--form"]
    found: dict[str, Sequence[str] | str] = {form: [*worker, form] for form in (BASE, *options.forms)}
    if options.compile:
        found |= {f"{form} compiled": [*worker, form, "--compile"] for form in (BASE, "live")}
    return found if options.venvs is None else found | dict(peers(options.venvs))


def judge(one: Race) -> Verdict:
    """What fxquant aims at, against what was measured."""
    limit = LIMITS[one.network]
    promise = f"{one.network}: a step with live batch norm at most {limit:g} times the float network's"
    missing = [name for name in (BASE, "live") if name not in one.seconds]
    if missing:
        return Verdict(promise, False, f"not measured: {one.failures[missing[0]]}")
    ratio = one.ratio("live", BASE)
    return Verdict(promise, ratio <= limit, f"{ratio:.3f}")


def render(one: Race) -> str:
    """One row a contender, and below who was left out."""
    rows = [_row(one, name) for name in one.seconds]
    header = [one.network, "step ms", "x float", "half of rounds", "peak MiB", "x float"]
    left_out = [f"{name}: left out: {reason}" for name, reason in one.failures.items()]
    notes = [f"{name}: {note}" for name, note in one.notes.items() if name in one.seconds]
    return "\n".join([runner.table(header, rows), *notes, *left_out])


def _row(one: Race, name: str) -> list[str]:
    fastest, peak = f"{1e3 * min(one.seconds[name]):.0f}", f"{one.peaks[name] / MEBIBYTE:.0f}"
    if BASE not in one.seconds:
        return [name, fastest, "-", "-", peak, "-"]
    first, third = one.spread(name, BASE)
    spread = f"{first:.3f} - {third:.3f}"
    return [name, fastest, f"{one.ratio(name, BASE):.3f}", spread, peak, f"{one.peaks[name] / one.peaks[BASE]:.3f}"]


def document(
    facts: dict[str, Json], options: Options, races: Sequence[Race], verdicts: Sequence[Verdict]
) -> dict[str, Json]:
    """The figures for the JSON file."""
    settings: dict[str, Json] = {name: getattr(options, name) for name in ("batch", "size", "threads", "rounds")}
    networks: dict[str, Json] = {one.network: one.to_dict(BASE) for one in races}
    return {
        "environment": facts,
        **settings,
        "networks": networks,
        "verdicts": [verdict.to_dict() for verdict in verdicts],
    }


if __name__ == "__main__":
    sys.exit(main())
