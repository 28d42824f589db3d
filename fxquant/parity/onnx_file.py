"""An ONNX file as parity reads it: structure in memory, constants on demand, the file itself never written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from fxquant.errors import ParityError
from fxquant.numerics.runtime import Array

FINGERPRINT_KEY = "fxquant.fingerprint"
_DEFAULT_AXIS = 1  # of QuantizeLinear and DequantizeLinear (ONNX operator specification)


@dataclass(frozen=True)
class GridNames:
    """Names of the tensors that hold a grid, its axis, and its block along that axis (0: none).

    `zero_point` is "" where it is left out (zeros).
    """

    scale: str
    zero_point: str
    axis: int
    block: int = 0


@dataclass(frozen=True)
class FileQuantizer:
    """A DequantizeLinear of the file and, where its codes are computed, the QuantizeLinear behind them.

    Arguments:
        name: name of the DequantizeLinear: that of the FakeQuant node, perhaps with a dotted suffix.
        codes: the tensor that the DequantizeLinear reads.
        dequantize: its grid.
        quantize: the grid of the QuantizeLinear; None where the codes are a constant.
    """

    name: str
    codes: str
    dequantize: GridNames
    quantize: GridNames | None


class OnnxFile:
    """The nodes, names and constants of the ONNX model at `path`.

    Raises ParityError if there is no such file, or it is no ONNX model.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ParityError(
                f"model file '{self.path}' does not exist", remedy="Export it: fxquant.export_onnx(program, path)."
            )
        try:
            self.model = onnx.load(self.path, load_external_data=False)
        except Exception as err:  # protobuf's errors have no stable home
            raise ParityError(f"'{self.path}' is no ONNX model", got=f"{type(err).__name__}: {err}") from err
        self._initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._producers = {name: node for node in self.model.graph.node for name in node.output if name}
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.model.graph.node:
            for name in set(node.input) - {""}:
                self._consumers.setdefault(name, []).append(node)

    @property
    def data_folder(self) -> Path:
        """Where constants kept outside the file lie."""
        return self.path.resolve().parent

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the program that the file was lowered from; None if it carries none."""
        return next((entry.value for entry in self.model.metadata_props if entry.key == FINGERPRINT_KEY), None)

    @property
    def opset(self) -> int:
        """Version of the standard operator set."""
        return next((entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")), 0)

    @property
    def input_names(self) -> list[str]:
        """Graph inputs that are not constants."""
        return [value.name for value in self.model.graph.input if value.name not in self._initializers]

    @property
    def output_names(self) -> list[str]:
        """Graph outputs."""
        return [value.name for value in self.model.graph.output]

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is an initializer."""
        return name in self._initializers

    def constant(self, name: str) -> Array | None:
        """An initializer's contents, read from disk if it lies outside the file; None if there is none of that name."""
        tensor = self._initializers.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor, str(self.data_folder))

    def element_type(self, name: str) -> int:
        """ONNX element type of an initializer; 0 if there is none of that name."""
        return self._initializers[name].data_type if name in self._initializers else 0

    def producer(self, tensor: str) -> onnx.NodeProto | None:
        """The node that computes a tensor; None for inputs and constants."""
        return self._producers.get(tensor)

    def consumers(self, tensor: str) -> list[onnx.NodeProto]:
        """The nodes that read a tensor, each once."""
        return self._consumers.get(tensor, [])

    def quantizers(self) -> dict[str, list[FileQuantizer]]:
        """The file's quantizers by the name of the FakeQuant node that they stand for."""
        found: dict[str, list[FileQuantizer]] = {}
        for node in self.model.graph.node:
            if node.op_type == "DequantizeLinear":
                found.setdefault(fx_name(node.name), []).append(self._quantizer(node))
        return found

    def tensor_of(self, fx_node_name: str) -> str | None:
        """The tensor that stands for an FX node's single output: the output of the ONNX node of that name."""
        if fx_node_name in self._producers:
            return fx_node_name
        return next((n.output[0] for n in self.model.graph.node if n.name == fx_node_name and len(n.output) == 1), None)

    def with_outputs(self, names: Sequence[str]) -> bytes:
        """The model's bytes with further tensors as graph outputs; constants outside the file stay there."""
        graph = self.model.graph
        before = len(graph.output)
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in self.output_names)
        try:
            data: bytes = self.model.SerializeToString()
            return data
        finally:
            del graph.output[before:]

    def extract(self, inputs: Iterable[str], outputs: Sequence[str]) -> tuple[bytes, list[str]]:
        """The part of the model that computes `outputs` from `inputs` and, where needed, graph inputs.

        Returns its bytes and the names of the inputs that it really has. Constants outside the file stay there.
        """
        nodes, reached = self._between(set(inputs), outputs)
        part = onnx.ModelProto(ir_version=self.model.ir_version)
        part.opset_import.extend(self.model.opset_import)
        part.functions.extend(self.model.functions)
        part.graph.name = self.model.graph.name
        part.graph.node.extend(nodes)
        read = {name for node in nodes for name in _reads(node)} | set(outputs)
        part.graph.initializer.extend(tensor for name, tensor in self._initializers.items() if name in read)
        part.graph.input.extend(self._input(name) for name in reached)
        part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        return part.SerializeToString(), reached

    def _between(self, inputs: set[str], outputs: Sequence[str]) -> tuple[list[onnx.NodeProto], list[str]]:
        reached: set[str] = set()
        wanted: set[str] = set()
        pending = list(outputs)
        while pending:
            name = pending.pop()
            producer = self._producers.get(name)
            if name in inputs or (producer is None and not self.is_constant(name)):
                reached.add(name)
            elif producer is not None and producer.output[0] not in wanted:
                wanted.update(producer.output)
                pending.extend(_reads(producer))
        nodes = [node for node in self.model.graph.node if node.output[0] in wanted]
        return nodes, sorted(reached)

    def _input(self, name: str) -> onnx.ValueInfoProto:
        known: onnx.ValueInfoProto | None = next((v for v in self.model.graph.input if v.name == name), None)
        if known is not None:
            return known
        made = onnx.ValueInfoProto(name=name)
        made.type.tensor_type.elem_type = self._codes_type(name)
        return made

    def _codes_type(self, name: str) -> int:
        zero_points = (
            node.input[2] for node in self.consumers(name) if node.op_type == "DequantizeLinear" and len(node.input) > 2
        )
        return next((self.element_type(zero) for zero in zero_points), onnx.TensorProto.UINT8)

    def _quantizer(self, node: onnx.NodeProto) -> FileQuantizer:
        source = self.producer(node.input[0])
        if source is not None and source.op_type == "Clip":  # on codes: a grid narrower than its dtype
            source = self.producer(source.input[0])
        computed = source is not None and source.op_type == "QuantizeLinear"
        quantize = _grid_names(source) if source is not None and computed else None
        return FileQuantizer(node.name, node.input[0], _grid_names(node), quantize)


def fx_name(onnx_name: str) -> str:
    """The FX node that an ONNX node or tensor belongs to: lowering's helpers are called `<FX name>.<what>`."""
    return onnx_name.split(".", 1)[0]


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """An attribute of an ONNX node, or `default`."""
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def input_name(node: onnx.NodeProto, index: int) -> str:
    """Name of an input of an ONNX node; "" where it is left out."""
    return node.input[index] if index < len(node.input) else ""


def is_integer(array: Array) -> bool:
    """Whether an array holds integers."""
    return bool(np.issubdtype(array.dtype, np.integer))


def _reads(node: onnx.NodeProto) -> list[str]:
    """The tensors that a node reads, those that its subgraphs read from outside among them."""
    found = [name for name in node.input if name]
    for entry in node.attribute:
        for graph in [entry.g, *entry.graphs]:
            inside = {name for inner in graph.node for name in inner.output} | {value.name for value in graph.input}
            found += [name for inner in graph.node for name in _reads(inner) if name not in inside]
    return found


def _grid_names(node: onnx.NodeProto) -> GridNames:
    axis, block = int(attribute(node, "axis", _DEFAULT_AXIS)), int(attribute(node, "block_size", 0))
    return GridNames(node.input[1], input_name(node, 2), axis, block)
