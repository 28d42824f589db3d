"""What learning the rounding of one ResNet18 block costs, beside AIMET's AdaRound: seconds, memory, error.

layer1.0 at its size in the network (64 channels, 56 x 56), 4-bit weights, equal samples, iterations, batch size and
learning rate, each in a process of its own, run after run in turns; ours once more as the pass is by default, comparing
256 of the 3,136 positions of each sample. AIMET lives in an environment of its own
(benchmarks/qat_step_peers.py makes it); without it our figures stand alone. The exit status is 1 where we are slower
than AIMET in the median of the rounds, where a loss does not fall, or where a weight is no grid point.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.peers.rounding import Learned
from benchmarks.qat_step_peers import FOLDER, PeerAbsent, command, find
from benchmarks.qat_step_rounds import Contender, ContenderFailed
from benchmarks.runner import Json, progress
from fxquant.files import write_text

OURS, SAMPLED, AIMET = "fxquant", "fxquant, 256 positions", "aimet"
SCRIPTS = {OURS: "fxquant_rounding.py", AIMET: "aimet_rounding.py"}
MEGABYTE = 2**20


@dataclass(frozen=True)
class Outcome:
    """Runs of each contender, round by round, and why others could not take part."""

    runs: Mapping[str, tuple[Learned, ...]]
    absent: Mapping[str, str]

    def seconds(self, name: str) -> float:
        """Median."""
        return statistics.median(run.seconds for run in self.runs[name])

    def ratio(self) -> float | None:
        """Our seconds over AIMET's, the median over rounds; None without it."""
        if AIMET not in self.runs:
            return None
        pairs = zip(self.runs[OURS], self.runs[AIMET], strict=True)
        return statistics.median(ours.seconds / theirs.seconds for ours, theirs in pairs)

    def faults(self) -> list[str]:
        """What is not as promised."""
        last, ratio = self.runs[OURS][-1], self.ratio()
        found = [f"fxquant takes {ratio:.2f} of AIMET's time"] if ratio is not None and ratio > 1 else []
        found += [f"a loss does not fall: {first:.4g} -> {end:.4g}" for first, end in last.losses or () if end >= first]
        return found + ([f"{last.off_grid} weights are no grid points"] if last.off_grid else [])

    def __str__(self) -> str:
        lines = [f"{'':22} {'seconds':>9} {'peak MiB':>9} {'output error':>13}   losses"]
        for name, runs in self.runs.items():
            losses = ", ".join(f"{first:.4g} -> {last:.4g}" for first, last in runs[-1].losses or ()) or "not told"
            peak = max(run.peak for run in runs) / MEGABYTE
            lines.append(f"{name:22} {self.seconds(name):9.2f} {peak:9.0f} {runs[-1].error:13.3e}   {losses}")
        lines += [f"{name:22} left out: {reason}" for name, reason in self.absent.items()]
        ratio = self.ratio()
        lines += [] if ratio is None else [f"fxquant / AIMET: {ratio:.2f} of the time (median of the rounds)"]
        return "\n".join(lines)


def commands(venvs: Path | None) -> dict[str, list[str] | str]:
    """What starts each contender, or why it cannot run."""
    ours = [sys.executable, str(FOLDER / SCRIPTS[OURS])]
    found: dict[str, list[str] | str] = {OURS: ours, SAMPLED: [*ours, "--positions=256"]}
    if venvs is None:
        return {**found, AIMET: "no --venvs"}
    try:
        interpreter = command(find(AIMET), venvs)[0]
    except PeerAbsent as absent:
        return {**found, AIMET: str(absent)}
    return {**found, AIMET: [interpreter, str(FOLDER / SCRIPTS[AIMET])]}


def measure(starts: Mapping[str, Sequence[str] | str], options: Sequence[str], rounds: int) -> Outcome:
    """Let contenders learn in turn; who fails is left out with the reason, but for ourselves (ContenderFailed)."""
    absent = {name: start for name, start in starts.items() if isinstance(start, str)}
    runs: dict[str, list[Learned]] = {}
    with contextlib.ExitStack() as stack:
        running: dict[str, Contender] = {}
        for name, start in starts.items():
            if not isinstance(start, str):
                running[name] = Contender(name, [*start, *options])
                stack.callback(running[name].close)
        for turn in range(rounds):
            for name in list(running):
                progress(f"round {turn + 1} of {rounds}: {name}")
                try:
                    if turn == 0:
                        running[name].wait_until_ready()
                    runs.setdefault(name, []).append(Learned(**json.loads(running[name].ask("learn"))))
                except ContenderFailed as failed:
                    if name != AIMET:
                        raise
                    del running[name]
                    runs.pop(name, None)
                    absent[name] = str(failed)
    return Outcome({name: tuple(found) for name, found in runs.items()}, absent)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaround_cost", description=__doc__)
    parser.add_argument("--venvs", type=Path, help="folder with AIMET's environment (default: ours alone)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--iterations", type=int, default=50, help="of each layer (default 50)")
    parser.add_argument("--samples", type=int, default=64, help="inputs of the block (default 64)")
    parser.add_argument("--size", type=int, default=56, help="height and width of one (default 56)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args(arguments)
    options = [f"--{name}={getattr(given, name)}" for name in ("iterations", "samples", "size", "threads")]
    found = measure(commands(given.venvs), options, given.rounds)
    print(found)
    if given.json is not None:
        write_text(given.json, json.dumps(to_dict(found), indent=2) + "\n")
    for fault in found.faults():
        print(f"FAULT: {fault}")
    return 1 if found.faults() else 0


def to_dict(found: Outcome) -> dict[str, Json]:
    """The figures for the JSON file."""
    runs: dict[str, Json] = {name: [asdict(run) for run in runs] for name, runs in found.runs.items()}
    return {"runs": runs, "left_out": dict(found.absent), "ratio": found.ratio(), "faults": list(found.faults())}


if __name__ == "__main__":
    sys.exit(main())
