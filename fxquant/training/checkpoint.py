"""Checkpoints of training: one file with all that the next epoch depends on. No pickled code.

A line with format, version and SHA-256 of what follows, which is a dict that torch.load(weights_only=True) reads:

    program         the program file's bytes (graph/storage.py): graph, modes, parameters, buffers, notes
    simulate        what the program's module computes
    optimizer       its class, the names of its groups' parameters, its state_dict
    recipe          the pipeline's passes as TOML; schedule and seed as plain values
    history         the epochs that are done

Random numbers need no state: each epoch begins with generators seeded by (seed, epoch).
"""

from __future__ import annotations

import difflib
import hashlib
import io
import pickle
import re
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxquant.errors import FxquantError, StorageError, clipped
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Program
from fxquant.graph.storage import load_program, save_program
from fxquant.schedule import DEFAULT_SCHEDULE, Schedule
from fxquant.training.history import EpochRecord

FORMAT = "fxquant training checkpoint"
VERSION = 1
_REMEDY = "Give what the checkpoint was trained with, or train into another folder."
_HEAD = re.compile(rf"{FORMAT}, version {VERSION}, SHA-256 ([0-9a-f]{{64}})\n".encode())
_DECODING = (  # what torch.load and building objects raise for content that they do not expect
    *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, ImportError),
    *(OSError, EOFError, RuntimeError, pickle.UnpicklingError, FxquantError),
)


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


def encode_checkpoint(checkpoint: Checkpoint) -> tuple[bytes, memoryview]:
    """A checkpoint's file, in two parts. Raises StorageError for what could not be read again."""
    kind = checkpoint.optimizer.kind
    content = {
        "program": _program_bytes(checkpoint.program),
        "simulate": checkpoint.program.simulate,
        "optimizer": {**vars(checkpoint.optimizer), "state": _plain(checkpoint.optimizer.state, "state_dict()", kind)},
        "recipe": {**vars(checkpoint.recipe), "schedule": asdict(checkpoint.recipe.schedule)},
        "history": [asdict(record) for record in checkpoint.history],
    }
    payload = io.BytesIO()
    torch.save(content, payload)
    digest = hashlib.sha256(payload.getbuffer()).hexdigest()
    return f"{FORMAT}, version {VERSION}, SHA-256 {digest}\n".encode(), payload.getbuffer()


def load_checkpoint(path: Path, *, trusted: Sequence[str] = ()) -> Checkpoint:
    """Read a checkpoint, its tensors on the CPU; `trusted` as for load_program. Raises StorageError."""
    payload = _read(path)
    try:
        content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        recipe = content["recipe"]
        program = _program_of(content["program"], trusted, path)
        program.simulate = content["simulate"]
        return Checkpoint(
            program,
            OptimizerState(**content["optimizer"]),
            Recipe(recipe["pipeline"], Schedule(**recipe["schedule"]), recipe["seed"]),
            tuple(EpochRecord.from_dict(record) for record in content["history"]),
        )
    except StorageError:
        raise
    except _DECODING as err:
        got = f"{type(err).__name__}: {clipped(str(err).partition(chr(10))[0], 120)}"
        raise _unreadable(path, "what train_qat writes", got) from err


def _read(path: Path) -> bytes:
    """What follows the head, once it is found to be what was written."""
    try:
        with path.open("rb") as file:
            head, payload = file.readline(200), file.read()
    except OSError as err:
        raise _unreadable(path, "a file", err.strerror or str(err)) from err
    match, digest = _HEAD.fullmatch(head), hashlib.sha256(payload).hexdigest()
    if match is None:
        got = clipped(head.decode("ascii", "replace").strip()) or "nothing"
        raise _unreadable(path, f"{FORMAT}, version {VERSION}", got)
    expected = match[1].decode()
    if digest != expected:
        raise _unreadable(path, f"SHA-256 {expected[:12]}", f"SHA-256 {digest[:12]}")
    return payload


def _unreadable(path: Path, expected: str, got: str) -> StorageError:
    remedy = "Is it a checkpoint of train_qat, and was it copied whole? If not, train anew with overwrite=True."
    return StorageError("checkpoint cannot be read", place=str(path), expected=expected, got=got, remedy=remedy)


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
    with _temporary_file() as file:
        save_program(program, file)
        return torch.from_numpy(np.fromfile(file, dtype=np.uint8))


def _program_of(data: torch.Tensor, trusted: Sequence[str], path: Path) -> Program:
    with _temporary_file() as file:
        file.write_bytes(data.numpy().data)
        try:
            return load_program(file, trusted=trusted)
        except StorageError as err:
            place = err.place.replace(str(file), str(path))
            raise StorageError(err.thing, place=place, expected=err.expected, got=err.got, remedy=err.remedy) from err


@contextmanager
def _temporary_file() -> Iterator[Path]:
    """Where a program file can lie for the block. Raises StorageError if there is no room for it."""
    try:
        with tempfile.TemporaryDirectory(prefix="fxquant-") as folder:
            yield Path(folder) / "program.fxq"
    except OSError as err:
        remedy = "Free some space there, or set TMPDIR to another folder."
        raise StorageError(
            "temporary folder cannot be written to",
            place=tempfile.tempdir or "",
            got=err.strerror or str(err),
            remedy=remedy,
        ) from err


def _plain(value: Any, place: str, kind: str) -> Any:
    """An optimizer's state as torch.load(weights_only=True) takes it, numpy's numbers as Python's; or StorageError."""
    value = value.item() if isinstance(value, np.generic) else value
    if type(value) in (dict, OrderedDict):
        return {_plain(key, place, kind): _plain(item, f"{place}[{key!r}]", kind) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{place}[{index}]", kind) for index, item in enumerate(value))
    is_long = type(value) is int and value.bit_length() > 64
    if value is None or (type(value) in (bool, int, float, str, torch.Tensor, torch.nn.Parameter) and not is_long):
        return value
    raise StorageError(
        f"optimizer {kind} cannot be saved",
        place=place,
        expected="tensors, numbers and strings",
        got="an integer of more than 64 bits" if is_long else type(value).__name__,
        remedy="Train without folder=, or with an optimizer whose state is plain.",
    )
