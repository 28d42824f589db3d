"""What a command line names: models ("package.module:callable", files) and data (.npy, .npz, folders, callables)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxquant.cli.user_code import guarded, user_code
from fxquant.errors import FxquantError
from fxquant.evaluation import Evaluate
from fxquant.graph.batches import Batch

Model = torch.nn.Module | torch.export.ExportedProgram


def require_model_name(name: str, besides: str = "") -> None:
    """Refuse what names no model, before anything is read; `besides` says what else may stand in its place."""
    path = Path(name)
    if path.suffix == ".pt2" or all(name.rpartition(":")):
        return
    is_onnx = bool(besides) and path.suffix == ".onnx"
    raise FxquantError(
        f"model '{name}'",
        expected=f"{besides}package.module:callable, file.py:callable or an exported .pt2 file",
        got=f"a {path.suffix or 'plain'} file" if path.is_file() else name,
        remedy="An ONNX file holds no program: give the .fxq file beside it." if is_onnx else "",
    )


def load_model(name: str) -> Model:
    """A model from "package.module:callable", "file.py:callable" or an exported "file.pt2"; a callable is called."""
    path = Path(name)
    if path.suffix == ".pt2":
        _require_file(path, "model")
        return _load_exported(path)
    require_model_name(name)
    found = resolve(name, "model")
    with user_code(f"model '{name}'"):
        model = found() if callable(found) and not isinstance(found, torch.nn.Module) else found
    if not isinstance(model, (torch.nn.Module, torch.export.ExportedProgram)):
        raise FxquantError(
            f"model '{name}'", expected="an nn.Module, or a callable that returns one", got=type(model).__name__
        )
    return model


def _load_exported(path: Path) -> torch.export.ExportedProgram:
    try:
        exported: torch.export.ExportedProgram = torch.export.load(path)
    except Exception as err:  # torch raises whatever its unpickling happens to meet
        remedy = "Was it written by torch.export.save, and copied whole?"
        got = f"{type(err).__name__}: {str(err).strip().splitlines()[0] if str(err).strip() else 'no message'}"
        raise FxquantError(f"model '{path}' cannot be read", got=got, remedy=remedy) from err
    return exported


def resolve(name: str, thing: str) -> Any:
    """The object that "package.module:attribute" or "file.py:attribute" names."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        remedy = "Example: mypackage.models:make_model, ./model.py:make_model."
        raise FxquantError(
            f"{thing} '{name}'", expected="package.module:callable or file.py:callable", got=name, remedy=remedy
        )
    module = _import_file(Path(place), thing) if place.endswith(".py") else _import_module(place, thing)
    if not hasattr(module, attribute):
        names = ", ".join(sorted(key for key in vars(module) if not key.startswith("_")))
        raise FxquantError(f"{thing} '{name}'", expected=f"an attribute '{attribute}' in {place}", got=f"only {names}")
    return getattr(module, attribute)


def _import_module(name: str, thing: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    with user_code(f"{thing}: module '{name}'"):
        try:
            return importlib.import_module(name)
        except ImportError as err:
            raise FxquantError(
                f"{thing}: module '{name}' cannot be imported", got=str(err), remedy="Is it installed here?"
            ) from err


def _import_file(path: Path, thing: str) -> Any:
    _require_file(path, thing)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    with user_code(f"{thing}: file '{path}'"):
        spec.loader.exec_module(module)
    return module


def _require_file(path: Path, thing: str) -> None:
    if not path.is_file():
        raise FxquantError(f"{thing}: file '{path}' does not exist", remedy="Check the path and the folder you are in.")


def load_batches(name: str, batch_size: int) -> Iterable[Batch]:
    """Batches from a .npy (samples on axis 0), a .npz (an array for each keyword), a folder of them, or a callable.

    Arrays in files are cut into batches of `batch_size`; a callable gives an iterable of whole batches.
    """
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".npy", ".npz"))
        if not files:
            raise FxquantError(f"data folder '{path}'", expected=".npy or .npz files", got="none")
        return Batches(files, batch_size)
    if path.suffix in (".npy", ".npz"):
        _require_file(path, "data")
        return Batches([path], batch_size)
    if path.is_file():
        expected = ".npy, .npz, a folder of them, or package.module:callable"
        raise FxquantError(f"data '{name}'", expected=expected, got=f"a {path.suffix or 'plain'} file")
    found = resolve(name, "data")
    with user_code(f"data '{name}'"):
        batches = found() if callable(found) else found
    if not isinstance(batches, Iterable):
        raise FxquantError(f"data '{name}'", expected="an iterable of batches", got=type(batches).__name__)
    return guarded(batches, f"data '{name}'")


def load_evaluate(name: str) -> Evaluate:
    """What takes a callable like the model and gives a score, from "package.module:callable" or "file.py:callable"."""
    found = resolve(name, "evaluate")
    if not callable(found):
        raise FxquantError(f"evaluate '{name}'", expected="a callable", got=type(found).__name__)

    def evaluate(model: Callable[..., Any]) -> float:
        with user_code(f"evaluate '{name}'"):
            return found(model)  # type: ignore[no-any-return]  # whether it is a number, score_of sees

    place, _, attribute = name.rpartition(":")
    evaluate.__module__, evaluate.__qualname__ = str(Path(place)), attribute  # for fxquant.evaluation.name_of
    return evaluate


class Batches:
    """The batches in some files, read anew at every iteration."""

    def __init__(self, files: list[Path], batch_size: int) -> None:
        self.files = files
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Batch]:
        for file in self.files:
            arrays = _read(file)
            count = min(len(array) for array in arrays.values())
            for start in range(0, count, self.batch_size):
                tensors = {
                    key: torch.from_numpy(array[start : start + self.batch_size]) for key, array in arrays.items()
                }
                yield tensors[""] if "" in tensors else tensors


def _read(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        loaded = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as err:
        raise FxquantError(f"data file '{file}' cannot be read", got=str(err)) from err
    arrays = {"": loaded} if isinstance(loaded, np.ndarray) else {key: loaded[key] for key in loaded.files}
    empty = [key or file.name for key, array in arrays.items() if array.ndim == 0 or len(array) == 0]
    if empty or not arrays:
        raise FxquantError(
            f"data file '{file}'",
            expected="arrays with samples on axis 0",
            got=f"nothing in {', '.join(empty) or file.name}",
        )
    return arrays


def first_batch(batches: Iterable[Batch], name: str) -> Batch:
    """The first batch, as example inputs."""
    for batch in batches:
        return batch
    raise FxquantError(f"data '{name}'", expected="at least one batch", got="none")
