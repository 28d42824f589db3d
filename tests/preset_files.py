"""Reads from an ONNX file, and from nothing else, what a runtime sees: grids, codes, biases, and which edges have Q/DQ.

tests/test_preset_files.py proves on files written by hand that it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

Array = np.ndarray[Any, Any]
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, eq=False)
class Grid:
    """Scale and zero point of a QuantizeLinear or DequantizeLinear; `codes` where it reads a constant, else None."""

    scale: Array
    zero_point: Array
    axis: int | None
    codes: Array | None

    @property
    def dtype(self) -> str:
        """Dtype of the codes."""
        return str(self.zero_point.dtype)

    def equals(self, other: Grid) -> bool:
        """Whether both are one grid."""
        return (
            self.dtype == other.dtype
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )


class Structure:
    """The quantizers of one file."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self._producers = {name: node for node in model.graph.node for name in node.output}

    def nodes(self, *types: str) -> list[onnx.NodeProto]:
        """The nodes of these operator types, in graph order."""
        return [node for node in self.graph.node if node.op_type in types]

    def grid_of(self, tensor: str) -> Grid | None:
        """The grid of what DequantizeLinear gives under this name; None if the tensor is float."""
        node = self._producers.get(tensor)
        return self._grid(node) if node is not None and node.op_type == "DequantizeLinear" else None

    def is_quantized(self, tensor: str) -> bool:
        """Whether a reader of this tensor reads the output of a DequantizeLinear."""
        return self.grid_of(tensor) is not None

    def activations(self) -> list[Grid]:
        """The grid of each QuantizeLinear."""
        return [self._grid(node) for node in self.nodes("QuantizeLinear")]

    def quantizer_behind(self, tensor: str) -> Grid | None:
        """The grid of the QuantizeLinear that reads a tensor, directly or behind a relu or clip."""
        for node in self.graph.node:
            if node.input and node.input[0] == tensor:
                if node.op_type == "QuantizeLinear":
                    return self._grid(node)
                if node.op_type in ("Relu", "Clip") and (found := self.quantizer_behind(node.output[0])) is not None:
                    return found
        return None

    def weights(self, *types: str) -> dict[str, Grid]:
        """The grid of each weight, by the name of the layer's output; of these operator types."""
        found = {node.output[0]: self.grid_of(node.input[1]) for node in self.nodes(*(types or PRODUCTS))}
        return {name: grid for name, grid in found.items() if grid is not None and grid.codes is not None}

    def float_weights(self) -> list[str]:
        """Layers that read a weight in float."""
        return [node.output[0] for node in self.nodes(*PRODUCTS) if node.input[1] in self.constants]

    def biases(self) -> dict[str, Grid | None]:
        """The grid of each bias of a convolution or Gemm, by the layer's output; None if it is a float constant."""
        layers = [node for node in self.nodes("Conv", "ConvTranspose", "Gemm") if len(node.input) > 2]
        found = {node.output[0]: self.grid_of(node.input[2]) for node in layers}
        for node in layers:
            assert found[node.output[0]] is not None or self._is_float(node.input[2]), f"bias of {node.name}"
        return found

    def producer(self, tensor: str) -> str:
        """Operator type of what writes a tensor; "" for an input or constant."""
        node = self._producers.get(tensor)
        return "" if node is None else node.op_type

    def _is_float(self, tensor: str) -> bool:
        return tensor in self.constants and self.constants[tensor].dtype == np.float32

    def _grid(self, node: onnx.NodeProto) -> Grid:
        scale, zero_point = (self.constants[name] for name in node.input[1:3])
        axis = next((item.i for item in node.attribute if item.name == "axis"), None)
        return Grid(scale, zero_point, axis if scale.ndim else None, self.constants.get(node.input[0]))
