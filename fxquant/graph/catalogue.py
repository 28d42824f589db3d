"""Catalogues: dicts of pass classes by name, which pipelines name as "module:ATTRIBUTE"."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from fxquant.errors import ConfigError, nearest
from fxquant.graph.passes import Pass


def import_catalogue(text: str, place: str) -> Mapping[str, type[Pass]]:
    """The catalogue that `text` names; `place` stands in messages. Raises ConfigError if there is none."""
    module, separator, attribute = text.partition(":")
    if not (module and separator and attribute):
        raise ConfigError("catalogue", place=place, expected='"module:ATTRIBUTE"', got=repr(text))
    imported = _import_module(module, text, place)
    if not hasattr(imported, attribute):
        offered = [name for name, value in vars(imported).items() if _is_catalogue(value)]
        got = f"no '{attribute}' in module '{module}'"
        remedy = nearest(attribute, offered)
        raise ConfigError(f"catalogue '{text}' cannot be imported", place=place, got=got, remedy=remedy)
    found = getattr(imported, attribute)
    if not _is_catalogue(found):
        got = f"{type(found).__name__} in '{text}'"
        raise ConfigError("catalogue", place=place, expected="a dict of pass classes by their names", got=got)
    catalogue: Mapping[str, type[Pass]] = found
    return catalogue


def _import_module(module: str, text: str, place: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as err:  # whatever the code of a foreign module raises
        if isinstance(err, ImportError):
            got, remedy = str(err), "Install the module, or put its folder on PYTHONPATH."
        else:
            got, remedy = f"{type(err).__name__}: {err}", f"Mend '{module}': it raises where it is imported."
        raise ConfigError(f"catalogue '{text}' cannot be imported", place=place, got=got, remedy=remedy) from err


def _is_catalogue(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(kind, type) and issubclass(kind, Pass) and key == kind.name for key, kind in value.items()
    )
