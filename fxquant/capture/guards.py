"""What torch.export decided from the example's shapes: fixed sizes, ranges of the symbolic ones, conditions on them."""

from __future__ import annotations

import re

from torch import fx
from torch.export import ExportedProgram

from fxquant.capture.naming import SizeNames
from fxquant.graph.program import Note, NoteKind, value_type


def guard_notes(program: ExportedProgram, graph: fx.Graph, sizes: SizeNames) -> list[Note]:
    """Notes for fixed sizes of each input, bounded symbols, and conditions.

    A range that starts at 2 is torch.export's habit and says nothing; capture compares batch 1 with the model itself.
    """
    notes = [note for node in graph.nodes if node.op == "placeholder" for note in _fixed_sizes(node)]
    for symbol, bounds in program.range_constraints.items():
        lower, upper = int(bounds.lower), str(bounds.upper)
        name = sizes.rename(str(symbol))
        bounded = upper.isdigit()  # torch writes "no upper bound" as int_oo
        if lower > 2 or bounded:
            limit = f" and at most {upper}" if bounded else ""
            notes.append(Note(NoteKind.GUARD, "", f"size {name} must be at least {lower}{limit}"))
    for code in getattr(program, "_guards_code", ()):
        notes.append(Note(NoteKind.GUARD, "", f"condition on the inputs: {_readable(code)}"))
    return notes


def _fixed_sizes(node: fx.Node) -> list[Note]:
    kind = value_type(node)
    if kind is None:
        return []
    fixed = [f"{axis} is {size}" for axis, size in enumerate(kind.shape) if isinstance(size, int)]
    return [Note(NoteKind.GUARD, node.name, f"fixed sizes: axis {', axis '.join(fixed)}")] if fixed else []


def _readable(code: str) -> str:
    return re.sub(r"L\['(\w+)'\]", r"\1", code)
