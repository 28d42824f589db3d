"""The [training] table of a pipeline file: a Schedule as plain values, where "never" stands for None."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxquant.errors import ConfigError, clipped
from fxquant.graph.options import decode_dataclass, encode
from fxquant.schedule import MAY_BE_NEVER, NEVER, Schedule, shown

TOO_LARGE = 2**63  # TOML 1.0 has integers of 64 bits; Python's parser takes any


def decode_schedule(table: Any, place: str) -> Schedule:
    """The table as a Schedule; raises ConfigError that names `place`, the key and what is accepted."""
    if not isinstance(table, Mapping):
        raise ConfigError("key 'training'", place=place, expected="a [training] table", got=type(table).__name__)
    found = decode_dataclass(Schedule, {key: _value(key, item, place) for key, item in table.items()}, place)
    assert isinstance(found, Schedule)
    return found


def _value(key: str, item: Any, place: str) -> Any:
    if isinstance(item, int) and abs(item) >= TOO_LARGE:
        raise ConfigError("number too large", place=f"{place}.{key}", expected="one of 64 bits", got=shown(item))
    if key not in MAY_BE_NEVER or not isinstance(item, str):
        return item
    if item != NEVER:
        expected = f'a number of epochs, or "{NEVER}"'
        raise ConfigError("wrong value", place=f"{place}.{key}", expected=expected, got=f'"{clipped(item)}"')
    return None


def encode_schedule(schedule: Schedule) -> dict[str, Any]:
    """The options that differ from their defaults, as the table has them."""
    return {key: NEVER if value is None else value for key, value in encode(schedule).items()}
