"""Item: a piece of a JSON document that knows its path, and refuses what it should not be."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxquant.errors import StorageError

_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    type(None): "null",
}


@dataclass(frozen=True)
class Item:
    """A value in a JSON document, and where it stands: "param_encodings.conv.weight[3].scale"."""

    value: Any
    path: str
    file: str

    def refuse(self, expected: str, got: str = "", remedy: str = "") -> StorageError:
        """The error that says what was expected here."""
        thing = f"encodings file '{self.file}'"
        return StorageError(
            thing, place=self.path or "top level", expected=expected, got=got or self._shown, remedy=remedy
        )

    @property
    def _shown(self) -> str:
        if isinstance(self.value, (dict, list)):
            return _NAMES[type(self.value)]
        text = json.dumps(self.value)
        return text if len(text) <= 60 else f"{text[:60]}..."

    def at(self, key: str) -> Item:
        """The field `key` of an object, which must be there."""
        found = self.maybe(key)
        if found is None:
            raise self.refuse(f"a field '{key}'", f"fields {', '.join(self.keys()) or 'none'}")
        return found

    def maybe(self, key: str) -> Item | None:
        """The field `key` of an object; None if it is not there, or null."""
        value = self._of(dict).get(key)
        return None if value is None else Item(value, f"{self.path}.{key}" if self.path else key, self.file)

    def keys(self) -> list[str]:
        """The keys of an object."""
        return list(self._of(dict))

    def items(self) -> list[Item]:
        """The items of a list."""
        return [Item(value, f"{self.path}[{index}]", self.file) for index, value in enumerate(self._of(list))]

    def flat(self) -> tuple[list[Item], tuple[int, ...]]:
        """The numbers of nested lists of one length each, in row-major order, and their shape; of one number, ()."""
        if not isinstance(self.value, list):
            return [self], ()
        parts = [item.flat() for item in self.items()]
        shapes = {shape for _, shape in parts}
        if len(shapes) > 1:
            raise self.refuse("lists of one length", f"shapes {sorted(shapes)}")
        return [leaf for leaves, _ in parts for leaf in leaves], (len(parts), *next(iter(shapes), ()))

    def text(self, accepted: Iterable[str] = ()) -> str:
        """A string, one of `accepted` if there are any."""
        found: str = self._of(str)
        if accepted and found not in accepted:
            raise self.refuse(" or ".join(f'"{word}"' for word in accepted))
        return found

    def number(self) -> float:
        """A finite number."""
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise self.refuse("a number")
        try:
            found = float(self.value)
        except OverflowError:
            found = math.inf
        if not math.isfinite(found):
            raise self.refuse("a finite number", str(found))
        return found

    def integer(self, low: int, high: int) -> int:
        """An integer (written as -64 or -64.0) in [low, high]."""
        found = self.number()
        if not found.is_integer() or not low <= found <= high:
            raise self.refuse(f"an integer from {low} to {high}")
        return int(found)

    def flag(self) -> bool:
        """A boolean: true and false, or as AIMET writes them in 0.6.1, the strings "True" and "False"."""
        words = {"True": True, "False": False}
        if isinstance(self.value, bool):
            return self.value
        if isinstance(self.value, str) and self.value in words:
            return words[self.value]
        raise self.refuse('true, false, "True" or "False"')

    def _of(self, kind: type) -> Any:
        if not isinstance(self.value, kind):
            raise self.refuse(_NAMES[kind])
        return self.value


def read_document(path: Path) -> Item:
    """The JSON document in a file; StorageError if it cannot be read, is no JSON, or has a key twice."""
    thing = f"encodings file '{path}'"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        got = (err.strerror if isinstance(err, OSError) else None) or str(err)
        raise StorageError(f"{thing} cannot be read", expected="a JSON file (UTF-8)", got=got) from err
    try:
        return Item(json.loads(text, object_pairs_hook=_without_duplicates), "", str(path))
    except json.JSONDecodeError as err:
        place = f"line {err.lineno}, column {err.colno}"
        raise StorageError(thing, place=place, expected="JSON", got=err.msg) from err
    except (ValueError, RecursionError) as err:
        raise StorageError(thing, expected="JSON", got=str(err) or type(err).__name__) from err


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key '{key}' twice in one object")
        found[key] = value
    return found


def require_unique(named: Iterable[tuple[str, Item]]) -> None:
    """Refuse a tensor's name that comes twice."""
    places: dict[str, str] = {}
    for name, item in named:
        if name in places:
            raise item.refuse("one entry for each tensor", f"'{name}' again, first at {places[name]}")
        places[name] = item.path
