"""QuantSim: the verbs that AIMET's users know, over a Program and a Pipeline."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxquant.calibration import calibrate
from fxquant.capture import capture
from fxquant.files import make_folder, together
from fxquant.graph.batches import Batch
from fxquant.graph.manager import PassManager
from fxquant.graph.module import ProgramModule
from fxquant.graph.pipeline import Pipeline, load_pipeline
from fxquant.graph.program import Program
from fxquant.lowering.export import export_onnx
from fxquant.parity import ParityReport, check_parity


class QuantSim:
    """A model prepared for quantization simulation.

    Arguments:
        model: nn.Module (left untouched), ExportedProgram or GraphModule.
        example_inputs: a tensor, a tuple of tensors or a dict of keywords.
        config: name of a packaged pipeline, a path, or a Pipeline.
    """

    def __init__(
        self,
        model: torch.nn.Module | torch.export.ExportedProgram | fx.GraphModule,
        example_inputs: Any,
        config: str | os.PathLike[str] | Pipeline = "int8_per_channel",
    ) -> None:
        self.pipeline = config if isinstance(config, Pipeline) else load_pipeline(config)
        self.program: Program = capture(model, example_inputs)
        self.trace = self.pipeline.prepare(self.program)

    @property
    def model(self) -> ProgramModule:
        """The module that simulates quantization: train it, evaluate it, move it."""
        return self.program.module

    def compute_encodings(
        self, batches: Iterable[Batch], *, max_batches: int | None = None, progress: bool = True
    ) -> None:
        """Calibrate on `batches` (fxquant.calibrate)."""
        calibrate(self.program, batches, max_batches=max_batches, progress=progress)

    def freeze_batch_norm(self) -> None:
        """Use running statistics from now on, in training mode too."""
        self._run("freeze-batch-norm")

    def freeze_encodings(self) -> None:
        """Stop all grids where they are."""
        self._run("freeze-observers")

    def _run(self, name: str) -> None:
        PassManager([self.pipeline.make_pass(name)]).run(self.program)

    def snapshot(self) -> Program:
        """A finalized copy, ready for export; this simulation is not disturbed."""
        twin = self.program.copy()
        self.pipeline.finalize(twin)
        return twin

    def export(self, folder: str | os.PathLike[str], prefix: str = "model", *, opset: int = 21) -> Path:
        """Write `<prefix>.onnx` and `<prefix>.fxq` of a finalized copy into `folder`; returns the ONNX file's path."""
        make_folder(Path(folder))
        return write_pair(self.snapshot(), Path(folder), prefix, opset=opset)

    def check_parity(self, path: str | os.PathLike[str], batches: Iterable[Batch]) -> ParityReport:
        """Compare a finalized copy with the ONNX file that `export` wrote."""
        return check_parity(self.snapshot(), path, batches)


def pair_names(prefix: str) -> tuple[str, str]:
    """Names of the ONNX file and of the program file that belong together."""
    return f"{prefix}.onnx", f"{prefix}.fxq"


def write_pair(program: Program, folder: Path, prefix: str = "model", *, opset: int = 21) -> Path:
    """Write a program as `<prefix>.onnx` and `<prefix>.fxq` into `folder`, both or neither; returns the former's path.

    Raises ExportError or StorageError; the pair that was there before is then as it was.
    """
    onnx_name, program_name = pair_names(prefix)
    make_folder(folder, (onnx_name, program_name))
    with together():
        export_onnx(program, folder / onnx_name, opset=opset)
        program.save(folder / program_name)
    return folder / onnx_name
