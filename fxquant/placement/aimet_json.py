"""AIMET's placement files: JSON with six sections whose booleans are the strings "True" and "False".

What its grammar refuses is refused; what AIMET accepts and then cannot do (unsigned symmetric grids, an input that is
not quantized) is accepted. Every ConfigError names the file and the path in it: "op_type.Conv.is_output_quantized".
"""

from __future__ import annotations

import json
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, get_args, get_origin

from fxquant.errors import ConfigError, FxquantError, clipped, nearest
from fxquant.graph.options import option_types
from fxquant.placement.sections import Sections

REQUIRED = ("defaults", "params", "op_type", "supergroups", "model_input", "model_output")
_BOOLEANS = {"True": True, "False": False}
_NAMES = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}


def read_sections(text: str, file: str) -> Sections:
    """The sections that the text of an AIMET config says; `file` names it in messages.

    Raises ConfigError for what is no JSON, for missing sections, unknown keys and types, and values of a wrong type.
    """
    content = _parse(text, file)
    if not isinstance(content, dict):
        raise _wrong(file, "", f"an object with the sections {', '.join(REQUIRED)}", content)
    sections = _read(Sections, content, file, "")
    assert isinstance(sections, Sections)
    missing = [name for name in REQUIRED if name not in content]
    if missing:
        got = f"no '{missing[0]}'" if len(missing) == 1 else f"none of {', '.join(missing)}"
        expected = f"the sections {', '.join(REQUIRED)}"
        raise ConfigError(
            "section is missing", place=file, expected=expected, got=got, remedy=f'Add "{missing[0]}": {{}}.'
        )
    return _with_schemes(sections)


def _with_schemes(sections: Sections) -> Sections:
    """Grids are asymmetric where the file says nothing."""
    defaults = sections.defaults
    ops = replace(defaults.ops, is_symmetric=bool(defaults.ops.is_symmetric))
    params = replace(defaults.params, is_symmetric=bool(defaults.params.is_symmetric))
    return replace(sections, defaults=replace(defaults, ops=ops, params=params))


def _parse(text: str, file: str) -> Any:
    if not text.strip():
        expected = f"an object with the sections {', '.join(REQUIRED)}"
        raise ConfigError("placement file is empty", place=file, expected=expected, got="nothing")
    try:
        return _plain(json.loads(text, object_pairs_hook=_Pairs, parse_constant=_Constant), file, "")
    except json.JSONDecodeError as err:
        place = f"{file}: line {err.lineno}, column {err.colno}"
        raise ConfigError("placement file is not JSON", place=place, expected="JSON", got=err.msg) from err
    except RecursionError as err:
        raise ConfigError("placement file is nested too deeply", place=file, expected="six sections") from err
    except ValueError as err:  # an integer of more digits than Python reads
        raise ConfigError("placement file is not JSON", place=file, expected="finite numbers", got=str(err)) from err


@dataclass(frozen=True)
class _Pairs:
    """An object as the file has it: a key may be there twice."""

    pairs: list[tuple[str, Any]]


@dataclass(frozen=True)
class _Constant:
    """A number that Python reads and JSON does not have."""

    name: str


def _plain(value: Any, file: str, path: str) -> Any:
    """What was parsed as dicts, lists and finite numbers; the rest is refused where it stands."""
    if isinstance(value, _Constant):
        place = _place(file, path)
        raise ConfigError("placement file is not JSON", place=place, expected="finite numbers", got=value.name)
    if isinstance(value, list):
        return [_plain(item, file, f"{path}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, _Pairs):
        return value
    found: dict[str, Any] = {}
    for key, item in value.pairs:
        plain = _plain(item, file, _join(path, key))
        if key in found:
            got = f"two, {json.dumps(found[key])[:60]} and {json.dumps(plain)[:60]}"
            remedy = "Keep one of them; JSON readers would drop the first."
            thing = f"key '{clipped(key)}' is there twice"
            raise ConfigError(thing, place=_place(file, path), expected="one", got=got, remedy=remedy)
        found[key] = plain
    return found


def _read(kind: Any, value: Any, file: str, path: str) -> Any:
    """`value` as a `kind`: what options.decode does, for AIMET's booleans and with its places."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (typing.Union, types.UnionType):  # with None, which JSON never says
        return _read(next(arg for arg in args if arg is not types.NoneType), value, file, path)
    if origin is typing.Literal:
        return _choice(args, value, file, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(file, path, "a list", value)
        return tuple(_read(args[0], item, file, f"{path}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        return {key: _read(args[1], item, file, _join(path, key)) for key, item in _mapping(value, file, path).items()}
    if kind is bool:
        return _boolean(value, file, path)
    if kind is float:
        return _number(value, file, path)
    if kind is str:
        if not isinstance(value, str) or not value:
            raise _wrong(file, path, "a string", value)
        return value
    return _record(kind, _mapping(value, file, path), file, path)


def _record(kind: type[Any], value: Mapping[str, Any], file: str, path: str) -> Any:
    accepted = option_types(kind)
    for key in value:
        if key not in accepted:
            raise ConfigError(
                f"unknown key '{clipped(key)}'", place=_place(file, _join(path, key)), remedy=nearest(key, accepted)
            )
    required = [item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING]
    for name in required:
        if name not in value:
            expected = f"an object with {' and '.join(required)}; accepted {', '.join(accepted)}"
            raise ConfigError(f"key '{name}' is missing", place=_place(file, path), expected=expected)
    options = {key: _read(accepted[key], item, file, _join(path, key)) for key, item in value.items()}
    try:
        return kind(**options)
    except FxquantError as err:
        place = _place(file, path)
        raise ConfigError(err.thing, place=place, expected=err.expected, got=err.got, remedy=err.remedy) from err


def _mapping(value: Any, file: str, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(file, path, "an object", value)
    return value


def _boolean(value: Any, file: str, path: str) -> bool:
    if isinstance(value, str) and value in _BOOLEANS:
        return _BOOLEANS[value]
    meant = str(value).capitalize()
    remedy = f'Write "{meant}", with quotes.' if meant in _BOOLEANS else ""
    raise _wrong(file, path, 'the string "True" or "False"', value, remedy)


def _number(value: Any, file: str, path: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise _wrong(file, path, "a finite number", value)
    return float(value)


def _choice(choices: tuple[Any, ...], value: Any, file: str, path: str) -> Any:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    raise _wrong(file, path, " or ".join(json.dumps(choice) for choice in choices), value)


def _wrong(file: str, path: str, expected: str, value: Any, remedy: str = "") -> ConfigError:
    shown = json.dumps(value)
    got = "null" if value is None else f"{_NAMES[type(value)]}, {shown if len(shown) < 60 else shown[:57] + '...'}"
    return ConfigError("wrong value", place=_place(file, path), expected=expected, got=got, remedy=remedy)


def _place(file: str, path: str) -> str:
    return f"{file}: {path}" if path else file


def _join(path: str, key: str) -> str:
    return f"{path}.{clipped(key)}" if path else clipped(key)
