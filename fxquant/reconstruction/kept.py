"""KeptLayers: what a pass has found for the layers of a program, a file each, so that a run that was killed goes on."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from fxquant.files import replacement, written
from fxquant.graph.pass_data import PassData
from fxquant.graph.program import Program
from fxquant.reconstruction.unfinished import Unfinished


class KeptLayers:
    """Tensors by layer, in the folder of a run; without a folder nothing is kept.

    Arguments:
        data: the run's.
        prefix: of the files' names.
        owner: the pass with its options, as text: with program and batches it decides whose files they are.
        program: as it is before the pass.
    """

    def __init__(self, data: PassData, prefix: str, owner: str, program: Program) -> None:
        self._files: Unfinished | None = None
        if data.folder is not None:
            reference = program if data.reference is None else data.reference
            self._files = Unfinished(data.folder, prefix, owner, program, reference, data.batches)

    def get(self, layer: str) -> dict[str, torch.Tensor] | None:
        """What was found for a layer; None if nothing is kept, or a file cannot be read: it is then found anew."""
        if self._files is None or not self._files.path(layer).is_file():
            return None
        return self._read(self._files.path(layer), self._files.key)

    @staticmethod
    def _read(path: Path, key: str) -> dict[str, torch.Tensor] | None:
        try:
            content = torch.load(path, weights_only=True)
            found = content["tensors"]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError):
            return None
        is_whole = isinstance(found, dict) and all(isinstance(one, torch.Tensor) for one in found.values())
        return dict(found) if is_whole and content.get("key") == key else None

    def put(self, layer: str, tensors: dict[str, torch.Tensor]) -> None:
        """Keep what was found, whole or not at all; StorageError if it cannot be written."""
        if self._files is None:
            return
        with written(self._files.path(layer)), replacement(self._files.path(layer)) as file:
            torch.save({"key": self._files.key, "tensors": tensors}, file)
