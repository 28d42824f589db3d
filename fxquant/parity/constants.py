"""The static check: every integer constant and every grid of the file against the program's, bit for bit.

A constant may be stored transposed (linear at rank above 2 is a MatMul): of the transpositions that fit its shape, the
one that explains the file best counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from torch import fx

from fxquant.lowering.encodings import Encodings, StoredCodes, storage_dtype
from fxquant.numerics.runtime import Array
from fxquant.parity.onnx_file import FileQuantizer, GridNames, OnnxFile
from fxquant.parity.segments import SegmentReader


@dataclass(frozen=True)
class StoredDifference:
    """A constant of the file that is not the program's.

    Arguments:
        quantizer: the FakeQuant or BiasFakeQuant node that it stands for.
        tensor: its name in the file, or the quantizer's where there is no tensor.
        owners: the nodes that it belongs to.
        what: "codes", "scale", "zero point", "axis", "shape" or "missing".
        compared, differing: how many numbers were compared, and how many differ.
        worst: the largest difference, in steps; for a scale relative to the program's.
        detail: the first difference in words.
        is_constant: whether it is a layer's weight or bias (its codes or their grid), not an activation's grid.
    """

    quantizer: str
    tensor: str
    owners: tuple[str, ...]
    what: str
    compared: int
    differing: int
    worst: float
    detail: str
    is_constant: bool

    def __str__(self) -> str:
        return f"{', '.join(self.owners)}: {self.what} of {self.tensor}: {self.detail}"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {**vars(self), "owners": list(self.owners)}


def compare_stored(reader: SegmentReader, file: OnnxFile) -> tuple[StoredDifference, ...]:
    """Every difference between the file's and the program's constants and grids, in graph order."""
    return tuple(_Comparison(reader, file).differences())


@dataclass(frozen=True)
class _Found:
    """One kind of difference in one tensor, before it is known whose it is."""

    tensor: str
    what: str
    compared: int
    differing: int
    worst: float
    detail: str


class _Comparison:
    def __init__(self, reader: SegmentReader, file: OnnxFile) -> None:
        self._reader = reader
        self._file = file
        self._encodings = Encodings(reader.program, reader.constants, file.opset)
        self._quantizers = file.quantizers()

    def differences(self) -> Iterator[StoredDifference]:
        for node in self._reader.program.graph.nodes:
            if self._is_written(node):
                owners, is_constant = self._reader.owners(node), self._reader.is_constant_quantizer(node)
                for found in self._at(node):
                    yield StoredDifference(quantizer=node.name, owners=owners, is_constant=is_constant, **vars(found))

    def _is_written(self, node: fx.Node) -> bool:
        program = self._reader.program
        is_quantizer = program.fake_quant(node) is not None or program.bias_fake_quant(node) is not None
        return is_quantizer and bool(node.users) and not self._encodings.is_off(node)

    def _at(self, node: fx.Node) -> Iterator[_Found]:
        quantizers = self._quantizers.get(node.name, [])
        if not quantizers:
            yield _Found(node.name, "missing", 1, 1, 0.0, "the file has no DequantizeLinear of this name")
        for quantizer in quantizers:
            if self._reader.is_constant_quantizer(node):
                yield from self._constant(quantizer, self._encodings.stored(node))
            else:
                yield from self._activation(node, quantizer)

    def _activation(self, node: fx.Node, quantizer: FileQuantizer) -> Iterator[_Found]:
        encoding = self._encodings.encoding(node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        rank = len(source.meta["type"].shape)
        axis = encoding.spec.granularity.axis if encoding.scale.ndim else None
        axis = axis if axis is None else axis % rank
        zero_point = encoding.zero_point.numpy().astype(storage_dtype(node, encoding.spec, self._file.opset))
        expected = StoredCodes(zero_point, encoding.scale.numpy(), zero_point, axis)
        if quantizer.quantize is None:
            yield _Found(quantizer.codes, "missing", 1, 1, 0.0, "no QuantizeLinear computes these codes")
        grids = {quantizer.dequantize} | ({quantizer.quantize} if quantizer.quantize else set())
        for grid in sorted(grids, key=str):
            yield from self._grid(grid, expected, rank)

    def _constant(self, quantizer: FileQuantizer, expected: StoredCodes) -> Iterator[_Found]:
        stored = self._file.constant(quantizer.codes)
        if stored is None:
            yield _Found(quantizer.codes, "missing", 1, 1, 0.0, "the codes are not a constant of the file")
            return
        orders = _orders(expected.codes, stored)
        if not orders:
            detail = f"shape {list(stored.shape)}, the program has {list(expected.codes.shape)}"
            yield _Found(quantizer.codes, "shape", stored.size, stored.size, 0.0, detail)
            return
        results = [list(self._ordered(quantizer, expected, stored, order)) for order in orders]
        yield from min(results, key=lambda found: sum(item.differing for item in found))

    def _ordered(
        self, quantizer: FileQuantizer, expected: StoredCodes, stored: Array, order: tuple[int, ...]
    ) -> Iterator[_Found]:
        written = expected.transposed(order)
        yield from _steps(quantizer.codes, "codes", written.codes, stored)
        yield from self._grid(quantizer.dequantize, written, stored.ndim)

    def _grid(self, grid: GridNames, expected: StoredCodes, rank: int) -> Iterator[_Found]:
        scale = self._file.constant(grid.scale)
        zero_point = self._file.constant(grid.zero_point) if grid.zero_point else np.zeros_like(expected.zero_point)
        for name, found in ((grid.scale, scale), (grid.zero_point, zero_point)):
            if found is None:
                yield _Found(name, "missing", 1, 1, 0.0, "the grid is not a constant of the file")
        if scale is not None:
            yield from _scales(grid.scale, expected.scale, scale)
        if zero_point is not None:
            yield from _steps(
                grid.zero_point or grid.scale, "zero point", expected.zero_point.ravel(), zero_point.ravel()
            )
        if expected.axis is None or scale is None or scale.size < 2:
            return
        stored, wanted = (grid.axis % rank, grid.block), (expected.axis, expected.block or 0)
        if stored != wanted:
            # Every channel or block reads another one's grid.
            detail = f"{_along(*stored)}, the program has {_along(*wanted)}"
            yield _Found(grid.scale, "axis", scale.size, scale.size, 0.0, detail)


def _along(axis: int, block: int) -> str:
    return f"axis {axis}" + (f" in blocks of {block}" if block else "")


def _orders(expected: Array, stored: Array) -> list[tuple[int, ...]]:
    """The transpositions that give `expected` the shape of `stored`: the identity alone where that explains it all."""
    identity = tuple(range(expected.ndim))
    if expected.ndim < 2:
        return [identity] if expected.shape == stored.shape else []
    fitting = [
        order for order in permutations(identity) if tuple(expected.shape[axis] for axis in order) == stored.shape
    ]
    exact = [order for order in fitting if np.array_equal(expected.transpose(order), stored)]
    return exact or fitting


def _steps(tensor: str, what: str, expected: Array, stored: Array) -> Iterator[_Found]:
    if expected.shape != stored.shape:
        detail = f"shape {list(stored.shape)}, the program has {list(expected.shape)}"
        yield _Found(tensor, what, stored.size, stored.size, 0.0, detail)
        return
    difference = stored.astype(np.int64) - expected.astype(np.int64)
    count = int(np.count_nonzero(difference))
    if count:
        detail = f"{count} of {stored.size} differ, {_first(difference != 0, expected, stored)}"
        yield _Found(tensor, what, stored.size, count, float(np.abs(difference).max()), detail)
    if stored.dtype != expected.dtype:
        yield _Found(
            tensor, what, stored.size, stored.size, 0.0, f"dtype {stored.dtype}, the program has {expected.dtype}"
        )


def _scales(tensor: str, expected: Array, stored: Array) -> Iterator[_Found]:
    if stored.ndim > 1 and stored.shape != expected.shape:
        detail = f"shape {list(stored.shape)}, the program has {list(expected.shape)}"
        yield _Found(tensor, "scale", stored.size, stored.size, 0.0, detail)
        return
    flat, program = stored.ravel(), expected.ravel()
    if flat.shape != program.shape:
        yield _Found(tensor, "scale", flat.size, flat.size, 0.0, f"{flat.size} scales, the program has {program.size}")
        return
    differs = flat != program
    if differs.any():
        count, worst = int(differs.sum()), float(np.abs(flat.astype(np.float64) / program.astype(np.float64) - 1).max())
        detail = f"{count} of {flat.size} differ by up to {worst:.3g} relative, {_first(differs, program, flat)}"
        yield _Found(tensor, "scale", flat.size, count, worst, detail)


def _first(differs: Array, expected: Array, stored: Array) -> str:
    index = tuple(int(i) for i in np.argwhere(differs)[0])
    return f"first at {list(index)}: {stored[index]}, the program has {expected[index]}"
