"""train_qat: a plain training loop for those who have none of their own; QuantSim.step_epoch serves the others.

An epoch: batches, QuantSim.step_epoch, evaluation of the lowered model, files. Random generators are seeded by
(seed, epoch) when it begins, so that whatever ran before it, evaluation or another process, does not change it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fxquant.errors import CalibrationError, ConfigError, FxquantError, StorageError
from fxquant.evaluation import Evaluate, require_evaluated_on, score_of
from fxquant.files import make_folder, remove, replacement, together, write_text, written
from fxquant.graph.program import Program, Stage
from fxquant.lowering.export import export_onnx
from fxquant.progress import track
from fxquant.schedule import Schedule
from fxquant.sim import QuantSim, pair_names
from fxquant.training.checkpoint import (
    Checkpoint,
    Recipe,
    encode_checkpoint,
    load_checkpoint,
    optimizer_state,
    recipe_of,
    require_same_run,
    restore_optimizer,
)
from fxquant.training.distributed import is_synchronised
from fxquant.training.history import BEST, CHECKPOINT, HISTORY, EpochRecord, TrainingResult, best_of, history_text
from fxquant.training.parameter_groups import parameter_groups
from fxquant.training.schedule_runner import learning_rates
from fxquant.training.seeding import plain_seed, seed_epoch

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]
Loss = Callable[[torch.nn.Module, Any], torch.Tensor]
MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
EVALUATED_ON = ("onnxruntime", "exact")


def train_qat(
    sim: QuantSim,
    batches: Batches,
    loss: Loss,
    *,
    evaluate: Evaluate | None = None,
    evaluate_on: Literal["onnxruntime", "exact"] = "onnxruntime",
    optimizer: MakeOptimizer = torch.optim.Adam,
    schedule: Schedule | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    report: Callable[[EpochRecord], None] | None = None,
    progress: bool = True,
) -> TrainingResult:
    """Train `sim.model` by the schedule; `sim` is then at the last epoch.

        train_qat(sim, loader, lambda model, batch: cross_entropy(model(batch[0]), batch[1]), evaluate=accuracy)

    Arguments:
        sim: calibrated, or anything of the same config and model where a checkpoint is resumed.
        batches: iterated anew for each epoch (a list; a DataLoader, whose generators are seeded for it), or a callable
            that takes the epoch, from 0, and gives its batches.
        loss: takes the model, in train mode, and a batch as it came, and gives a scalar to minimise. It calls the
            model itself: tuples, dicts, autocast, teachers and devices are its own affair.
        evaluate: takes a callable like the model, but lowered, after each epoch; gives a score, the higher the better.
        evaluate_on: "onnxruntime": the exported file, tensors on the CPU. "exact": the finalized program in `exact`
            simulation, in eval mode without gradients, where the model is (CUDA).
        optimizer: makes the optimizer of the groups of `fxquant.parameter_groups`. Adam's steps are as long as the
            learning rate whatever the scale of loss and gradients, which differs between weights and ranges.
        schedule: becomes `sim.schedule`; None for the one that is there.
        folder: gets checkpoint.pt, history.json and, of the best epoch, best.onnx and best.fxq after each epoch;
            without one nothing is kept.
        resume: continue from the folder's checkpoint, if it has one; its program replaces `sim.program` and its model.
        overwrite: remove the files of the folder's earlier run.
        seed: together with the epoch, of torch's (CUDA's too), numpy's and Python's generators.
        report: is given the record of each epoch, once its files are written.
        progress: show a progress bar when standard error is a terminal.

    A kill, Ctrl-C or an error loses at most the running epoch. Raises FxquantError for a loss or parameters that are
    not finite, CalibrationError for a program that cannot be trained, or that several processes train together
    (fxquant.synchronise): this is a loop of one process. StorageError for a folder that holds another run.
    """
    seed = plain_seed(seed)
    _check_arguments(batches, evaluate_on, resume, overwrite)
    _require_one_process(sim.program)
    sim.schedule = sim.schedule if schedule is None else schedule
    recipe = recipe_of(sim.pipeline, sim.schedule, seed)
    files = _Files(None if folder is None else Path(folder))
    checkpoint = files.open(sim.program, resume, overwrite)
    _begin(sim, checkpoint, recipe)
    made = optimizer(parameter_groups(sim.program, sim.schedule.learning_rate, sim.schedule.range_learning_rate))
    optimizer_state(made, sim.program)  # refuses other parameters before an epoch is spent on them
    if checkpoint is not None:
        restore_optimizer(made, sim.program, checkpoint.optimizer)
    run = _Run(sim, made, batches, loss, evaluate, evaluate_on, seed, progress)
    history = checkpoint.history if checkpoint is not None else ()
    while sim.epoch < sim.schedule.epochs:
        record, lowered = run.epoch()
        history = (*history, record)
        state = Checkpoint(sim.program, optimizer_state(made, sim.program), recipe, history)
        files.write(state, lowered if best_of(history) is record else None)
        if report is not None:
            report(record)
    return TrainingResult(history, files.folder)


def _check_arguments(batches: Batches, evaluate_on: str, resume: bool, overwrite: bool) -> None:
    if isinstance(batches, Iterator):
        raise ConfigError(
            "train_qat: batches",
            expected="what can be iterated anew for each epoch, or a callable that takes the epoch",
            got=f"an iterator ({type(batches).__name__}), which is used up after one",
            remedy="Give the loader itself, a list, or lambda epoch: batches_of(epoch).",
        )
    require_evaluated_on(evaluate_on, "train_qat", EVALUATED_ON)
    if resume and overwrite:
        raise ConfigError("train_qat", expected="resume or overwrite", got="both", remedy="Choose one of them.")


def _require_one_process(program: Program) -> None:
    """Its files, and the program that a checkpoint replaces it by, are those of one process."""
    if is_synchronised(program):
        raise CalibrationError(
            "train_qat",
            expected="a program of one process",
            got="one that fxquant.synchronise made several processes train together",
            remedy="Train it in a loop of your own with DistributedDataParallel, and sim.step_epoch after each epoch.",
        )


def _begin(sim: QuantSim, checkpoint: Checkpoint | None, recipe: Recipe) -> None:
    """Bring `sim` to where training starts: as it is, or as the checkpoint left it."""
    if checkpoint is None:
        if sim.program.stage is not Stage.CALIBRATED:
            early = sim.program.stage < Stage.CALIBRATED
            remedy = "Call sim.compute_encodings(batches) first." if early else "Train before finalize."
            got = str(sim.program.stage)
            raise CalibrationError("train_qat", expected="a calibrated program", got=got, remedy=remedy)
        sim.epoch = 0
        return
    require_same_run(checkpoint, recipe, sim.program)
    device = next((parameter.device for parameter in sim.model.parameters()), torch.device("cpu"))
    checkpoint.program.module.to(device)
    sim.program, sim.epoch = checkpoint.program, len(checkpoint.history)


@dataclass(frozen=True)
class _Files:
    """What a run writes, if it has a folder."""

    folder: Path | None

    def open(self, program: Program, resume: bool, overwrite: bool) -> Checkpoint | None:
        """Make the folder ready; returns the checkpoint that training is to continue from, if there is one."""
        if self.folder is None:
            if resume:
                raise ConfigError("train_qat: resume=True", expected="folder=", got="none")
            return None
        names = (CHECKPOINT, HISTORY, *pair_names(BEST))
        make_folder(self.folder, names)
        if resume:
            path = self.folder / CHECKPOINT
            return load_checkpoint(path, trusted=_packages(program)) if path.exists() else None
        for path in (self.folder / name for name in names):
            if overwrite:
                remove(path)
            elif path.exists():
                raise StorageError(
                    f"train_qat: '{path}' is there already",
                    expected="a folder without an earlier run",
                    remedy="resume=True continues that run, overwrite=True removes it; or train into another folder.",
                )
        return None

    def write(self, checkpoint: Checkpoint, best: Program | None) -> None:
        """Write what is kept after an epoch, all or nothing; after a kill, the checkpoint is never ahead."""
        if self.folder is None:
            return
        encoded, path = encode_checkpoint(checkpoint), self.folder / CHECKPOINT
        onnx_name, program_name = pair_names(BEST)
        with together():
            if best is not None:
                export_onnx(best, self.folder / onnx_name)
                best.save(self.folder / program_name)
            write_text(self.folder / HISTORY, history_text(checkpoint.history))
            with written(path), replacement(path) as file:
                file.writelines(encoded)


@dataclass(frozen=True)
class _Run:
    """What stays the same from epoch to epoch."""

    sim: QuantSim
    optimizer: torch.optim.Optimizer
    batches: Batches
    loss: Loss
    evaluate: Evaluate | None
    evaluate_on: Literal["onnxruntime", "exact"]
    seed: int
    progress: bool

    def epoch(self) -> tuple[EpochRecord, Program | None]:
        """Train one epoch, and evaluate; returns its record, and the finalized program that was evaluated."""
        start, rates = time.perf_counter(), learning_rates(self.optimizer)
        seed_epoch(self.seed, self.sim.epoch, self.batches)
        loss = self._train()
        self._require_finite_parameters()
        actions = self.sim.step_epoch(self.optimizer)
        lowered = None if self.evaluate is None else self.sim.snapshot()
        score = None if lowered is None else self._score(lowered)
        seconds = time.perf_counter() - start
        return EpochRecord(self.sim.epoch, loss, score, rates, actions, seconds), lowered

    def _train(self) -> float:
        """One epoch of steps; returns the mean loss."""
        number, total, count = self.sim.epoch + 1, 0.0, 0
        batches = self.batches(self.sim.epoch) if callable(self.batches) else self.batches

        def text() -> str:
            return f"epoch {number} of {self.sim.schedule.epochs}" + (f", loss {total / count:.4g}" if count else "")

        self.sim.model.train()
        show = self.progress and sys.stderr.isatty()
        with closing(track(batches, text, show=show)) as bar:
            for batch in bar:
                total += self._step(batch, count)
                count += 1
        if not count:
            remedy = "Give what can be iterated anew for each epoch."
            raise FxquantError(f"train_qat: epoch {number}", expected="batches", got="none", remedy=remedy)
        return total / count

    def _step(self, batch: Any, index: int) -> float:
        place = f"epoch {self.sim.epoch + 1}, batch {index}"
        self.optimizer.zero_grad()
        loss = self.loss(self.sim.model, batch)
        if not (isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.requires_grad):
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            got += ", without gradient" if isinstance(loss, torch.Tensor) and not loss.requires_grad else ""
            remedy = "loss(model, batch) calls the model, and reduces to one number (a mean)."
            raise FxquantError(
                f"train_qat: loss in {place}", expected="a scalar tensor with gradient", got=got, remedy=remedy
            )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FxquantError(
                f"train_qat: loss in {place}", expected="a finite number", got=str(value), remedy=self._remedy()
            )
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped
        self.optimizer.step()
        return value

    def _require_finite_parameters(self) -> None:
        """The last step of an epoch is followed by no loss that would tell."""
        for name, parameter in self.sim.model.named_parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter).all()):
                raise FxquantError(
                    f"train_qat: parameter '{name}' after epoch {self.sim.epoch + 1}",
                    expected="finite numbers",
                    got="NaN or Inf",
                    remedy=self._remedy(),
                )
        self.optimizer.zero_grad()

    def _remedy(self) -> str:
        kept = f" What epoch {self.sim.epoch} left is kept." if self.sim.epoch else ""
        return f"Lower the learning rate (now {max(learning_rates(self.optimizer)):g}), or look at that batch.{kept}"

    def _score(self, program: Program) -> float:
        assert self.evaluate is not None
        return score_of(program, self.evaluate, self.evaluate_on, f"train_qat: score after epoch {self.sim.epoch}")


def _packages(program: Program) -> list[str]:
    """Packages whose functions the program's own graph calls: a checkpoint of it may call them, too."""
    modules = {getattr(node.target, "__module__", "") for node in program.graph.nodes if node.op == "call_function"}
    return sorted({str(module).partition(".")[0] for module in modules} - {""})
