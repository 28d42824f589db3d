"""Program files: one zip with the graph and specs as JSON and the tensors as torch saves them. No pickled code.

    manifest.json   format, versions, the program's fingerprint, SHA-256 of the two other members
    program.json    name, stage, target, notes; the graph's records; the module tree; which tensor stands where
    tensors.pt      {path: tensor}, readable with torch.load(weights_only=True); a tied tensor is there once

Modules come back as what they are to a program: batch norm, dropout, FakeQuant and BiasFakeQuant as themselves,
everything else (which the graph does not call) as a plain container of its tensors. What a dataclass output keeps is
the name of its class: the class must be importable, and registered with torch's pytrees, where the file is loaded.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any, cast

import torch

from fxquant.errors import FxquantError, StorageError
from fxquant.files import REMEDY, replacement
from fxquant.graph.float_state import describe_float_state, read_float_state
from fxquant.graph.module import ProgramModule, graph_from_records, graph_to_records
from fxquant.graph.module_tree import build_tree, describe_tree
from fxquant.graph.program import Note, NoteKind, Program, Stage
from fxquant.graph.record_meta import decode_meta, encode_meta, refuse_foreign_code
from fxquant.spec import Target

FORMAT = "fxquant program"
VERSION = 3
_MANIFEST, _PROGRAM, _TENSORS = "manifest.json", "program.json", "tensors.pt"


def save_program(program: Program, path: str | os.PathLike[str]) -> None:
    """Write `program` to the file `path`, all or nothing: a kill or a full disk midway leaves what was there before.
    Raises StorageError if the file cannot be written, or if the graph calls a module or holds a value that a file
    cannot hold.
    """
    place = Path(path)
    modules, tensors = describe_tree(program)
    text = json.dumps(_content(program, modules), indent=1).encode()
    try:
        with replacement(place) as handle, zipfile.ZipFile(handle, "w") as archive:
            archive.writestr(_PROGRAM, text)
            with archive.open(_TENSORS, "w", force_zip64=True) as member:
                hashed = _HashedWriter(member)
                torch.save({key: tensor.detach().cpu() for key, tensor in tensors.items()}, cast("IO[bytes]", hashed))
            digests = {_PROGRAM: hashlib.sha256(text).hexdigest(), _TENSORS: hashed.digest.hexdigest()}
            archive.writestr(_MANIFEST, json.dumps(_manifest(program, digests), indent=1))
    except OSError as err:
        remedy = REMEDY if place.parent.is_dir() else f"Make the folder '{place.parent}' first."
        got = err.strerror or str(err)  # str(err) may name a temporary file
        raise StorageError("program cannot be written", place=str(place), got=got, remedy=remedy) from err


def load_program(path: str | os.PathLike[str], *, trusted: Sequence[str] = ()) -> Program:
    """Read a program that `save_program` wrote; its tensors are on the CPU, its modules in the mode they were saved in.

    Arguments:
        path: the file. trusted: packages whose Python functions the graph may call; operators that are registered
        with torch, and arithmetic
            on sizes, need no trust.

    Raises StorageError if the file is missing, no program file, damaged, altered, or written by a newer fxquant.
    """
    place = Path(path)
    try:
        with zipfile.ZipFile(place) as archive:
            manifest = _read_manifest(archive, place)
            members = {name: archive.read(name) for name in (_PROGRAM, _TENSORS)}
    except (OSError, EOFError, KeyError, zipfile.BadZipFile) as err:
        is_missing = isinstance(err, FileNotFoundError)
        remedy = "" if is_missing else "Is it an fxquant program (.fxq), and was it copied whole?"
        raise StorageError(
            "program cannot be read", place=str(place), expected="a program file", got=str(err), remedy=remedy
        ) from err
    _check_digests(manifest, members, place)
    try:
        program = _program(json.loads(members[_PROGRAM]), _load_tensors(members[_TENSORS]), trusted)
    except FxquantError as err:
        raise StorageError(
            err.thing, place=err.place or str(place), expected=err.expected, got=err.got, remedy=err.remedy
        ) from err
    except (KeyError, TypeError, ValueError, AttributeError, ImportError, RuntimeError) as err:
        raise StorageError("program cannot be rebuilt", place=str(place), got=f"{type(err).__name__}: {err}") from err
    if program.fingerprint() != manifest["fingerprint"]:
        raise _altered(
            place, f"fingerprint {program.fingerprint()[:12]}", f"fingerprint {manifest['fingerprint'][:12]}"
        )
    return program


def _content(program: Program, modules: list[dict[str, Any]]) -> dict[str, Any]:
    records = graph_to_records(program.graph)
    for record in records:
        if "meta" in record:
            record["meta"] = encode_meta(record["meta"], record["name"])
    return {
        "name": program.name,
        "class_name": type(program.module).__name__,
        "stage": str(program.stage),
        "target": program.target.value,
        "notes": [[note.kind.value, note.place, note.text] for note in program.notes],
        "float_state": describe_float_state(program.float_state),
        "graph": records,
        "modules": modules,
    }


def _manifest(program: Program, digests: dict[str, str]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "fxquant": metadata.version("fxquant"),
        "torch": torch.__version__,
        "fingerprint": program.fingerprint(),
        "sha256": digests,
    }


def _program(content: dict[str, Any], tensors: dict[str, torch.Tensor], trusted: Sequence[str]) -> Program:
    root = build_tree(content["modules"], tensors)
    refuse_foreign_code(content["graph"], root, trusted)
    for record in content["graph"]:
        if "meta" in record:
            record["meta"] = decode_meta(record["meta"], record["name"])
    module = ProgramModule(root, graph_from_records(content["graph"]), content["class_name"])
    notes = tuple(Note(NoteKind(kind), place, text) for kind, place, text in content["notes"])
    program = Program(
        module,
        name=content["name"],
        stage=Stage[content["stage"].upper()],
        target=Target(content["target"]),
        notes=notes,
        float_state=read_float_state(content["float_state"]),
    )
    program.link_biases()
    return program


def _load_tensors(data: bytes) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return tensors


def _read_manifest(archive: zipfile.ZipFile, place: Path) -> dict[str, Any]:
    try:
        manifest: Any = json.loads(archive.read(_MANIFEST))
    except (KeyError, ValueError) as err:
        got = f"a zip without a readable {_MANIFEST}"
        raise StorageError("no program file", place=str(place), expected="an fxquant program", got=got) from err
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StorageError("no program file", place=str(place), expected=f"format '{FORMAT}'", got=str(manifest)[:80])
    version = manifest.get("version")
    if version != VERSION:
        got = f"version {version}, written by fxquant {manifest.get('fxquant')}"
        remedy = "Install that version of fxquant or a newer one."
        raise StorageError(
            "program file", place=str(place), expected=f"format version {VERSION}", got=got, remedy=remedy
        )
    return manifest


def _check_digests(manifest: dict[str, Any], members: dict[str, bytes], place: Path) -> None:
    for name, data in members.items():
        found, expected = hashlib.sha256(data).hexdigest(), str(manifest.get("sha256", {}).get(name))
        if found != expected:
            raise _altered(place, f"SHA-256 {found[:12]} of {name}", f"SHA-256 {expected[:12]}")


def _altered(place: Path, got: str, expected: str) -> StorageError:
    remedy = "The file was altered after it was saved: save the program again."
    return StorageError("program file was altered", place=str(place), expected=expected, got=got, remedy=remedy)


class _HashedWriter:
    """A file to write to that hashes what passes through."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write and hash."""
        self.digest.update(data)
        return self._handle.write(data)

    def flush(self) -> None:
        """Hand on what is buffered."""
        self._handle.flush()
