"""TrialLog: what a search has found out, one record a trial, kept in a file so that a run that was killed goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxquant.errors import StorageError
from fxquant.files import make_folder, remove, write_text

VERSION = 1


class TrialLog:
    """Records by key, in the order in which they were kept; each is on disk before the next trial begins.

    Arguments:
        path: of the JSON file; None keeps records in memory alone.
        recipe: what the records depend on (options, seed, fingerprints), as plain values: a file with another recipe is
            another run's.
        resume: go on with the records of the file, if it is there.
        overwrite: remove a file that is there. Without either such a file is refused.

    Raises StorageError for a file that is damaged, in the way, or of another run (naming what differs).
    """

    def __init__(
        self, path: Path | None, recipe: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.path = path
        self.recipe: dict[str, Any] = json.loads(json.dumps(dict(recipe)))
        self.records: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        make_folder(path.parent, (path.name,))
        if overwrite:
            remove(path)
        if not path.exists():
            return
        if not resume:
            raise StorageError(
                f"'{path}' is there already",
                expected="a folder without an earlier run",
                remedy="resume=True (--resume) continues that run, overwrite=True (--overwrite) removes it; "
                "or give another folder.",
            )
        self.records = self._read(path)

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of a trial that is done; None if it is not."""
        return self.records.get(key)

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep the record of a trial (plain values), at once and whole."""
        self.records[key] = dict(record)
        if self.path is not None:
            content = {"version": VERSION, "recipe": self.recipe, "records": self.records}
            write_text(self.path, json.dumps(content, indent=2) + "\n")

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version, recipe, records = content["version"], content["recipe"], content["records"]
            is_whole = isinstance(recipe, dict) and all(isinstance(record, dict) for record in records.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
            raise self._damaged(path, f"{type(err).__name__}: {err}") from err
        if version != VERSION or not is_whole:
            raise self._damaged(path, f"version {version}")
        differing = [key for key in {**recipe, **self.recipe} if recipe.get(key) != self.recipe.get(key)]
        if differing:
            key = differing[0]
            raise StorageError(
                f"'{path}' is of another run: {key}",
                expected=str(self.recipe.get(key)),
                got=str(recipe.get(key)),
                remedy="Give the same arguments as then, another folder, or overwrite=True (--overwrite).",
            )
        return dict(records)

    def _damaged(self, path: Path, got: str) -> StorageError:
        return StorageError(
            f"'{path}' cannot be read",
            expected="a record of trials",
            got=got,
            remedy="overwrite=True (--overwrite) begins anew.",
        )
