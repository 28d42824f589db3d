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
from fxquant.encodings import LoadedEncodings, load_encodings, save_encodings
from fxquant.encodings.save import require_version
from fxquant.evaluation import lowered
from fxquant.files import made_folder, make_folder, replacement, together, written
from fxquant.graph.batches import Batch
from fxquant.graph.manager import PassManager
from fxquant.graph.module import ProgramModule
from fxquant.graph.pipeline import Pipeline, load_pipeline
from fxquant.graph.program import FAKE_QUANTS, Program
from fxquant.graph.trace import PassTrace
from fxquant.lowering.clean import export_clean
from fxquant.lowering.export import export_onnx
from fxquant.lowering.lower import check_opset
from fxquant.parity import ParityReport, check_parity
from fxquant.schedule import Schedule
from fxquant.spec import SpecOverride
from fxquant.training.schedule_runner import ScheduleRunner


class QuantSim:
    """A model prepared for quantization simulation.

    Arguments:
        model: nn.Module (left untouched), ExportedProgram or GraphModule.
        example_inputs: a tensor, a tuple of tensors or a dict of keywords.
        config: name of a packaged pipeline, a path (.toml, or AIMET's .json), or a Pipeline.
        activation, weight: what to change of the config's specs of activations and weights, wherever it has them.
        schedule: of training; None for the config's.
        batches: for prepare passes that measure (smooth-quant); others need none.

    `schedule` says what `step_epoch` does; `epoch` counts the epochs done.
    """

    def __init__(
        self,
        model: torch.nn.Module | torch.export.ExportedProgram | fx.GraphModule,
        example_inputs: Any,
        config: str | os.PathLike[str] | Pipeline = "int8_per_channel",
        *,
        activation: SpecOverride | None = None,
        weight: SpecOverride | None = None,
        schedule: Schedule | None = None,
        batches: Iterable[Batch] | None = None,
    ) -> None:
        pipeline = config if isinstance(config, Pipeline) else load_pipeline(config)
        self.pipeline = pipeline.override(activation, weight)
        self.program: Program = capture(model, example_inputs)
        self.trace = self.pipeline.prepare(self.program, batches=batches)
        self.schedule = self.pipeline.schedule if schedule is None else schedule
        self.epoch = 0

    @property
    def model(self) -> ProgramModule:
        """The module that simulates quantization: train it, evaluate it, move it."""
        return self.program.module

    def compute_encodings(
        self,
        batches: Iterable[Batch],
        *,
        max_batches: int | None = None,
        through_quantizers: bool = False,
        progress: bool = True,
    ) -> None:
        """Calibrate on `batches` (fxquant.calibrate)."""
        calibrate(
            self.program, batches, max_batches=max_batches, through_quantizers=through_quantizers, progress=progress
        )

    def optimize(
        self,
        batches: Iterable[Batch],
        *,
        folder: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> PassTrace:
        """Run the config's post-training algorithms, if it has any, on the calibrated program (Pipeline.optimize)."""
        return self.pipeline.optimize(self.program, batches, folder=folder, progress=progress)

    def freeze_batch_norm(self) -> None:
        """Use running statistics from now on, in training mode too."""
        self._run("freeze-batch-norm")

    def freeze_encodings(self) -> None:
        """Stop all grids where they are."""
        self._run("freeze-observers")

    def step_epoch(self, optimizer: torch.optim.Optimizer | None = None) -> tuple[str, ...]:
        """Call it after each epoch of your own training loop: freezes what the schedule says is due, and divides the
        optimizer's learning rates; returns in words what it did (ScheduleRunner.step).
        """
        runner = ScheduleRunner(self.program, self.pipeline, self.schedule, self.epoch)
        actions = runner.step(optimizer)
        self.epoch = runner.epoch
        return actions

    def _run(self, name: str) -> None:
        PassManager([self.pipeline.make_pass(name)]).run(self.program)

    def snapshot(self) -> Program:
        """A finalized copy in eval mode, ready for export, at any time: training goes on as if nothing had happened."""
        return lowered(self.program, self.pipeline)

    def load_encodings(
        self, path: str | os.PathLike[str], *, strict: bool = True, freeze: bool = False
    ) -> LoadedEncodings:
        """Take the grids of an encodings file instead of calibrating, or before it (fxquant.load_encodings)."""
        return load_encodings(self.program, path, strict=strict, freeze=freeze)

    def export(
        self,
        folder: str | os.PathLike[str],
        prefix: str = "model",
        *,
        opset: int = 21,
        encodings_version: str = "1.0.0",
    ) -> Path:
        """Write a finalized copy into `folder` (`write_files`); returns the path of the integer ONNX file."""
        check_opset(opset)
        return write_files(self.snapshot(), Path(folder), prefix, opset=opset, encodings_version=encodings_version)

    def check_parity(self, path: str | os.PathLike[str], batches: Iterable[Batch]) -> ParityReport:
        """Compare a finalized copy with the ONNX file that `export` wrote."""
        return check_parity(self.snapshot(), path, batches)


def pair_names(prefix: str) -> tuple[str, str]:
    """Names of the ONNX file and of the program file that belong together."""
    return f"{prefix}.onnx", f"{prefix}.fxq"


def file_names(prefix: str) -> tuple[str, ...]:
    """Names of all files that `write_files` writes, the pair first."""
    return (*pair_names(prefix), f"{prefix}_float.onnx", f"{prefix}.encodings", f"{prefix}_state_dict.pth")


def write_files(
    program: Program, folder: Path, prefix: str = "model", *, opset: int = 21, encodings_version: str = "1.0.0"
) -> Path:
    """Write a finalized program into `folder`; returns the path of the first file.

        <prefix>.onnx, <prefix>.fxq    the integer model, and the program that it was lowered from
        <prefix>_float.onnx            the clean float model, for runtimes that import encodings
        <prefix>.encodings             the grids, by the names of the float model's tensors
        <prefix>_state_dict.pth        parameters and buffers as they are now (folded, trained), by the same names

    Raises ConfigError for an unknown version of encodings, ExportError or StorageError; the files that were there
    before are then as they were. All are written before the first takes its place, and each does so whole: a process
    that is killed in between leaves old and new ones side by side (check_parity tells for the first two).
    """
    names = file_names(prefix)
    require_version(encodings_version)
    onnx_path, program_path, float_path, encodings_path, state_path = (folder / name for name in names)
    with made_folder(folder, names), together():
        export_onnx(program, onnx_path, opset=opset)
        program.save(program_path)
        export_clean(program, float_path, opset=opset)
        save_encodings(program, encodings_path, encodings_version)
        save_state(program, state_path)
    return onnx_path


def save_state(program: Program, path: Path) -> None:
    """Write the program's parameters and buffers without its quantizers' (torch.load(weights_only=True) reads them)."""
    state = {
        name: tensor.detach().cpu()
        for name, tensor in program.module.state_dict().items()
        if not name.startswith(f"{FAKE_QUANTS}.")
    }
    with written(path), replacement(path) as file:
        torch.save(state, file)


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
