"""Write a program's grids as an encodings file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fxquant.encodings.entry import Entry, Section, entry_of
from fxquant.encodings.formats import WRITERS, document
from fxquant.encodings.values import QuantizedValues
from fxquant.errors import ConfigError, nearest
from fxquant.files import write_text
from fxquant.graph.program import Program
from fxquant.lowering.lower import check_ranges

VERSIONS = tuple(WRITERS)


def save_encodings(program: Program, path: str | os.PathLike[str], version: str = "1.0.0") -> None:
    """Write the grids of every quantized value, parameter and bias of a calibrated or finalized program.

    Tensors are called as in the clean float model (`sim.export`): parameters by their state_dict paths, but for one
    whose path is also an output's or another value's name, which keeps it: in both files the parameter then has its
    node's name ("weight.1" beside an output "weight"). A value that shares a grid has an entry too; one whose FakeQuant
    is off has none. The file is put in place whole.

    Arguments:
        program: never changed; grids that follow weights are written as the weights are now.
        path: the file.
        version: "0.6.1", "1.0.0" or "2.0.0".

    Raises ConfigError for another version, ExportError that lists values without a grid, StorageError.
    """
    write_text(Path(path), encodings_text(program, version))


def encodings_text(program: Program, version: str) -> str:
    """The text of the file."""
    require_version(version)
    check_ranges(program)
    return json.dumps(document(entries_of(program), version), indent=2, allow_nan=False) + "\n"


def require_version(version: str) -> None:
    """ConfigError for a version that is not written."""
    if version not in VERSIONS:
        raise ConfigError(
            "encodings: version", expected=" or ".join(VERSIONS), got=version, remedy=nearest(version, VERSIONS)
        )


def entries_of(program: Program) -> list[Entry]:
    """An entry for each tensor behind a quantizer that is on, in graph order."""
    values = QuantizedValues(program)
    found: dict[str, Entry] = {}
    for value in values.all:
        if not values.is_off(value):
            section = Section.PARAMETERS if value.is_constant else Section.ACTIVATIONS
            entry = entry_of(value.name, section, values.encoding(value), value.rank)
            found.setdefault(value.name, entry)  # a tensor that is quantized twice on one grid
    return list(found.values())
