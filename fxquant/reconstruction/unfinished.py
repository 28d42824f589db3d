"""Unfinished: the units that a run has learned, a file each, so that a killed run goes on with the same bits."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fxquant.files import make_folder, remove, replacement, written
from fxquant.graph.batches import Batch, batches_digest
from fxquant.graph.program import Program
from fxquant.reconstruction.learn import Reconstruction

VERSION = 2
_KEY_LENGTH = 16


class Unfinished:
    """What is learned of a program's units, in a folder.

    Arguments:
        folder: of the files.
        prefix: of their names.
        owner: what is learning: a pass with its options, as text.
        program: as it is before the first unit; it, `reference`, `batches` and `owner` decide whose files these are.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        owner: str,
        program: Program,
        reference: Program,
        batches: Iterable[Batch],
    ) -> None:
        make_folder(folder)
        self.folder = folder
        self.prefix = prefix
        digest = hashlib.sha256(f"{VERSION}:{owner}:{torch.__version__}".encode())
        digest.update(f"{program.fingerprint()}:{reference.fingerprint()}:{batches_digest(batches)}".encode())
        self.key = digest.hexdigest()

    def path(self, unit: str) -> Path:
        """Where a unit is kept; the name has the beginning of the key, so that runs do not overwrite each other's."""
        return self.folder / f"{self._stem(unit)}-{self.key[:_KEY_LENGTH]}.pt"

    def get(self, unit: str) -> tuple[Reconstruction | None, str]:
        """What was learned of a unit, if that is there; else why a file that is there is not used ("": none is)."""
        path = self.path(unit)
        if not path.is_file():
            others = sorted(self.folder.glob(f"{self._stem(unit)}-*.pt"))
            return None, f"{others[0].name} is of another run (another model, options or batches)" if others else ""
        try:
            content = torch.load(path, weights_only=True)
            found = Reconstruction(**content["reconstruction"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as err:
            return None, f"{path.name} is damaged: {type(err).__name__}"
        return (found, "") if content.get("key") == self.key else (None, f"{path.name} is of another run")

    def put(self, found: Reconstruction) -> None:
        """Keep what was learned, whole or not at all; StorageError if it cannot be written."""
        path = self.path(found.unit)
        content: dict[str, Any] = {"key": self.key, "reconstruction": asdict(found)}
        with written(path), replacement(path) as file:
            torch.save(content, file)

    def _stem(self, unit: str) -> str:
        return f"{self.prefix}-{unit}"


def discard(folder: Path) -> None:
    """Remove the files of learned units, and the folder if nothing else is in it."""
    for path in folder.glob("*.pt"):
        remove(path)
    with contextlib.suppress(OSError):
        folder.rmdir()
