"""Plain values (of TOML or JSON) to typed ones and back: the options of passes, and the specs that a program file
holds.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, get_args, get_origin

from fxquant.errors import ConfigError, FxquantError, PassError, clipped, nearest

_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "nothing"}


def decode(kind: Any, value: Any, place: str) -> Any:
    """`value` as a `kind`: a number, string, Enum (by value), tuple, dict, frozen dataclass, or a union of such.

    Integers become floats where floats are wanted; no other type is converted. Raises ConfigError that names `place`
    (a file and a key), what is accepted, and the nearest name of an unknown key.
    """
    origin = get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(get_args(kind), value, place)
    if origin is typing.Literal:
        return _decode_choice(value, {choice: choice for choice in get_args(kind)}, place)
    if origin is tuple:
        return _decode_tuple(get_args(kind), value, place)
    if origin in (dict, Mapping):
        return _decode_dict(get_args(kind), value, place)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _decode_choice(value, {member.value: member for member in kind}, place)
    if isinstance(kind, type) and is_dataclass(kind):
        return decode_dataclass(kind, value, place)
    return _decode_plain(kind, value, place)


def decode_dataclass(kind: type[Any], value: Any, place: str) -> Any:
    """A table of options as the dataclass `kind`; its own checks (`__post_init__`) speak with `place` in front.

    A class with a method `placed` is told its place, for messages of its own.
    """
    if not isinstance(value, Mapping):
        raise _wrong(place, f"a table of {kind.__name__}", value)
    accepted = option_types(kind)
    for key in value:
        if key not in accepted:
            raise ConfigError(f"unknown key '{clipped(str(key))}'", place=place, remedy=nearest(str(key), accepted))
    missing = [item.name for item in fields(kind) if item.init and _is_required(item) and item.name not in value]
    if missing:
        raise ConfigError(f"key '{missing[0]}' is missing", place=place, expected=f"a {kind.__name__} with it")
    options = {key: decode(accepted[key], item, f"{place}.{key}") for key, item in value.items()}
    try:
        item = kind(**options)
        return item.placed(place) if hasattr(kind, "placed") else item
    except FxquantError as err:
        raise ConfigError(err.thing, place=place, expected=err.expected, got=err.got, remedy=err.remedy) from err


def option_types(kind: type[Any]) -> dict[str, Any]:
    """The options of a dataclass, by name, with their types."""
    hints = typing.get_type_hints(kind)
    return {item.name: hints[item.name] for item in fields(kind) if item.init}


def check_options(item: object, name: str) -> None:
    """Raise PassError unless every option of the pass `item`, called `name`, is of its declared type.

    Nested dataclasses, tuples and dicts are looked into. Types that no config can say (a callable, a class of the
    pass's own) are checked as far as isinstance can.
    """
    for option, kind, value in _mistyped(item):
        got = f"the {type(value).__name__} {value!r}"
        raise PassError(f"pass '{name}': option '{option}'", expected=_type_text(kind), got=got)


def _mistyped(item: Any) -> Iterator[tuple[str, Any, Any]]:
    """Options of a dataclass whose value is not of their type: path ("activation.bits"), type, value."""
    owner: Any = type(item)
    for name, kind in _known_types(owner).items():
        value = getattr(item, name)
        if not _is_a(kind, value):
            yield name, kind, value
            continue
        for place, inner in _dataclasses_in(value):
            yield from ((f"{name}{place}.{path}", inner_kind, got) for path, inner_kind, got in _mistyped(inner))


def _dataclasses_in(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if is_dataclass(value) and not isinstance(value, type):
        yield place, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple) else ()
    for key, item in items:
        yield from _dataclasses_in(item, f"{place}[{key!r}]")


@cache
def _known_types(kind: type[Any]) -> dict[str, Any]:
    """`option_types`; empty for what is no dataclass, or is annotated with names that only a type checker sees."""
    try:
        return option_types(kind) if is_dataclass(kind) else {}
    except NameError:
        return {}


def _is_a(kind: Any, value: Any) -> bool:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(arg, value) for arg in args)
    if origin is typing.Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and _are(args, value)
    if origin in (dict, Mapping):
        return isinstance(value, origin) and all(_are(args, pair) for pair in value.items())
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if kind is None or kind is types.NoneType:
        return value is None
    known = kind if origin is None else origin
    return not _is_class(known) or isinstance(value, known)


def _is_class(kind: Any) -> bool:
    """Whether isinstance takes `kind`; of protocols only some."""
    return isinstance(kind, type) and not getattr(kind, "_is_protocol", False)


def _are(kinds: tuple[Any, ...], values: tuple[Any, ...]) -> bool:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(values)
    return len(kinds) == len(values) and all(map(_is_a, kinds, values))


def _type_text(kind: Any) -> str:
    """A type as its annotation says it, without modules: "tuple[Rule, ...]"."""
    return (
        kind.__name__ if isinstance(kind, type) and not get_args(kind) else re.sub(r"(?:\w+\.)+(?=\w)", "", str(kind))
    )


def encode(value: Any) -> Any:
    """A typed value as plain ones, the inverse of `decode`; a dataclass becomes the options that differ from their
    defaults.
    """
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        options = {item.name: (item, getattr(value, item.name)) for item in fields(value) if item.init}
        return {name: encode(found) for name, (item, found) in options.items() if not _is_default(item, found)}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    return value


def _is_required(item: Any) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _is_default(item: Any, value: Any) -> bool:
    if _is_required(item):
        return False
    default = item.default if item.default is not MISSING else item.default_factory()
    return bool(default == value and type(default) is type(value))


def _wrong(place: str, expected: str, value: Any) -> ConfigError:
    got = "nothing" if value is None else f"{_described(value)} {clipped(repr(value))}"
    return ConfigError("wrong type", place=place, expected=expected, got=got)


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return "the table"
    return {bool: "the boolean", int: "the integer", float: "the number", str: "the string", list: "the list"}.get(
        type(value), type(value).__name__
    )


def _decode_plain(kind: Any, value: Any, place: str) -> Any:
    if kind is Any:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind not in _KINDS:
        raise ConfigError(f"option of type {kind}", place=place, expected="a type that a config can say", got=str(kind))
    if type(value) is not kind:
        raise _wrong(place, _KINDS[kind], value)
    return value


def _decode_union(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    wanted = [kind for kind in kinds if kind is not type(None)]
    errors: list[ConfigError] = []
    for kind in wanted:
        try:
            return decode(kind, value, place)
        except ConfigError as err:
            errors.append(err)
    if len(errors) == 1:
        raise errors[0]
    raise _wrong(place, " or ".join(err.expected or str(kind) for err, kind in zip(errors, wanted, strict=True)), value)


def _decode_choice(value: Any, choices: dict[Any, Any], place: str) -> Any:
    found = next((choices[key] for key in choices if key == value and type(key) is type(value)), None)
    if found is None:
        raise ConfigError(
            f"unknown value {clipped(repr(value))}", place=place, remedy=nearest(str(value), map(str, choices))
        )
    return found


def _decode_tuple(kinds: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(place, "a list", value)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise ConfigError("wrong length", place=place, expected=f"{len(kinds)} values", got=f"{len(value)}")
    items = enumerate(zip(kinds, value, strict=True))
    return tuple(decode(kind, item, f"{place}[{index}]") for index, (kind, item) in items)


def _decode_dict(kinds: tuple[Any, ...], value: Any, place: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(place, "a table", value)
    key_kind, item_kind = kinds
    return {
        decode(key_kind, key, place): decode(item_kind, item, f"{place}.{clipped(str(key))}")
        for key, item in value.items()
    }
