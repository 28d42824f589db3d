"""Checkpoints of training: one file with all that the next epoch depends on. No pickled code.

    format, version
    program         the program file's bytes (graph/storage.py): graph, modes, parameters, buffers, notes
    simulate        what the program's module computes
    optimizer       its class, the names of its groups' parameters, its state_dict
    pipeline        its passes, as TOML
    schedule, seed  as plain values
    history         the epochs that are done

Random numbers need no state: each epoch begins with generators seeded by (seed, epoch).
"""

from __future__ import annotations

import difflib
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxquant.errors import FxquantError, StorageError
from fxquant.files import replacement, written
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Program
from fxquant.graph.storage import load_program, save_program
from fxquant.schedule import DEFAULT_SCHEDULE, Schedule
from fxquant.training.history import EpochRecord

FORMAT = "fxquant training checkpoint"
VERSION = 1
_REMEDY = "Give what the checkpoint was trained with, or train into another folder."


@dataclass(frozen=True)
class Recipe:
    """What a run was asked for; a checkpoint is continued under the same recipe only."""

    pipeline: str
    schedule: Schedule
    seed: int


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer's class, the names of each group's parameters, and its state_dict."""

    kind: str
    parameters: tuple[tuple[str, ...], ...]
    state: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """Training after a number of epochs."""

    program: Program
    optimizer: OptimizerState
    recipe: Recipe
    history: tuple[EpochRecord, ...]


def recipe_of(pipeline: Pipeline, schedule: Schedule, seed: int) -> Recipe:
    """What a run with these is asked for."""
    return Recipe(pipeline.with_schedule(DEFAULT_SCHEDULE).to_toml(), schedule, seed)


def optimizer_state(optimizer: torch.optim.Optimizer, program: Program) -> OptimizerState:
    """An optimizer's state; raises FxquantError if it holds parameters that are not the program's."""
    names = {id(parameter): name for name, parameter in program.module.named_parameters()}
    groups = [group["params"] for group in optimizer.param_groups]
    strange = [parameter for group in groups for parameter in group if id(parameter) not in names]
    if strange:
        raise FxquantError(
            "train_qat: optimizer",
            expected="parameters of sim.model",
            got=f"{len(strange)} others, the first of shape {tuple(strange[0].shape)}",
            remedy="Make the optimizer of the groups that it is given: resuming replaces the model.",
        )
    parameters = tuple(tuple(names[id(parameter)] for parameter in group) for group in groups)
    return OptimizerState(type(optimizer).__name__, parameters, optimizer.state_dict())


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint, all or nothing. Raises StorageError if it cannot be written, or not be read again."""
    _require_plain(checkpoint.optimizer)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "program": _program_bytes(checkpoint.program),
        "simulate": checkpoint.program.simulate,
        "optimizer": vars(checkpoint.optimizer),
        "recipe": {**vars(checkpoint.recipe), "schedule": asdict(checkpoint.recipe.schedule)},
        "history": [asdict(record) for record in checkpoint.history],
    }
    with written(path), replacement(path) as file:
        torch.save(content, file)


