"""What accuracy-driven tuning found: the chosen configuration, all that were tried, and their Pareto front."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fxquant.files import together, write_text
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Program
from fxquant.tuning.configurations import Assignment, LeftOut
from fxquant.tuning.front_plot import front_plot
from fxquant.tuning.groups import Group
from fxquant.tuning.output import text_of, write_model
from fxquant.tuning.pareto import pareto_front
from fxquant.tuning.target import Drop, outcome_text, plain_target

PLOT, REPORT = "front.svg", "tuning.json"
WIDTH = 132
NO_WEIGHTS = " (activations alone: no weights)"
MOST_ROWS = 24  # of the chosen configuration's exceptions, in print


class Cost(Enum):
    """What a configuration is to have little of."""

    BIT_OPS = "bit-ops"
    LATENCY = "latency"

    def text(self, value: float) -> str:
        """A cost in words."""
        return f"{value:.4g}" if self is Cost.BIT_OPS else f"{value:.3f} ms"


@dataclass(frozen=True)
class TriedConfiguration:
    """One configuration that was evaluated.

    Arguments:
        name: "float" and other candidates' where all groups have it; else "search 7".
        assignment: the candidate of each group.
        score: of the model; None if it failed.
        cost: bit-operations of one sample, or milliseconds; None if it failed.
        seconds: for calibration, export and evaluation.
        spread: of the measured latency (fxquant.tuning.costs.Latency), as a fraction; 0 for bit-ops.
        reason: why it failed, or "".
        activation_bits: of what its groups read, summed, 32 for float; of equal costs the smaller sum is the better.
        is_baseline: whether it has candidates that were not asked for: shown to compare with, and never chosen.
    """

    name: str
    assignment: Assignment
    score: float | None
    cost: float | None
    seconds: float
    spread: float = 0.0
    reason: str = ""
    activation_bits: int = 0
    is_baseline: bool = False

    @property
    def counts(self) -> str:
        """How many groups have which candidate."""
        return ", ".join(f"{name} {count}" for name, count in sorted(Counter(self.assignment).items()))

    def __str__(self) -> str:
        if self.score is None or self.cost is None:
            return f"{self.name}: failed ({self.reason}), {self.seconds:.1f} s"
        return f"{self.name} ({self.counts}): score {self.score:.6g}, cost {self.cost:.6g}, {self.seconds:.1f} s"


@dataclass(frozen=True)
class EvaluatedPoint:
    """A configuration with its score and cost, as the front compares them."""

    trial: TriedConfiguration
    score: float
    cost: float

    @property
    def activation_bits(self) -> int:
        """The trial's."""
        return self.trial.activation_bits


def points_of(trials: Iterable[TriedConfiguration], *, baselines: bool = False) -> list[EvaluatedPoint]:
    """The trials that have a score; of baselines only if they are asked for."""
    return [
        EvaluatedPoint(trial, trial.score, trial.cost)
        for trial in trials
        if trial.score is not None and trial.cost is not None and (baselines or not trial.is_baseline)
    ]


