"""The model of a self-test: cases of one operator, side by side, each with the codes that are expected of it.

codes (graph input) -> DequantizeLinear -> operation -> QuantizeLinear -> codes (graph output)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from fxquant.numerics.codes import Grid
from fxquant.numerics.kernels.requantize import dequantize_product, product_multiplier, requantize, wrap_int32
from fxquant.numerics.runtime import Array

OPSET, IR_VERSION = 21, 10
_ELEMENTS = {
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "float32": TensorProto.FLOAT,
    "bool": TensorProto.BOOL,
}


@dataclass(frozen=True, eq=False)
class Expected:
    """What a graph output must be, bit for bit; `case` says which case it belongs to."""

    case: str
    output: str
    values: Array


@dataclass(frozen=True, eq=False)
class Product:
    """A case of a sum of products: u8 codes `x`, s8 codes `w` with a scale for each output channel, int32 `bias`.

    Arguments:
        accumulator: int64 sums, bias included, with the channels on `axis`.
    """

    x: Array
    w: Array
    bias: Array | None
    grid: Grid
    scales: torch.Tensor
    accumulator: torch.Tensor
    axis: int


def byte_grid(scale: float, zero_point: int) -> Grid:
    """A grid of u8 codes, per tensor."""
    return Grid(torch.tensor(scale, dtype=torch.float32), torch.tensor(zero_point), 0, 255)


class Bench:
    """Builds the model case by case; names are numbered."""

    def __init__(self) -> None:
        self.feed: dict[str, Array] = {}
        self.expected: list[Expected] = []
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def model(self) -> bytes:
        """The ONNX model of all cases."""
        graph = helper.make_graph(self._nodes, "self_test", self._inputs, self._outputs, self._constants)
        opsets = [helper.make_opsetid("", OPSET)]
        data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString()
        return data

    def given(self, values: Array) -> str:
        """A graph input that `values` are fed to."""
        name = f"given{len(self.feed)}"
        self._inputs.append(helper.make_tensor_value_info(name, _ELEMENTS[str(values.dtype)], values.shape))
        self.feed[name] = values
        return name

    def activation(self, codes: torch.Tensor | Array, grid: Grid) -> str:
        """Real values of u8 codes that are fed."""
        return self.dequantized(self.given(np.asarray(codes).astype(np.uint8)), grid)

    def dequantized(self, codes: str, grid: Grid) -> str:
        """Real values of u8 codes."""
        return self.op("DequantizeLinear", codes, *self._grid(grid))

    def weight(self, codes: Array, scales: torch.Tensor, axis: int) -> str:
        """Real values of constant integers (s8 or int32), symmetric, of one scale a channel."""
        zeros = np.zeros(len(scales), codes.dtype)
        tensors = (self.constant(codes), self.constant(scales.numpy()), self.constant(zeros))
        return self.op("DequantizeLinear", *tensors, axis=axis)

    def constant(self, values: Array) -> str:
        """An initializer."""
        name = f"constant{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def op(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """A node of one output."""
        name = f"value{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def expect(self, case: str, value: str, expected: torch.Tensor, out: Grid | None) -> None:
        """Compare a value: its codes on `out`, or its float32 values."""
        name = value if out is None else self.op("QuantizeLinear", value, *self._grid(out))
        element = TensorProto.FLOAT if out is None else TensorProto.UINT8
        self._outputs.append(helper.make_tensor_value_info(name, element, list(expected.shape)))
        self.expected.append(Expected(case, name, expected.numpy()))

    def expect_product(self, case: str, value: str, product: Product, out: Grid | None) -> None:
        """Compare a sum of products, requantized or in float32."""
        shape = [1] * product.accumulator.ndim
        shape[product.axis] = -1
        accumulator, scales = wrap_int32(product.accumulator), product.scales.view(shape)
        if out is None:
            self.expect(case, value, dequantize_product(accumulator, product.grid.scale, scales), None)
            return
        multiplier = product_multiplier(product.grid.scale, scales, out.scale)
        self.expect(case, value, requantize(accumulator, multiplier, out), out)

    def operands(self, product: Product, weight_axis: int) -> list[str]:
        """Real values of a product's operands."""
        found = [self.activation(product.x, product.grid), self.weight(product.w, product.scales, weight_axis)]
        if product.bias is not None:
            found.append(self.weight(product.bias, product.grid.scale * product.scales, 0))
        return found

    def _grid(self, grid: Grid) -> Sequence[str]:
        return self.constant(grid.scale.numpy()), self.constant(grid.zero_point.numpy().astype(np.uint8))
