"""What the results of both searches write and print: the found model with its pipeline, and tables as plain text."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fxquant.evaluation import lowered
from fxquant.files import write_text
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Program
from fxquant.lowering.lower import check_opset
from fxquant.sim import write_files


def write_model(
    program: Program, pipeline: Pipeline, folder: Path, prefix: str, opset: int, encodings_version: str
) -> Path:
    """Write a calibrated program, lowered (fxquant.sim.write_files), and its pipeline as <prefix>.toml."""
    check_opset(opset)
    path = write_files(lowered(program, pipeline), folder, prefix, opset=opset, encodings_version=encodings_version)
    write_text(folder / f"{prefix}.toml", pipeline.to_toml())
    return path


def text_of(table: Table, width: int) -> str:
    """A table in lines of at most `width` characters, without colours."""
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
