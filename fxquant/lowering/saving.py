"""Write an ONNX model so that a full disk or a kill leaves the old file as it was, and nothing else.

Files are put in place whole (fxquant.files). External data lies in `<model>.<digest>.data`, named after
its contents: the old model keeps its own data until the new model has taken its place.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from fxquant.errors import ExportError
from fxquant.files import REMEDY, afterwards, remove, replacement

LARGEST_PROTOBUF = 2**31 - 2**24  # protobuf's limit is 2 GB; 16 MB are left for the graph
SMALLEST_EXTERNAL = 1024  # bytes; smaller tensors stay in the model, where shape inference can read them
ALIGNMENT = 64  # bytes; onnxruntime maps external data into memory


def save(model: ir.Model, path: Path, external: bool | None = None) -> None:
    """Write `model` to `path`; with `external` (None: where it exceeds 2 GB) its large tensors go to a file beside it.

    Raises:
        ExportError: the file cannot be written. The old file, if there was one, is untouched.
    """
    if external is None:
        external = sum(tensor.nbytes for tensor in _tensors(model)) > LARGEST_PROTOBUF
    old_data = external_files(path)
    placed = _placement(model) if external else []
    location = _data_name(path, placed) if external else None
    try:
        _write(model, path, placed, location)
    except BaseException as err:
        if location is not None and location not in external_files(path):  # no model reads it
            remove(path.parent / location)
        if not isinstance(err, OSError):
            raise
        raise ExportError(
            f"export: '{path}' cannot be written",
            got=err.strerror or str(err),
            remedy=REMEDY,
        ) from err
    afterwards(lambda: _clean_up(path.parent, old_data - {location}))


def _clean_up(folder: Path, stale: set[str]) -> None:
    _flush_folder(folder)
    for name in stale:
        remove(folder / name)


def external_files(path: Path) -> set[str]:
    """Names of the data files that belong to the model at `path` alone; none if there is no such model."""
    if not path.is_file():
        return set()
    with contextlib.suppress(Exception):  # whatever it is, it is not a model of ours
        graph = onnx.load(path, load_external_data=False).graph
        names = {
            entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"
        }
        return {name for name in names if name.startswith(f"{path.name}.") and name.endswith(".data")}
    return set()


@dataclass(frozen=True)
class _Placed:
    value: ir.Value
    tensor: ir.TensorProtocol
    offset: int


def _tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    return [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]


def _placement(model: ir.Model) -> list[_Placed]:
    placed, offset = [], 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= SMALLEST_EXTERNAL:
            placed.append(_Placed(value, tensor, offset))
            offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return placed


def _data_name(path: Path, placed: list[_Placed]) -> str:
    digest = hashlib.sha256()
    for item in placed:
        digest.update(f"{item.value.name}:{item.offset}:".encode())
        digest.update(item.tensor.tobytes())
    return f"{path.name}.{digest.hexdigest()[:12]}.data"


def _write(model: ir.Model, path: Path, placed: list[_Placed], location: str | None) -> None:
    with replacement(path) as file:
        if location is None:
            file.write(ir.serde.serialize_model(model).SerializeToString())
            return
        with replacement(path.parent / location) as data:  # in place before the model that reads it is
            for item in placed:
                data.write(b"\0" * (item.offset - data.tell()))
                data.write(item.tensor.tobytes())
            file.write(_without_data(model, placed, location, path.parent))


def _without_data(model: ir.Model, placed: list[_Placed], location: str, folder: Path) -> bytes:
    """The model's bytes with its large tensors at `location`; the model itself is as before afterwards."""
    try:
        for item in placed:
            item.value.const_value = ir.ExternalTensor(
                location,
                item.offset,
                item.tensor.nbytes,
                item.tensor.dtype,
                shape=ir.Shape(item.tensor.shape.numpy()),
                name=item.tensor.name or "",
                base_dir=folder,
            )
        data: bytes = ir.serde.serialize_model(model).SerializeToString()
        return data
    finally:
        for item in placed:
            item.value.const_value = item.tensor


def _flush_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot; the rename is done all the same
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
