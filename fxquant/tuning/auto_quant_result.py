"""What AutoQuant found: its trials, and the best of them; one table explains what helped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fxquant.errors import clipped
from fxquant.files import together, write_text
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Program
from fxquant.tuning.output import text_of, write_model
from fxquant.tuning.target import Drop, outcome_text, plain_target

WIDTH, REASON = 140, 90  # characters of the table's lines, and of a reason in it


class Verdict(Enum):
    """What became of a trial."""

    KEPT = "kept"
    REJECTED = "not kept"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Trial:
    """One step that was tried.

    Arguments:
        name: the step's.
        change: what it changes of the best pipeline before it, in words.
        verdict: what became of it.
        score: of the model; None if it has none.
        before: the best score before it; None if there was none.
        seconds: for calibration, algorithms, export and evaluation.
        size_bytes: of the ONNX file; None if it was not evaluated as one.
        reason: why it failed or was skipped, or "".
        pipeline: what it tried, as TOML; "" if there was none.
        fingerprint: of the finalized program, "" if there was none.
    """

    name: str
    change: str
    verdict: Verdict
    score: float | None = None
    before: float | None = None
    seconds: float = 0.0
    size_bytes: int | None = None
    reason: str = ""
    pipeline: str = ""
    fingerprint: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "verdict": self.verdict.value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trial:
        """The trial that `to_dict` and JSON made plain."""
        return cls(**{**values, "verdict": Verdict(values["verdict"])})

    def __str__(self) -> str:
        score = "" if self.score is None else f", score {self.score:.6g}"
        reason = f" ({clipped(self.reason, 200)})" if self.reason else ""
        return f"{self.name}: {self.verdict.value}{reason}{score}, {self.seconds:.1f} s"


@dataclass(frozen=True)
class AutoQuantResult:
    """The best model that was found.

    Arguments:
        program: calibrated and optimized; train it, or `export` it.
        pipeline: what made it of the captured model, on the same batches; `to_toml` writes it.
        score: of the program, lowered.
        float_score: of the float model.
        target: as it was asked for, and `threshold` the score that this means.
        trials: in the order in which they were tried.
        made_by: names of the kept steps without which `pipeline` would be another: later ones may replace earlier ones.
        untried: names of the steps that were not needed.
        folder: with trials.json and the best model's files; None if none was given.
    """

    program: Program
    pipeline: Pipeline
    score: float
    float_score: float
    target: float | Drop
    threshold: float
    trials: tuple[Trial, ...]
    made_by: tuple[str, ...]
    untried: tuple[str, ...] = ()
    folder: Path | None = None

    @property
    def reached(self) -> bool:
        """Whether the best score is the target's or better."""
        return self.score >= self.threshold

    def explain(self) -> str:
        """One table of what was tried and what helped, with a sentence on the outcome below."""
        return f"{_table(self)}\n{self._outcome()}"

    def __str__(self) -> str:
        return self.explain()

    def export(
        self, folder: str | Path, prefix: str = "model", *, opset: int = 21, encodings_version: str = "1.0.0"
    ) -> Path:
        """Write the best model (fxquant.sim.write_files), its pipeline as <prefix>.toml, and all that was tried as
        autoquant.json; returns the path of the integer ONNX file. All files take their places, or none.
        """
        place = Path(folder)
        with together():
            path = write_model(self.program, self.pipeline, place, prefix, opset, encodings_version)
            write_text(place / "autoquant.json", json.dumps(self.to_dict(), indent=2) + "\n")
        return path

    def to_dict(self) -> dict[str, Any]:
        """Scores, target, outcome and trials as plain values, for JSON."""
        return {
            "float_score": self.float_score,
            "target": plain_target(self.target),
            "threshold": self.threshold,
            "score": self.score,
            "reached": self.reached,
            "made_by": list(self.made_by),
            "pipeline": self.pipeline.to_toml(),
            "trials": [trial.to_dict() for trial in self.trials],
            "untried": list(self.untried),
        }

    def _outcome(self) -> str:
        makers = " + ".join(self.made_by) or "the config as it is"
        outcome = outcome_text(self.target, self.threshold, self.score)
        lines = [f"{outcome} by {makers}; float {self.float_score:.6g}"]
        if not self.reached and self.threshold > self.float_score:
            lines.append("the target lies above the float model's own score")
        if self.untried:
            lines.append(f"not needed: {', '.join(self.untried)}")
        return "\n".join(lines)


def _table(result: AutoQuantResult) -> str:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("trial", no_wrap=True)
    table.add_column("what changed", overflow="fold")
    for heading in ("score", "to float", "to best before", "seconds", "KB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    table.add_row("float", "", f"{result.float_score:.6g}", "", "", "", "", "")
    for trial in result.trials:
        table.add_row(*map(escape, _cells(trial, result)))
    return text_of(table, WIDTH)


def _cells(trial: Trial, result: AutoQuantResult) -> Sequence[str]:
    size = "" if trial.size_bytes is None else f"{trial.size_bytes / 1000:.1f}"
    score = "" if trial.score is None else f"{trial.score:.6g}"
    deltas = (_delta(trial.score, result.float_score), _delta(trial.score, trial.before))
    return (trial.name, trial.change, score, *deltas, f"{trial.seconds:.1f}", size, _verdict(trial, result))


def _verdict(trial: Trial, result: AutoQuantResult) -> str:
    if trial.reason:
        return f"{trial.verdict.value}: {clipped(trial.reason, REASON)}"
    if trial.verdict is not Verdict.KEPT or trial.score is None:
        return trial.verdict.value
    if trial.score >= result.threshold:
        return "kept, target reached"
    return "kept" if trial.name in result.made_by else "kept, replaced later"


def _delta(score: float | None, other: float | None) -> str:
    return "" if score is None or other is None else f"{score - other:+.4g}"