@dataclass(frozen=True)
class TuningResult:
    """The configuration that reaches the target at the least cost, of equal costs that with the fewest activation
    bits; where none reaches it, the one with the best score.

    Arguments:
        program: calibrated; train it, or `export` it.
        pipeline: what made it of the captured model, on the same batches; `to_toml` writes it.
        chosen: its trial.
        float_score: of the float model, in torch.
        target: as it was asked for, and `threshold` the score that this means.
        cost_kind: what `cost` is.
        trials: every configuration that was evaluated, in order.
        groups: of operations, whose precision was chosen together.
        damages: what each group's candidate does to the output alone (fxquant.tuning.sensitivity), by its name.
        left_out: candidates that a group could not have.
        is_complete: False where the search ended because `max_trials` was reached.
    """

    program: Program
    pipeline: Pipeline
    chosen: TriedConfiguration
    float_score: float
    target: float | Drop
    threshold: float
    cost_kind: Cost
    trials: tuple[TriedConfiguration, ...]
    groups: tuple[Group, ...]
    damages: tuple[dict[str, float], ...]
    left_out: tuple[LeftOut, ...] = ()
    is_complete: bool = True

    @property
    def score(self) -> float:
        """Of the chosen configuration."""
        assert self.chosen.score is not None
        return self.chosen.score

    @property
    def cost(self) -> float:
        """Of the chosen configuration: bit-operations of one sample, or milliseconds."""
        assert self.chosen.cost is not None
        return self.chosen.cost

    @property
    def reached(self) -> bool:
        """Whether the chosen configuration reaches the target."""
        return self.score >= self.threshold

    @property
    def front(self) -> tuple[TriedConfiguration, ...]:
        """The configurations that no other one beats in score and cost (fxquant.tuning.pareto), by rising cost."""
        return tuple(point.trial for point in pareto_front(points_of(self.trials)))

    @property
    def points(self) -> list[EvaluatedPoint]:
        """The trials that have a score, baselines too."""
        return points_of(self.trials, baselines=True)

    def trial(self, name: str) -> TriedConfiguration | None:
        """The trial of that name ("float"), if there is one."""
        return next((trial for trial in self.trials if trial.name == name), None)

    def export(
        self, folder: str | Path, prefix: str = "model", *, opset: int = 21, encodings_version: str = "1.0.0"
    ) -> Path:
        """Write the chosen model (fxquant.sim.write_files), its pipeline as <prefix>.toml, and what `save` writes;
        returns the path of the integer ONNX file. All files take their places, or none.
        """
        place = Path(folder)
        with together():
            path = write_model(self.program, self.pipeline, place, prefix, opset, encodings_version)
            self.save(place)
        return path

    def save(self, folder: str | Path) -> None:
        """Write all that was tried as tuning.json, and the front as front.svg, a plot that any browser shows."""
        place = Path(folder)
        marked = {"chosen": self.chosen, **{item.name: item for item in self.front}}
        plot = front_plot(
            self.points,
            {trial.name for trial in marked.values()},
            self.chosen.name,
            self.threshold,
            f"{self.cost_kind.value}{'' if self.cost_kind is Cost.BIT_OPS else ', milliseconds'}",
        )
        with together():
            write_text(place / REPORT, json.dumps(self.to_dict(), indent=2) + "\n")
            write_text(place / PLOT, plot)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        front = {trial.name for trial in self.front}
        return {
            "reached": self.reached,
            "score": self.score,
            "cost": self.cost,
            "cost_kind": self.cost_kind.value,
            "float_score": self.float_score,
            "target": plain_target(self.target),
            "threshold": self.threshold,
            "is_complete": self.is_complete,
            "chosen": self.chosen.name,
            "groups": [
                {
                    "operations": list(group.names),
                    "has_weights": group.has_weights,
                    "candidate": name,
                    "damages": dict(damages),
                }
                for group, name, damages in zip(self.groups, self.chosen.assignment, self.damages, strict=True)
            ],
            "trials": [
                {**asdict(trial), "assignment": list(trial.assignment), "front": trial.name in front}
                for trial in self.trials
            ],
            "left_out": [asdict(item) for item in self.left_out],
            "pipeline": self.pipeline.to_toml(),
        }

    def __str__(self) -> str:
        return "\n".join([text_of(self._table(), WIDTH), "", *self._outcome(), *self._exceptions()])

    def _table(self) -> Table:
        table = Table("configuration", "groups", show_edge=False, pad_edge=False)
        for heading in ("score", "to float", self.cost_kind.value, "to float's"):
            table.add_column(heading, justify="right")
        for heading in ("target", "front", ""):
            table.add_column(heading)
        front = {trial.name for trial in self.front}
        for trial in self.trials:
            table.add_row(*map(escape, self._cells(trial, trial.name in front)))
        return table

    def _cells(self, trial: TriedConfiguration, is_front: bool) -> tuple[str, ...]:
        if trial.score is None or trial.cost is None:
            return (trial.name, trial.counts, "", "", "", "", "failed", "", trial.reason)
        reference = self.trial("float")
        share = "" if reference is None or not reference.cost else f"{trial.cost / reference.cost:.1%}"
        return (
            trial.name,
            trial.counts,
            f"{trial.score:.6g}",
            f"{trial.score - self.float_score:+.4g}",
            self.cost_kind.text(trial.cost),
            share,
            "reached" if trial.score >= self.threshold else "missed",
            "front" if is_front else "",
            "<- chosen" if trial is self.chosen else "baseline" if trial.is_baseline else "",
        )

    def _outcome(self) -> list[str]:
        outcome = outcome_text(self.target, self.threshold, self.score)
        cost = f"{self.cost_kind.value} {self.cost_kind.text(self.cost)}"
        lines = [f"{outcome} by '{self.chosen.name}' at {cost}; float {self.float_score:.6g}"]
        reference = self.trial("float")
        if not self.reached and reference is not None and (reference.score is None or reference.score < self.threshold):
            found = "failed" if reference.score is None else f"scored {reference.score:.6g}"
            lines.append(f"not even the model with all groups in float, run in the same way, reaches it: it {found}")
        if not self.is_complete:
            spent = sum(not trial.is_baseline for trial in self.trials)
            lines.append(f"the search ended at its budget of {spent} configurations; max_trials raises it")
        if self.cost_kind is Cost.LATENCY:
            worst = max((trial.spread for trial in self.trials), default=0.0)
            lines.append(f"latencies: medians of runs in turns with float's; spread at most {worst:.1%}")
        return lines

    def _exceptions(self) -> list[str]:
        """The groups that do not have the chosen configuration's most common candidate, worst damage first."""
        common = Counter(self.chosen.assignment).most_common(1)[0][0]
        rows = [
            (damages.get(common, 0.0), f"  {name}: {', '.join(group.names)}{'' if group.has_weights else NO_WEIGHTS}")
            for group, name, damages in zip(self.groups, self.chosen.assignment, self.damages, strict=True)
            if name != common
        ]
        rows.sort(key=lambda row: -row[0])
        more = [f"  and {len(rows) - MOST_ROWS} more"] if len(rows) > MOST_ROWS else []
        head = f"{common}, but for {len(rows)} of {len(self.groups)} groups:" if rows else f"{common} in all groups"
        return [head, *(text for _, text in rows[:MOST_ROWS]), *more]
