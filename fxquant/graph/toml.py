"""Plain values as TOML (the standard library reads it, and does not write it)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fxquant.graph.manager import PassManager
from fxquant.graph.options import encode


def pass_tables(section: str, passes: PassManager) -> list[str]:
    """The tables of a list of passes, with the options that are not at their defaults."""
    lines: list[str] = []
    for item in passes:
        lines += ["", f"[[{section}]]", f"pass = {toml(item.name)}", *entries(encode(item))]
    return lines


def entries(options: Mapping[str, Any]) -> list[str]:
    """The lines of one table."""
    return [f"{_key(key)} = {toml(value)}" for key, value in options.items()]


def _key(text: str) -> str:
    return text if text.replace("_", "").replace("-", "").isalnum() and text.isascii() else _string(text)


def _string(text: str) -> str:
    """A TOML basic string: JSON's, but for the one control character that JSON lets stand."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml(value: Any) -> str:
    """A plain value as TOML; tables are written inline."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{_key(str(key))} = {toml(item)}" for key, item in value.items() if item is not None)
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return repr(value)
