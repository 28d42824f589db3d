"""A failing program on disk, so that it can be looked at and run again.

description.json    what to rebuild it from (`read_description`), the seed included
outcome.txt         what is wrong
graph.txt           the printed graph, as far as it got
model.onnx          if it was exported
parity.txt          the reports, if it was compared
"""

from __future__ import annotations

from pathlib import Path

from fxquant.files import make_folder, write_text
from tests.fuzz.check import DEFAULT_PLAN, Outcome, Plan, Trial
from tests.fuzz.description import Description, read_description

DESCRIPTION = "description.json"


def save_repro(description: Description, folder: Path, plan: Plan = DEFAULT_PLAN) -> Outcome:
    """Run a program once more and leave everything about it in `folder`, which is made."""
    make_folder(folder)
    trial = Trial(description, folder, plan)
    outcome = trial.run()
    write_text(folder / DESCRIPTION, description.to_json())
    write_text(folder / "outcome.txt", f"{outcome.verdict.value} {outcome.stage}\n{description}\n\n{outcome.text}\n")
    write_text(folder / "graph.txt", trial.printed())
    if trial.reports:
        write_text(folder / "parity.txt", "\n\n".join(map(str, trial.reports.values())) + "\n")
    return outcome


def load_repro(path: Path) -> Description:
    """The description in a repro's folder, or in its JSON file."""
    file = path / DESCRIPTION if path.is_dir() else path
    return read_description(file.read_text(encoding="utf-8"))
