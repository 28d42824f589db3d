"""The grids and integer codes that a program's FakeQuants stand for at export."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from fxquant.errors import ExportError
from fxquant.graph.constants import Constants
from fxquant.graph.program import Program, describe
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.numerics.rounding import along_axis, quantize
from fxquant.spec import BIAS_SPEC, Encoding, Granularity, QuantSpec

Array = np.ndarray[Any, Any]

OPSET_OF_16_BITS = 21
OPSET_OF_BLOCKS = 21


@dataclass(frozen=True, eq=False)
class StoredCodes:
    """A quantized constant: codes, scale and zero point (of the codes' dtype), and what axis and block those belong to.

    In blocks, scale and zero point have the codes' rank.
    """

    codes: Array
    scale: Array
    zero_point: Array
    axis: int | None
    block: int | None = None

    def transposed(self, order: tuple[int, ...]) -> StoredCodes:
        """The same constant with its axes in another order."""
        if list(order) == sorted(order):
            return self
        codes = np.ascontiguousarray(self.codes.transpose(order))
        axis = None if self.axis is None else order.index(self.axis)
        if self.block is None:
            return replace(self, codes=codes, axis=axis)
        scale, zero_point = (np.ascontiguousarray(part.transpose(order)) for part in (self.scale, self.zero_point))
        return StoredCodes(codes, scale, zero_point, axis, self.block)


class Encodings:
    """Encodings of the FakeQuant and BiasFakeQuant nodes of one program.

    A FakeQuant whose grid follows its weight is brought up to date with it on a copy: exporting changes nothing.
    """

    def __init__(self, program: Program, constants: Constants, opset: int) -> None:
        self._program = program
        self._constants = constants
        self._opset = opset
        self._found: dict[FakeQuant, Encoding] = {}
        self._stored: dict[fx.Node, StoredCodes] = {}

    def is_constant_quantizer(self, node: fx.Node) -> bool:
        """Whether `node` is the FakeQuant or BiasFakeQuant of a constant."""
        if self._program.fake_quant(node) is None and self._program.bias_fake_quant(node) is None:
            return False
        source = node.args[0]
        return isinstance(source, fx.Node) and self._constants.is_constant(source)

    def is_off(self, node: fx.Node) -> bool:
        """Whether a FakeQuant, or one of the two that a BiasFakeQuant depends on, passes its input on."""
        module = self._program.fake_quant(node)
        if module is not None:
            return module.mode is Mode.OFF
        bias = self._program.bias_fake_quant(node)
        return bias is not None and any(source.mode is Mode.OFF for source in bias.sources)

    def encoding(self, node: fx.Node) -> Encoding:
        """The grid of a FakeQuant or BiasFakeQuant node."""
        bias = self._program.bias_fake_quant(node)
        if bias is not None:
            return self._bias_encoding(node)
        module = self._program.fake_quant(node)
        assert module is not None, node.format_node()
        if module not in self._found:
            self._found[module] = self._encode(node, module)
        return self._found[module]

    def stored(self, node: fx.Node) -> StoredCodes:
        """The codes of a constant behind a FakeQuant or BiasFakeQuant node, in the dtype that they are stored in."""
        if node not in self._stored:
            self._stored[node] = self._store(node)
        return self._stored[node]

    def _store(self, node: fx.Node) -> StoredCodes:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        tensor, encoding = self._constants.tensor(source), self.encoding(node)
        if tensor.dtype is not torch.float32:
            raise ExportError(
                f"export: '{source.name}' is quantized",
                place=describe(source),
                expected="a float32 parameter",
                got=str(tensor.dtype),
                remedy="Capture the model in float32 (model.float()).",
            )
        spec = encoding.spec
        axis, block = (spec.granularity.axis, spec.granularity.block) if encoding.scale.ndim else (None, None)
        grid = [along_axis(part, spec.granularity, tensor.ndim) for part in (encoding.scale, encoding.zero_point)]
        codes = quantize(tensor, grid[0], grid[1], spec.qmin, spec.qmax).numpy()
        dtype = storage_dtype(node, spec, self._opset)
        zero_point = encoding.zero_point.numpy().astype(dtype)
        axis = None if axis is None else axis % tensor.ndim
        return StoredCodes(codes.astype(dtype), encoding.scale.numpy(), zero_point, axis, block)

    def _encode(self, node: fx.Node, module: FakeQuant) -> Encoding:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if module.is_following and self._constants.is_constant(source):
            module = copy.deepcopy(module)
            module.follow(self._constants.tensor(source).to(module.scale.device))
        return module.encoding

    def _bias_encoding(self, node: fx.Node) -> Encoding:
        _, x_node, weight_node = node.args
        assert isinstance(x_node, fx.Node) and isinstance(weight_node, fx.Node)
        scale = self.encoding(x_node).scale * self.encoding(weight_node).scale
        spec = QuantSpec(
            BIAS_SPEC.bits, signed=True, symmetric=True, granularity=Granularity(0 if scale.ndim else None)
        )
        return Encoding(scale, torch.zeros_like(scale, dtype=torch.int64), spec)


def storage_dtype(node: fx.Node, spec: QuantSpec, opset: int) -> np.dtype[Any]:
    """The dtype that codes of `spec` are stored in: the narrowest of 8, 16 and 32 bits that holds them.

    Raises ExportError where `opset` cannot say the grid.
    """
    if spec.granularity.block is not None and opset < OPSET_OF_BLOCKS:
        raise ExportError(
            f"export: node '{node.name}' quantizes in blocks of {spec.granularity.block}",
            place=describe(node),
            expected=f"opset {OPSET_OF_BLOCKS} or later, the first whose DequantizeLinear has block_size",
            got=f"opset {opset}",
            remedy=f"Export with opset={OPSET_OF_BLOCKS}, or quantize per tensor or per channel.",
        )
    if 8 < spec.bits <= 16 and opset < OPSET_OF_16_BITS:
        raise ExportError(
            f"export: node '{node.name}' quantizes to {spec.bits} bits",
            place=describe(node),
            expected=f"opset {OPSET_OF_16_BITS} or later, the first with 16-bit QuantizeLinear",
            got=f"opset {opset}",
            remedy=f"Export with opset={OPSET_OF_16_BITS}, or quantize to 8 bits.",
        )
    width = 8 if spec.bits <= 8 else 16 if spec.bits <= 16 else 32
    return np.dtype(f"{'int' if spec.signed else 'uint'}{width}")
