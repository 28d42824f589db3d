"""Encodings files, read: which version a file is of is seen from the file itself.

What fxquant does not simulate (LPBQ, vector quantization) is refused by name. Floating dtypes are entries without a
grid. Fields that say nothing about grids are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fxquant.encodings.entry import Entry, Kind, Section
from fxquant.encodings.formats import SECTIONS, WRITERS, lowest_code
from fxquant.encodings.item import Item, read_document, require_unique
from fxquant.numerics.grids import SMALLEST_SCALE
from fxquant.spec import BIAS_SPEC

FEWEST_BITS, MOST_BITS = 2, 32
_DTYPE = re.compile(r"(u?)int(\d+)|(?:b?float)(\d+)")
_TORCH_FILE = "Is it the file with torch's names (..._torch.encodings)? Take the one beside it, with ONNX's names."
# Slack in steps between offset * scale and a file's own min and max, which may leave out a strict grid's lowest code.
_RANGE_SLACK = 1.01


@dataclass(frozen=True)
class EncodingsFile:
    """What an encodings file says."""

    path: str
    version: str
    entries: tuple[Entry, ...]


def read_encodings(path: Path) -> EncodingsFile:
    """Read a file of any version; StorageError naming file, place in it, what was expected and what is there."""
    root = read_document(path)
    version = _version(root)
    return EncodingsFile(str(path), version, tuple(_READERS[version](root)))


def _version(root: Item) -> str:
    said = root.maybe("version")
    found = said.text(tuple(WRITERS)) if said is not None else _version_by_shape(root)
    if not any(root.maybe(section.value) for section in _sections(found)):
        expected = " or ".join(f"'{section.value}'" for section in _sections(found))
        raise root.refuse(f"a field {expected} (version {found})", f"fields {', '.join(root.keys()) or 'none'}")
    return found


def _version_by_shape(root: Item) -> str:
    if root.maybe(Section.ALL.value) is not None:
        return "2.0.0"
    first = next((item for section in SECTIONS if (item := root.maybe(section.value))), None)
    if first is None:
        raise root.refuse("a field 'version'", f"fields {', '.join(root.keys()) or 'none'}")
    return "0.6.1" if isinstance(first.value, dict) else "1.0.0"


def _sections(version: str) -> tuple[Section, ...]:
    return (Section.ALL,) if version == "2.0.0" else SECTIONS


# --- 0.6.1 -----------------------------------------------------------------------------------------------------------


def _read_0_6_1(root: Item) -> Iterator[Entry]:
    listed = [(name, section, found.at(name)) for section, found in _present(root) for name in found.keys()]
    require_unique((name, item) for name, _, item in listed)
    return (_entry_0_6_1(*each) for each in listed)


def _present(root: Item) -> Iterator[tuple[Section, Item]]:
    """The sections of 0.6.1 and 1.0.0 that are there."""
    for section in SECTIONS:
        found = root.maybe(section.value)
        if found is not None:
            yield section, found


def _entry_0_6_1(name: str, section: Section, item: Item) -> Entry:
    if not isinstance(item.value, list):
        raise item.refuse("a list of grids", remedy=_TORCH_FILE if isinstance(item.value, dict) else "")
    grids = item.items()
    if not grids:
        raise item.refuse("at least one grid", "an empty list")
    words = [grid.at("dtype").text(("int", "float")) for grid in grids]
    bits = [grid.at("bitwidth").integer(FEWEST_BITS, MOST_BITS) for grid in grids]
    _require_one(item, "dtype", words)
    _require_one(item, "bitwidth", bits)
    if words[0] == "float":
        return Entry(name, section, bits[0], is_float=True, place=item.path)
    flags = [grid.at("is_symmetric").flag() for grid in grids]
    _require_one(item, "is_symmetric", flags)
    pairs = [_grid_0_6_1(grid, bits[0]) for grid in grids]
    return Entry(
        name,
        section,
        bits[0],
        is_symmetric=flags[0],
        scales=tuple(scale for scale, _ in pairs),
        offsets=tuple(offset for _, offset in pairs),
        place=item.path,
    )


def _grid_0_6_1(grid: Item, bits: int) -> tuple[float, int]:
    steps = (1 << bits) - 1
    scale, offset = _scale(grid.at("scale"), bits), grid.at("offset").integer(-steps, 0)
    for key, code in (("min", offset), ("max", offset + steps)):
        said = grid.maybe(key)
        if said is not None and abs(said.number() - code * scale) > _RANGE_SLACK * scale:
            raise said.refuse(f"{code * scale:.9g}, as scale and offset say")
    return scale, offset


def _require_one(item: Item, key: str, values: list[str] | list[int] | list[bool]) -> None:
    if len(set(values)) > 1:
        raise item.refuse(f"one '{key}' for all grids of a tensor", ", ".join(sorted({str(v) for v in values})))


# --- 1.0.0 -----------------------------------------------------------------------------------------------------------


def _read_1_0_0(root: Item) -> Iterator[Entry]:
    listed = [(item.at("name").text(), section, item) for section, found in _present(root) for item in found.items()]
    require_unique((name, item) for name, _, item in listed)
    return (_entry_1_0_0(*each) for each in listed)


def _entry_1_0_0(name: str, section: Section, item: Item) -> Entry:
    bits = item.at("bw").integer(FEWEST_BITS, MOST_BITS)
    if item.at("dtype").text(("INT", "FLOAT")) == "FLOAT":
        return Entry(name, section, bits, is_float=True, place=item.path)
    kind = Kind(item.at("enc_type").text(tuple(kind.value for kind in Kind)))
    scales = [_scale(scale, bits) for scale in item.at("scale").items()]
    offsets = [offset.integer(1 - (1 << bits), 0) for offset in item.at("offset").items()]
    _require_lengths(item.at("scale"), scales, offsets)
    block = item.at("block_size").integer(1, 2**31) if kind is Kind.PER_BLOCK else None
    return Entry(
        name,
        section,
        bits,
        is_symmetric=item.at("is_sym").flag(),
        scales=tuple(scales),
        offsets=tuple(offsets),
        kind=kind,
        block=block,
        place=item.path,
    )


def _require_lengths(item: Item, scales: list[float], offsets: list[int]) -> None:
    if len(scales) != len(offsets) or not scales:
        raise item.refuse("as many scales as offsets, and at least one", f"{len(scales)} and {len(offsets)}")


# --- 2.0.0 -----------------------------------------------------------------------------------------------------------


def _read_2_0_0(root: Item) -> Iterator[Entry]:
    listed = [(item.at("name").text(), item) for item in root.at(Section.ALL.value).items()]
    require_unique(listed)
    return (_entry_2_0_0(*each) for each in listed)


def _entry_2_0_0(name: str, item: Item) -> Entry:
    if item.keys() == ["name"]:  # AIMET writes floats so
        return Entry(name, Section.ALL, MOST_BITS, is_float=True, place=item.path)
    dtype = item.at("output_dtype")
    match = _DTYPE.fullmatch(dtype.text())
    if match is None or not FEWEST_BITS <= int(match[2] or match[3]) <= MOST_BITS:
        raise dtype.refuse(f'"int8", "uint8" and so on ({FEWEST_BITS} to {MOST_BITS} bits), or "float16" or "float32"')
    if match[2] is None:
        return Entry(name, Section.ALL, int(match[3]), is_float=True, place=item.path)
    _refuse_grouped(item)
    bits, is_signed = int(match[2]), not match[1]
    scales, shape = item.at("y_scale").flat()
    if not scales:
        raise item.at("y_scale").refuse("at least one scale", "an empty list")
    axis, block = item.maybe("axis"), item.maybe("block_size")
    return Entry(
        name,
        Section.ALL,
        bits,
        is_signed=is_signed,
        scales=tuple(_scale(scale, bits) for scale in scales),
        offsets=_offsets_2_0_0(item, bits, is_signed, shape, len(scales)),
        shape=shape,
        axis=None if axis is None else axis.integer(-64, 63),
        block=None if block is None else block.integer(1, 2**31),
        place=item.path,
    )


def _refuse_grouped(item: Item) -> None:
    for key in ("per_block_int_scale", "per_channel_float_scale"):
        found = item.maybe(key)
        if found is not None:
            raise found.refuse("a grid of 'y_scale' and 'y_zero_point'", f"'{key}' (grouped blocks, LPBQ)")


def _offsets_2_0_0(item: Item, bits: int, is_signed: bool, shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    lowest = lowest_code(bits, is_signed)
    said = item.maybe("y_zero_point")
    if said is None:  # ONNX's default
        return (lowest,) * count
    points, found = said.flat()
    if found != shape:
        raise said.refuse(f"the shape of y_scale, {list(shape)}", str(list(found)))
    return tuple(lowest - point.integer(lowest, lowest + (1 << bits) - 1) for point in points)


def _scale(item: Item, bits: int) -> float:
    """A scale, rounded to float32 as it is used; a bias's is the product of two others."""
    found = float(torch.tensor(item.number(), dtype=torch.float64).to(torch.float32))
    smallest = SMALLEST_SCALE**2 if bits == BIAS_SPEC.bits else SMALLEST_SCALE
    if not smallest <= found < float("inf"):
        raise item.refuse(f"a finite float32 scale above 0 (at least {smallest:.3g})")
    return found


_READERS: dict[str, Callable[[Item], Iterator[Entry]]] = {
    "0.6.1": _read_0_6_1,
    "1.0.0": _read_1_0_0,
    "2.0.0": _read_2_0_0,
}
