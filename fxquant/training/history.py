"""What a training run did, epoch by epoch, as values and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CHECKPOINT, HISTORY, BEST = "checkpoint.pt", "history.json", "best"


@dataclass(frozen=True)
class EpochRecord:
    """One epoch.

    Arguments:
        epoch: its number, from 1.
        loss: mean over the epoch's batches.
        score: of the lowered model after the epoch, the higher the better; None if there was no evaluation.
        learning_rates: of each parameter group, during the epoch.
        actions: what was frozen and divided after it, in words.
        seconds: what it took, evaluation included.
    """

    epoch: int
    loss: float
    score: float | None
    learning_rates: tuple[float, ...]
    actions: tuple[str, ...]
    seconds: float

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EpochRecord:
        """The record that `asdict` and JSON made plain."""
        tuples = {key: tuple(values[key]) for key in ("learning_rates", "actions")}
        return cls(**{**values, **tuples})

    def __str__(self) -> str:
        score = "" if self.score is None else f", score {self.score:.6g}"
        actions = "".join(f"; {action}" for action in self.actions)
        return f"epoch {self.epoch}: loss {self.loss:.6g}{score}, {self.seconds:.1f} s{actions}"


@dataclass(frozen=True)
class TrainingResult:
    """A finished run: its epochs, and the folder with its files (None if none was given)."""

    history: tuple[EpochRecord, ...]
    folder: Path | None = None

    @property
    def best(self) -> EpochRecord | None:
        """The epoch of the highest score, the first of equals; None without evaluation."""
        return best_of(self.history)

    @property
    def best_path(self) -> Path | None:
        """The lowered model of the best epoch; its program lies beside it as .fxq."""
        return None if self.folder is None or self.best is None else self.folder / f"{BEST}.onnx"

    @property
    def checkpoint_path(self) -> Path | None:
        """What a resumed run starts from."""
        return None if self.folder is None else self.folder / CHECKPOINT

    def __str__(self) -> str:
        lines = [str(record) for record in self.history]
        if self.best is not None:
            lines.append(f"best: epoch {self.best.epoch}, score {self.best.score:.6g}")
        return "\n".join(lines)


def best_of(history: Sequence[EpochRecord]) -> EpochRecord | None:
    """The record of the highest score, the first of equals; None if none has a score."""
    scored = [record for record in history if record.score is not None]
    return max(scored, key=lambda record: record.score or 0.0) if scored else None


def history_text(history: Sequence[EpochRecord]) -> str:
    """The history as JSON."""
    best = best_of(history)
    content = {"best_epoch": None if best is None else best.epoch, "epochs": [asdict(record) for record in history]}
    return json.dumps(content, indent=1) + "\n"
