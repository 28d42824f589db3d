"""The files of an AutoQuant run: the record of its trials, the best model, and what is half done."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from fxquant.errors import FxquantError
from fxquant.files import remove, together, write_text
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Program
from fxquant.graph.storage import load_program
from fxquant.sim import write_pair

LOG, BEST, CALIBRATED, UNFINISHED = "trials.json", "best", "calibrated.fxq", "unfinished"


@dataclass(frozen=True)
class AutoQuantFiles:
    """What lies in a run's folder; without one nothing is kept.

    trials.json                       fxquant.trials.TrialLog
    best.onnx, best.fxq, best.toml    the best model so far, the program it was lowered from, and its pipeline
    calibrated.fxq                    the same program before finalize
    unfinished/                       what algorithms have done of the running trial
    """

    folder: Path | None

    @property
    def log(self) -> Path | None:
        """The file of trials."""
        return None if self.folder is None else self.folder / LOG

    def keep(self, program: Program, finalized: Program, pipeline: Pipeline) -> None:
        """Write the best model's files, all or none."""
        if self.folder is None:
            return
        with together():
            write_pair(finalized, self.folder, BEST)
            write_text(self.folder / f"{BEST}.toml", pipeline.to_toml())
            program.save(self.folder / CALIBRATED)

    def kept(self) -> Program | None:
        """The best program before finalize; None if it is gone, damaged, or calls what only its own package has."""
        if self.folder is None:
            return None
        try:
            return load_program(self.folder / CALIBRATED)
        except FxquantError:
            return None

    def unfinished(self, pipeline: str) -> Path | None:
        """Where the trial of a pipeline keeps what it has done."""
        if self.folder is None:
            return None
        return self.folder / UNFINISHED / hashlib.sha256(pipeline.encode()).hexdigest()[:16]

    def forget(self, unfinished: Path | None) -> None:
        """Remove what a trial that is recorded has kept."""
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)

    def clear(self) -> None:
        """Remove an earlier run's files, but for the record of trials."""
        if self.folder is None:
            return
        for name in (f"{BEST}.onnx", f"{BEST}.fxq", f"{BEST}.toml", CALIBRATED):
            remove(self.folder / name)
        shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)
