"""Entries as JSON: the three versions of encodings files.

    0.6.1   activation_encodings, param_encodings: {tensor: [{bitwidth, dtype, is_symmetric, max, min, offset, scale}]}
    1.0.0   activation_encodings, param_encodings: [{name, enc_type, dtype, bw, is_sym, scale, offset, block_size?}]
    2.0.0   encodings: [{name, output_dtype, y_scale, y_zero_point, axis?, block_size?}]

Lists are in row-major order of the scale tensor. 0.6.1 and 1.0.0 leave the axis to whoever knows the tensor, and 0.6.1
the blocks too. Scales are written as the shortest decimal that is the same double: reading gives the same float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from fxquant.encodings.entry import Entry, Section

Json = dict[str, Any]
SECTIONS = (Section.ACTIVATIONS, Section.PARAMETERS)


def lowest_code(bits: int, is_signed: bool) -> int:
    """Lowest code of the full grid."""
    return -(1 << (bits - 1)) if is_signed else 0


def document(entries: Sequence[Entry], version_: str) -> Json:
    """The JSON document of `version_` that says `entries`, in their order."""
    head = {"version": version_, "producer": {"package": "fxquant", "version": version("fxquant")}}
    return head | WRITERS[version_](entries)


def _as_0_6_1(entries: Sequence[Entry]) -> Json:
    sections = {
        section.value: {entry.name: _grids_0_6_1(entry) for entry in entries if entry.section is section}
        for section in SECTIONS
    }
    return sections | {"excluded_layers": [], "quantizer_args": {}}


def _grids_0_6_1(entry: Entry) -> list[Json]:
    steps = (1 << entry.bits) - 1
    return [
        {
            "bitwidth": entry.bits,
            "dtype": "int",
            "is_symmetric": str(entry.is_symmetric),
            "max": (offset + steps) * scale,
            "min": offset * scale,
            "offset": offset,
            "scale": scale,
        }
        for scale, offset in zip(entry.scales, entry.offsets, strict=True)
    ]


def _as_1_0_0(entries: Sequence[Entry]) -> Json:
    return {
        section.value: [_entry_1_0_0(entry) for entry in entries if entry.section is section] for section in SECTIONS
    }


def _entry_1_0_0(entry: Entry) -> Json:
    assert entry.kind is not None
    said: Json = {
        "name": entry.name,
        "enc_type": entry.kind.value,
        "dtype": "INT",
        "bw": entry.bits,
        "is_sym": entry.is_symmetric,
        "scale": list(entry.scales),
        "offset": list(entry.offsets),
    }
    return said if entry.block is None else said | {"block_size": entry.block}


def _as_2_0_0(entries: Sequence[Entry]) -> Json:
    return {Section.ALL.value: [_entry_2_0_0(entry) for entry in entries]}


def _entry_2_0_0(entry: Entry) -> Json:
    assert entry.shape is not None and entry.is_signed is not None
    lowest = lowest_code(entry.bits, entry.is_signed)
    said: Json = {
        "name": entry.name,
        "output_dtype": f"{'int' if entry.is_signed else 'uint'}{entry.bits}",
        "y_scale": np.array(entry.scales).reshape(entry.shape).tolist(),
        "y_zero_point": np.array([lowest - offset for offset in entry.offsets]).reshape(entry.shape).tolist(),
    }
    for key, value in (("axis", entry.axis), ("block_size", entry.block)):
        said |= {} if value is None else {key: value}
    return said


WRITERS: dict[str, Callable[[Sequence[Entry]], Json]] = {"0.6.1": _as_0_6_1, "1.0.0": _as_1_0_0, "2.0.0": _as_2_0_0}