def load_checkpoint(path: Path, *, trusted: Sequence[str] = ()) -> Checkpoint:
    """Read a checkpoint, its tensors on the CPU; `trusted` as for load_program. Raises StorageError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as err:
        got = str(err).partition("\n")[0]
        remedy = "Is it a checkpoint of train_qat, and was it copied whole?"
        raise StorageError("checkpoint cannot be read", place=str(path), got=got, remedy=remedy) from err
    if not isinstance(content, Mapping) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        expected = f"{FORMAT}, version {VERSION}"
        raise StorageError("no checkpoint", place=str(path), expected=expected, remedy="Train into another folder.")
    program = _program_of(content["program"], trusted)
    program.simulate = content["simulate"]
    recipe = content["recipe"]
    return Checkpoint(
        program,
        OptimizerState(**content["optimizer"]),
        Recipe(recipe["pipeline"], Schedule(**recipe["schedule"]), recipe["seed"]),
        tuple(EpochRecord.from_dict(record) for record in content["history"]),
    )


def require_same_run(checkpoint: Checkpoint, recipe: Recipe, program: Program) -> None:
    """Raise StorageError that names what differs, unless the checkpoint is of this model and recipe.

    The number of epochs may differ: a run can be continued for longer than it was planned.
    """
    saved = checkpoint.recipe
    if saved.pipeline != recipe.pipeline:
        raise _differs("config", *_first_difference(saved.pipeline, recipe.pipeline))
    for key, value in asdict(replace(saved.schedule, epochs=recipe.schedule.epochs)).items():
        if value != getattr(recipe.schedule, key):
            raise _differs(f"schedule.{key}", str(value), str(getattr(recipe.schedule, key)))
    if saved.seed != recipe.seed:
        raise _differs("seed", str(saved.seed), str(recipe.seed))
    shapes, given = _shapes(checkpoint.program), _shapes(program)
    for name in {**shapes, **given}:
        if shapes.get(name) != given.get(name):
            raise _differs(f"parameter '{name}'", shapes.get(name, "none"), given.get(name, "none"))


def restore_optimizer(optimizer: torch.optim.Optimizer, program: Program, saved: OptimizerState) -> None:
    """Give `optimizer` its state back; raises StorageError that names what differs in class or parameters."""
    found = optimizer_state(optimizer, program)
    if found.kind != saved.kind:
        raise _differs("optimizer", saved.kind, found.kind)
    if found.parameters != saved.parameters:
        pairs = zip(_listed(saved.parameters), _listed(found.parameters), strict=False)
        expected, got = next((pair for pair in pairs if pair[0] != pair[1]), ("more parameters", "fewer, or others"))
        raise _differs("optimizer's parameters", expected, got)
    optimizer.load_state_dict(saved.state)


def _differs(what: str, expected: str, got: str) -> StorageError:
    return StorageError(f"train_qat: {what} is not the checkpoint's", expected=expected, got=got, remedy=_REMEDY)


def _listed(parameters: tuple[tuple[str, ...], ...]) -> list[str]:
    return [f"'{name}' in group {number}" for number, names in enumerate(parameters) for name in names]


def _first_difference(expected: str, got: str) -> tuple[str, str]:
    """The first lines that differ, one of each text ("nothing" where one has none)."""
    removed = added = ""
    for line in difflib.ndiff(expected.splitlines(), got.splitlines()):
        if line.startswith("- "):
            removed = removed or line[2:]
        elif line.startswith("+ "):
            added = added or line[2:]
        elif line.startswith("  ") and (removed or added):
            break
    return removed or "nothing", added or "nothing"


def _shapes(program: Program) -> dict[str, str]:
    return {name: f"shape {tuple(parameter.shape)}" for name, parameter in program.module.named_parameters()}


def _program_bytes(program: Program) -> torch.Tensor:
    with tempfile.TemporaryDirectory(prefix="fxquant-") as folder:
        path = Path(folder) / "program.fxq"
        save_program(program, path)
        return torch.from_numpy(np.fromfile(path, dtype=np.uint8))


def _program_of(data: torch.Tensor, trusted: Sequence[str]) -> Program:
    with tempfile.TemporaryDirectory(prefix="fxquant-") as folder:
        path = Path(folder) / "program.fxq"
        path.write_bytes(data.numpy().tobytes())
        return load_program(path, trusted=trusted)


def _require_plain(optimizer: OptimizerState) -> None:
    """What torch.load(weights_only=True) would refuse is refused before it is written."""
    for place, value in _leaves(optimizer.state, "state_dict()"):
        if not (value is None or isinstance(value, (bool, int, float, str, torch.Tensor))):
            raise StorageError(
                f"optimizer {optimizer.kind} cannot be saved",
                place=place,
                expected="tensors, numbers and strings",
                got=type(value).__name__,
                remedy="Train without folder=, or with an optimizer whose state is plain.",
            )


def _leaves(value: Any, place: str) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{place}[{key!r}]")]
    if isinstance(value, (list, tuple)):
        return [leaf for index, item in enumerate(value) for leaf in _leaves(item, f"{place}[{index}]")]
    return [(place, value)]
