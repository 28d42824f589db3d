"""PassTrace: what each pass of a run did, with the graph before and after it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from fxquant.errors import FxquantError, nearest
from fxquant.files import make_folder, write_text
from fxquant.graph.passes import Pass
from fxquant.graph.program import Stage
from fxquant.graph.render import diff_texts
from fxquant.graph.rewriter import Edit, Miss


@dataclass(frozen=True)
class Picture:
    """A printed graph, kept as lines: what a pass left alone is the same string objects before and after it."""

    stage: Stage
    lines: tuple[str, ...]  # a header, then one line a node

    @property
    def text(self) -> str:
        """The printed graph, as `render` gives it."""
        return "\n".join(self.lines) + "\n"

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return len(self.lines) - 1


@dataclass(frozen=True)
class PassEntry:
    """One pass of a run."""

    item: Pass
    edits: tuple[Edit, ...]
    misses: tuple[Miss, ...]
    seconds: float
    before: Picture
    after: Picture

    @property
    def pass_name(self) -> str:
        """Name of the pass."""
        return self.item.name

    @property
    def modified(self) -> bool:
        """Whether the pass recorded any edit."""
        return bool(self.edits)

    @property
    def options(self) -> dict[str, str]:
        """The pass's options, in words."""
        names: list[str] = [option.name for option in fields(self.item)] if is_dataclass(self.item) else []
        return {name: str(getattr(self.item, name)) for name in names}

    def diff(self) -> str:
        """A unified diff of the printed graph; "" when the pass changed nothing that prints."""
        return diff_texts(self.before.text, self.after.text, f"before {self.pass_name}", f"after {self.pass_name}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the printed graphs."""
        return {
            "pass": self.pass_name,
            "options": self.options,
            "contract": self.item.contract.value,
            "modified": self.modified,
            "edits": [{"action": edit.action, "subject": edit.subject, "text": edit.text} for edit in self.edits],
            "misses": [{"node": miss.node, "place": miss.place, "reason": miss.reason} for miss in self.misses],
            "seconds": self.seconds,
            "nodes_before": self.before.nodes,
            "nodes_after": self.after.nodes,
            "stage_before": str(self.before.stage),
            "stage_after": str(self.after.stage),
        }


@dataclass(frozen=True)
class PassTrace:
    """What a run of passes did; `print(trace)` gives a table, then the near misses with their reasons."""

    start: Picture
    entries: tuple[PassEntry, ...]

    @property
    def seconds(self) -> float:
        """Time of all passes."""
        return sum(entry.seconds for entry in self.entries)

    @property
    def misses(self) -> tuple[tuple[str, Miss], ...]:
        """Every near miss, with the name of its pass."""
        return tuple((entry.pass_name, miss) for entry in self.entries for miss in entry.misses)

    def entry(self, pass_name: str) -> PassEntry:
        """The first entry of the pass called `pass_name`; an unknown name is an error with the nearest one."""
        return self._entries_of(pass_name)[0]

    def _entries_of(self, pass_name: str) -> list[PassEntry]:
        found = [entry for entry in self.entries if entry.pass_name == pass_name]
        if not found:
            names = {entry.pass_name for entry in self.entries}
            raise FxquantError(f"pass '{pass_name}' is not in the trace", remedy=nearest(pass_name, names))
        return found

    def diff(self, pass_name: str) -> str:
        """The diff that the pass called `pass_name` made; one after the other if it ran several times."""
        return "".join(entry.diff() for entry in self._entries_of(pass_name))

    def dump(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write the printed graphs to numbered files, `00_captured.txt` first, then a .txt and a .diff for each pass.

        The folder is made if need be; `trace.txt` holds the table. Returns the files written.

        Raises StorageError if they cannot be written.
        """
        place = Path(folder)
        make_folder(place)
        written: list[Path] = []

        def write(name: str, text: str) -> None:
            path = place / name
            write_text(path, text)
            written.append(path)

        write(f"00_{self.start.stage}.txt", self.start.text)
        for number, entry in enumerate(self.entries, 1):
            write(f"{number:02d}_{entry.pass_name}.txt", entry.after.text)
            write(f"{number:02d}_{entry.pass_name}.diff", entry.diff())
        write("trace.txt", f"{self}\n")
        return written

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the printed graphs."""
        return {"seconds": self.seconds, "passes": [entry.to_dict() for entry in self.entries]}

    def __str__(self) -> str:
        header = ("pass", "edits", "misses", "nodes", "stage", "seconds", "what")
        rows = [header, *(_row(entry) for entry in self.entries)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"not done by {name}: {miss}" for name, miss in self.misses]
        return "\n".join(lines)

    def __iter__(self) -> Iterator[PassEntry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def _row(entry: PassEntry) -> tuple[str, ...]:
    counts = Counter(edit.action for edit in entry.edits)
    nodes = (
        f"{entry.before.nodes} -> {entry.after.nodes}"
        if entry.before.nodes != entry.after.nodes
        else f"{entry.after.nodes}"
    )
    what = ", ".join(f"{action} {count}" for action, count in sorted(counts.items()))
    return (
        entry.pass_name,
        str(len(entry.edits)),
        str(len(entry.misses)),
        nodes,
        str(entry.after.stage),
        f"{entry.seconds:.3f}",
        what or "nothing",
    )
