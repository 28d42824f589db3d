"""The small runner under every benchmark: interleaved timing, the machine's description, JSON written atomically."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypeAlias

import torch

from fxquant.errors import FxquantError
from fxquant.files import write_text
from fxquant.spec import parse_estimator

MEASURED_PACKAGES = (
    "fxquant",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "numpy",
    "pillow",
)
INTEGER_ISA = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimddp",
    "i8mm",
)

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


@dataclass(frozen=True)
class Timings:
    """Seconds of each named call, round by round; `seconds[a][i]` and `seconds[b][i]` were measured back to back."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Median of the rounds in seconds."""
        return statistics.median(self.seconds[name])

    def minimum(self, name: str) -> float:
        """Fastest round in seconds."""
        return min(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """Median over the rounds of `name`'s time divided by `base`'s in the same round.

        Pairing cancels what a neighbour does to both: a slow second slows both halves of a pair.
        """
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(mine / other for mine, other in pairs)

    def minimum_ratio(self, name: str, base: str) -> float:
        """`name`'s fastest round divided by `base`'s: on a busy machine the least disturbed figure."""
        return self.minimum(name) / self.minimum(base)

    def to_dict(self) -> dict[str, Json]:
        """Medians and minima in seconds, and the number of rounds."""
        return {
            name: {
                "median_seconds": self.median(name),
                "min_seconds": self.minimum(name),
                "rounds": len(rounds),
            }
            for name, rounds in self.seconds.items()
        }


@dataclass(frozen=True)
class Verdict:
    """A promise, whether it was kept, and the figures that say so."""

    promise: str
    is_kept: bool
    figures: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.is_kept else 'FAIL'} {self.promise}: {self.figures}"

    def to_dict(self) -> dict[str, Json]:
        """The fields by name."""
        return {"promise": self.promise, "kept": self.is_kept, "figures": self.figures}


def interleave(calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3) -> Timings:
    """Time the calls in turn, A B C A B C ..., after `warmup` unmeasured rounds; wall clock.

    Raises ValueError for fewer than one round or no call.
    """
    if rounds < 1 or not calls:
        raise ValueError(f"interleave: expected at least 1 round and 1 call, got {rounds} and {len(calls)}")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmup + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if number >= warmup:
                seconds[name].append(elapsed)
    return Timings({name: tuple(rounds_of) for name, rounds_of in seconds.items()})


def environment(seed: int) -> dict[str, Json]:
    """What a figure depends on: versions, processor and its integer ISA, threads, load, seed, command, commit."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in MEASURED_PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_integer_isa": [flag for flag in INTEGER_ISA if flag in _cpu_flags()],
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "seed": seed,
        "commit": _commit(),
    }


def describe(facts: Mapping[str, Json]) -> str:
    """`environment`'s facts in two lines for a person."""
    versions = facts["versions"]
    assert isinstance(versions, dict)
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    isa, load = facts["cpu_integer_isa"], facts["load_average"]
    assert isinstance(isa, list) and isinstance(load, list)
    flags = " ".join(str(flag) for flag in isa) or "none of the known integer instructions"
    averages = " ".join(f"{value:.1f}" for value in load if isinstance(value, float))
    machine = f"{facts['cpu']} ({flags}), {facts['cpu_count']} cores, load average {averages}"
    return f"{machine}\nPython {facts['python']}, {named}"


def write_json(path: Path, document: Mapping[str, Json]) -> None:
    """Write `document` to `path` so that a reader sees the old file or the whole new one, never a part."""
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def progress(message: str) -> None:
    """One line on stderr, so that stdout holds the tables alone."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A text table: columns as wide as their widest cell, the first one left-aligned, the others right-aligned."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rendered = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([rendered[0], "  ".join("-" * width for width in widths), *rendered[1:]])


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {value}")
    return value


def estimator(text: str) -> str:
    """A range estimator as QuantSpec.estimator takes it, for argparse."""
    try:
        parse_estimator(text)
    except FxquantError as err:
        raise argparse.ArgumentTypeError(str(err)) from err
    return text


def cpu_model() -> str:
    """The processor's marketing name, or what the platform calls it."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return set((_cpu_field("flags") or _cpu_field("Features")).split())


def _cpu_field(key: str) -> str:
    """The first value of `key` in /proc/cpuinfo, or "" (also where there is no such file)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    values = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key)
    return next(values, "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit with "+" for uncommitted changes, or None outside git."""
    folder = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        outcome = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return outcome.stdout.strip() or None
