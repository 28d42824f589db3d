"""Rounds of training steps in several processes: each takes one step in turn, so that a busy second hits all of them.

`benchmarks/peers/contender.py` has the protocol.
"""

import contextlib
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.runner import Json, progress

ROOT = Path(__file__).resolve().parents[1]
WARMUP = 2


class ContenderFailed(Exception):
    """A contender cannot train; its text is the reason, on one line."""


class Contender:
    """A process that takes a training step whenever it is asked to."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def wait_until_ready(self) -> str:
        """Its note."""
        kind, _, text = self._answer().partition(" ")
        if kind != "READY":
            raise ContenderFailed(text or "it ended without a word")
        return text

    def step(self) -> float:
        """Seconds of one training step."""
        return float(self.ask("step"))

    def peak(self) -> int:
        """Most bytes that it held since it was ready."""
        return int(self.ask("peak"))

    def close(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            _pipe(pipe).close()
        self.process.wait()

    def ask(self, request: str) -> str:
        """Its answer to a request, one line; ContenderFailed if it has none."""
        try:
            print(request, file=_pipe(self.process.stdin), flush=True)
        except BrokenPipeError as error:
            raise ContenderFailed(f"it ended before '{request}'") from error
        answer = self._answer()
        if not answer or answer.startswith("FAILED"):
            raise ContenderFailed(answer.removeprefix("FAILED ") or f"it ended at '{request}'")
        return answer

    def _answer(self) -> str:
        return _pipe(self.process.stdout).readline().strip()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@dataclass(frozen=True)
class Race:
    """One network: seconds of each contender's steps, round by round, its peak memory, and its note.

    `failures` says of those that could not take part why.
    """

    network: str
    seconds: Mapping[str, tuple[float, ...]]
    peaks: Mapping[str, int]
    notes: Mapping[str, str]
    failures: Mapping[str, str]

    def ratios(self, name: str, base: str) -> list[float]:
        """`name`'s step over `base`'s in the same round, sorted."""
        return sorted(mine / other for mine, other in zip(self.seconds[name], self.seconds[base], strict=True))

    def ratio(self, name: str, base: str) -> float:
        """Median of them."""
        return statistics.median(self.ratios(name, base))

    def spread(self, name: str, base: str) -> tuple[float, float]:
        """The quarter points of them: half of the rounds lie between."""
        found = self.ratios(name, base)
        return found[len(found) // 4], found[-1 - len(found) // 4]

    def to_dict(self, base: str) -> dict[str, Json]:
        """The figures for the JSON file."""
        contenders: dict[str, Json] = {
            name: {
                "note": self.notes[name],
                "ratio": self.ratio(name, base),
                "quartiles": list(self.spread(name, base)),
                "seconds": list(self.seconds[name]),
                "peak_bytes": self.peaks[name],
            }
            for name in self.seconds
        }
        return {"contenders": contenders, "left_out": dict(self.failures)}


def race(network: str, commands: Mapping[str, Sequence[str] | str], options: Sequence[str], rounds: int) -> Race:
    """Let contenders take steps in turn.

    Arguments:
        commands: what starts each, or why it cannot be started.
        options: of the protocol, for all of them.
        rounds: steps that count, after WARMUP others.
    """
    failures = {name: command for name, command in commands.items() if isinstance(command, str)}
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    notes: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        running: dict[str, Contender] = {}
        for name, command in commands.items():
            if not isinstance(command, str):
                progress(f"{network}: prepare {name}")
                contender = Contender(name, [*command, "--net", network, *options])
                stack.callback(contender.close)
                with _left_out(name, running, failures):
                    notes[name] = contender.wait_until_ready()
                    running[name] = contender
        progress(f"{network}: {rounds} rounds of {len(running)} steps")
        for turn in range(-WARMUP, rounds):
            for name, contender in list(running.items()):
                with _left_out(name, running, failures):
                    taken = contender.step()
                    if turn >= 0:
                        seconds.setdefault(name, []).append(taken)
        for name, contender in list(running.items()):
            with _left_out(name, running, failures):
                peaks[name] = contender.peak()
    ended = {name: tuple(seconds[name]) for name in running}
    return Race(network, ended, peaks, notes, failures)


@contextlib.contextmanager
def _left_out(name: str, running: dict[str, Contender], failures: dict[str, str]) -> Iterator[None]:
    """A contender that fails is left out, with its reason; the others go on."""
    try:
        yield
    except ContenderFailed as failed:
        running.pop(name, None)
        failures[name] = str(failed)
        print(f"{name}: left out: {failed}", file=sys.stderr)
