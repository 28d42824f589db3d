"""What graph records need to stand in a file: their meta as plain values, and a check that loading them runs no
foreign code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fxquant.errors import StorageError
from fxquant.graph.options import decode, encode
from fxquant.graph.program import ValueType
from fxquant.graph.statistics import STATISTICS, ChannelStatistics
from fxquant.spec import QuantSpec

_OPS = frozenset(("placeholder", "get_attr", "call_function", "call_module", "output"))
# Arithmetic on sizes, and taking one of several outputs: all that a captured graph calls besides registered operators.
_ARITHMETIC = frozenset(
    f"_operator:{name}"
    for name in (
        *("getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pos", "pow", "abs", "index"),
        *("lt", "le", "gt", "ge", "eq", "ne", "and_", "or_", "xor", "not_", "lshift", "rshift"),
    )
)
_KNOWN_FUNCTIONS = ("torch:sym_", "math:", "fxquant.ops.", "fxquant.numerics.")


def encode_meta(meta: dict[str, Any], name: str) -> dict[str, Any]:
    """A node's meta as plain values; StorageError names a key whose value is none."""
    return {key: _encode_value(key, value, name) for key, value in meta.items()}


def decode_meta(meta: dict[str, Any], name: str) -> dict[str, Any]:
    """The inverse of `encode_meta`."""
    return {key: _decode_value(key, value, f"node '{name}': {key}") for key, value in meta.items()}


def _encode_value(key: str, value: Any, name: str) -> Any:
    if key == "type":
        return _encode_type(value) if isinstance(value, ValueType) else [_encode_type(item) for item in value]
    if key == "output_spec":
        return encode(value)
    if key == "input_specs":
        return {str(slot): encode(spec) for slot, spec in value.items()}
    if key == "input_rules":
        return {str(slot): rule for slot, rule in value.items()}
    if key == STATISTICS:
        return value.to_dict()
    if not _is_plain(value):
        expected = "numbers, strings, lists and dicts of such"
        raise StorageError(f"node '{name}': meta '{key}' cannot be saved", expected=expected, got=type(value).__name__)
    return value


def _decode_value(key: str, value: Any, place: str) -> Any:
    if key == "type":
        return _decode_type(value) if isinstance(value, dict) else tuple(_decode_type(item) for item in value)
    if key == "output_spec":
        return decode(QuantSpec, value, place)
    if key == "input_specs":
        return {int(slot): decode(QuantSpec, spec, place) for slot, spec in value.items()}
    if key == "input_rules":
        return {int(slot): decode(str, rule, place) for slot, rule in value.items()}
    if key == STATISTICS:
        return ChannelStatistics.from_dict(decode(dict[str, tuple[float, ...]], value, place))
    return value


def _encode_type(value: ValueType) -> dict[str, Any]:
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def _decode_type(value: dict[str, Any]) -> ValueType:
    dtype = getattr(torch, value["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise StorageError("value type", expected="a dtype of torch", got=repr(value["dtype"]))
    return ValueType(tuple(value["shape"]), dtype)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def refuse_foreign_code(records: Sequence[dict[str, Any]], root: nn.Module, trusted: Sequence[str]) -> None:
    """Raise StorageError unless every record is one that capture could have written for `root`.

    torch.fx writes names and paths into Python code, and a call_function target is imported by name: a file from
    elsewhere must not smuggle code in by either.
    """
    modules = {path for path, _ in root.named_modules(remove_duplicate=False)}
    tensors = {path for path, _ in _named_tensors(root)}
    for record in records:
        if record["op"] == "codegen":
            _require(all(map(_is_identifier, record["names"])), "codegen", "argument names", record["names"])
            continue
        name, target = record["name"], record["target"]
        _require(record["op"] in _OPS, name, f"one of {', '.join(sorted(_OPS))}", record["op"])
        if record["op"] == "placeholder":
            _require(_is_identifier(target.lstrip("*")), name, "a name", target)
        if record["op"] == "call_module":
            _require(target in modules, name, "a module of the file", target)
        if record["op"] == "get_attr":
            _require(target in tensors, name, "a tensor of the file", target)
        if record["op"] == "call_function":
            remedy = f"If you trust it: load_program(path, trusted=['{target.partition(':')[0].partition('.')[0]}'])."
            _require(_is_known(target, trusted), name, "a registered operator or arithmetic on sizes", target, remedy)
        keys = [key for key, _ in record["kwargs"]["dict"]]
        _require(all(map(_is_identifier, keys)), name, "keyword names", keys)


def _named_tensors(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from root.named_parameters(remove_duplicate=False)
    yield from root.named_buffers(remove_duplicate=False)


def _is_known(target: str, trusted: Sequence[str]) -> bool:
    module, is_function, _ = target.partition(":")
    if not is_function or target in _ARITHMETIC or target.startswith(_KNOWN_FUNCTIONS):
        return True
    return any(module == name or module.startswith(f"{name}.") for name in trusted)


def _is_identifier(text: Any) -> bool:
    return isinstance(text, str) and text.isidentifier()


def _require(holds: bool, name: str, expected: str, got: Any, remedy: str = "") -> None:
    if not holds:
        raise StorageError(f"node '{name}' of a program file", expected=expected, got=repr(got), remedy=remedy)
