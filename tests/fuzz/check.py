"""The property of a random program: it goes from torch to onnxruntime, and every code is what the simulation says.

refused     a documented guard said no (REFUSALS); counted by guard
fault       codes differ where they must not, or a stored constant is not the program's
crashed     anything else was raised, at any stage
"""

from __future__ import annotations

import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory

import fxquant
from fxquant.errors import CalibrationError, ExportError, FxquantError
from fxquant.graph.program import Program
from fxquant.graph.render import render
from fxquant.numerics.runtime import Level, RuntimeOptions
from fxquant.parity import ParityReport
from tests.fuzz.description import Description, RandomNet, batches_of, pipeline_of
from tests.fuzz.judge import Count, count, faults_of, standings

# What a guard says when it refuses a program, by the name that it is counted under.
REFUSALS: Mapping[str, tuple[type[FxquantError], str]] = {
    "accumulator beyond int32": (ExportError, r"int32 accumulator may reach"),
    "activation not finite": (CalibrationError, r"is not finite in batch"),
}


class Verdict(Enum):
    """How a program ended."""

    PASSED = "passed"
    REFUSED = "refused"
    FAULT = "fault"
    CRASHED = "crashed"

    @property
    def is_bad(self) -> bool:
        """Whether fxquant has a bug."""
        return self in (Verdict.FAULT, Verdict.CRASHED)


@dataclass(frozen=True)
class Plan:
    """What is compared: each simulation with onnxruntime at each level, on so many batches."""

    simulations: tuple[str, ...] = ("exact", "integer")
    levels: tuple[Level, ...] = (Level.ALL, Level.EXTENDED)
    batches: int = 2

    def options(self, level: Level) -> RuntimeOptions:
        """onnxruntime's options: one thread."""
        return RuntimeOptions(level, threads=1)


@dataclass(frozen=True)
class Outcome:
    """What became of one program.

    Arguments:
        verdict: how it ended.
        stage: the stage at which it ended ("capture" to "parity"); "" if it passed.
        text: of a refusal the guard's name, else what is wrong, with a traceback for a crash.
        codes: those at tensors that must be equal, over simulations, levels and batches.
        standings: quantized tensors by what is promised of them, over simulations and levels.
        seconds: seconds by stage.
    """

    verdict: Verdict
    stage: str = ""
    text: str = ""
    codes: Count = Count()
    standings: Counter[str] = field(default_factory=Counter)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The same for outcomes that are probably one bug: stage and first line, without numbers and names."""
        plain = re.sub(r"'[^']*'|\([^()]*\)|\[[^\[\]]*\]|[-+]?\d[\w.+-]*|\b\w*_\w+\b", "_", self.text.split("\n")[0])
        return f"{self.verdict.value} at {self.stage}: {plain[:120]}"


@dataclass
class Trial:
    """One program on its way, with everything that a report of a failure needs."""

    description: Description
    folder: Path
    plan: Plan
    stage: str = "build"
    program: Program | None = None
    reports: dict[str, ParityReport] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The ONNX file."""
        return self.folder / "model.onnx"

    def run(self) -> Outcome:
        """All stages, as far as it goes."""
        started = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                self._stages()
        except Exception as err:  # a crash of whatever kind is what is looked for
            return self._failed(err)
        finally:
            self.seconds["total"] = time.perf_counter() - started
        return self._judged()

    def printed(self) -> str:
        """The program's graph, or the description where there is none."""
        return str(self.description) if self.program is None else render(self.program)

    def _stages(self) -> None:
        net, batches = RandomNet(self.description), batches_of(self.description, self.plan.batches)
        pipeline = pipeline_of(self.description)
        self._enter("capture")
        self.program = fxquant.capture(net, batches[0], dynamic_batch=self.description.is_dynamic)
        self._enter("prepare")
        pipeline.prepare(self.program)
        self._enter("calibrate")
        fxquant.calibrate(self.program, batches, progress=False)
        self._enter("finalize")
        pipeline.finalize(self.program)
        self._enter("export")
        fxquant.export_onnx(self.program, self.path)
        for simulation in self.plan.simulations:
            for level in self.plan.levels:
                self._enter(f"parity {simulation} {level.value}")
                self.reports[f"{simulation} {level.value}"] = fxquant.check_parity(
                    self.program,
                    self.path,
                    batches,
                    simulation=simulation,
                    options=self.plan.options(level),
                    progress=False,
                )
        self._enter("end")

    def _enter(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now
        if self.stage in self.seconds:
            self.seconds[self.stage] = now - self.seconds[self.stage]
        self.stage = stage

    def _failed(self, err: Exception) -> Outcome:
        for name, (kind, pattern) in REFUSALS.items():
            if isinstance(err, kind) and re.search(pattern, str(err)):
                return Outcome(Verdict.REFUSED, self.stage, name, seconds=self.seconds)
        text = f"{type(err).__name__}: {err}\n" + "".join(traceback.format_exception(err))
        return Outcome(Verdict.CRASHED, self.stage, text, seconds=self.seconds)

    def _judged(self) -> Outcome:
        codes = sum(map(count, self.reports.values()), Count())
        standing = sum(map(standings, self.reports.values()), Counter[str]())
        found = {name: faults for name, report in self.reports.items() if (faults := faults_of(report))}
        if not found:
            return Outcome(Verdict.PASSED, "", "", codes, standing, self.seconds)
        text = "\n".join(fault for faults in found.values() for fault in faults)
        return Outcome(Verdict.FAULT, f"parity {next(iter(found))}", text, codes, standing, self.seconds)


DEFAULT_PLAN = Plan()


def check_program(description: Description, plan: Plan = DEFAULT_PLAN) -> Outcome:
    """Take a described program from torch to onnxruntime and judge it; nothing is left on disk."""
    with TemporaryDirectory(prefix="fxquant-fuzz-") as folder:
        return Trial(description, Path(folder), plan).run()
