"""What onnxruntime really runs: the kernel of each node, what stayed in float and why, and what Q/DQ is left inside."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import onnx

from fxquant.graph.program import value_type
from fxquant.numerics.runtime import Level, RuntimeOptions, optimised_graph
from fxquant.parity.onnx_file import OnnxFile, fx_name
from fxquant.parity.reasons import why_float
from fxquant.parity.segments import SegmentReader

_CODE_TYPES = frozenset(
    {onnx.TensorProto.UINT8, onnx.TensorProto.INT8, onnx.TensorProto.UINT16, onnx.TensorProto.INT16}
)
_REAL_TYPES = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE})
_INTEGER_TO_FLOAT = frozenset({"QGemm", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger"})
_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_REWRITTEN = re.compile(r"(_token_\d+|_nhwc|_nchwc)+$")  # what layout transformation appends to names


class KernelKind(Enum):
    """What a node's kernels compute on."""

    INTEGER = "integer"
    PARTLY = "partly integer"
    FLOAT = "float"
    ABSORBED = "absorbed"  # into the kernel of a neighbour, or into a constant


@dataclass(frozen=True)
class NodeKernel:
    """How onnxruntime computes one FX node.

    Arguments:
        node: name of the FX node.
        operators: its ONNX operators in the file.
        kernels: the operators that run instead; () if absorbed.
        kind: what those compute on.
        reason: why not (all) in integers; "" if they are.
    """

    node: str
    operators: tuple[str, ...]
    kernels: tuple[str, ...]
    kind: KernelKind
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {**vars(self), "operators": list(self.operators), "kernels": list(self.kernels), "kind": self.kind.value}


@dataclass(frozen=True)
class Fusion:
    """The graph that ran.

    Arguments:
        nodes: every FX node that computes real values, in graph order.
        operators: how many of each operator type the optimised graph has.
        leftover: QuantizeLinear and DequantizeLinear inside: all but those at graph inputs and outputs.
        level: the level it was read at: EXTENDED where level ALL cannot be saved.
    """

    nodes: tuple[NodeKernel, ...]
    operators: tuple[tuple[str, int], ...]
    leftover: int
    level: Level

    def of(self, node: str) -> NodeKernel | None:
        """The kernel of the FX node called `node`; None if the file has no such node."""
        return next((kernel for kernel in self.nodes if kernel.node == node), None)

    def explained(self, reasons: Mapping[str, str]) -> Fusion:
        """The same, with these reasons (by FX node) for what runs in float: causes, where the file shows effects."""
        floats = {kernel.node for kernel in self.unfused} & set(reasons)
        nodes = (
            replace(kernel, reason=reasons[kernel.node]) if kernel.node in floats else kernel for kernel in self.nodes
        )
        return replace(self, nodes=tuple(nodes))

    def count(self, kind: KernelKind) -> int:
        """How many FX nodes are of a kind."""
        return sum(1 for kernel in self.nodes if kernel.kind is kind)

    @property
    def unfused(self) -> tuple[NodeKernel, ...]:
        """The FX nodes that run in float, all or in part."""
        return tuple(kernel for kernel in self.nodes if kernel.kind in (KernelKind.FLOAT, KernelKind.PARTLY))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {
            "nodes": [kernel.to_dict() for kernel in self.nodes],
            "operators": dict(self.operators),
            "leftover_quantize_dequantize": self.leftover,
            "counts": {kind.value: self.count(kind) for kind in KernelKind},
            "level": self.level.value,
        }


def read_fusion(reader: SegmentReader, file: OnnxFile, options: RuntimeOptions) -> Fusion:
    """The kernels that onnxruntime runs for `file` with these options."""
    optimised = optimised_graph(file.model.SerializeToString(), options, data_folder=file.data_folder)
    return _Reading(reader, file, optimised.graph, options).fusion(optimised.level)


class _Reading:
    def __init__(self, reader: SegmentReader, file: OnnxFile, graph: onnx.GraphProto, options: RuntimeOptions) -> None:
        self._reader = reader
        self._file = file
        self._graph = graph
        self._options = options
        self._types = _element_types(graph)
        self._file_types = _element_types(file.model.graph)
        self._written = _by_fx_name((node, fx_name(node.name)) for node in file.model.graph.node)
        self._running = _by_fx_name(self._owners())

    def fusion(self, level: Level) -> Fusion:
        """See read_fusion."""
        names = [node.name for node in self._reader.program.graph.nodes if self._computes(node)]
        kernels = tuple(self._kernel(name) for name in names if self._operators(name))
        operators = Counter(node.op_type for node in self._graph.node)
        return Fusion(kernels, tuple(sorted(operators.items())), self._leftover(), level)

    def _computes(self, node: Any) -> bool:
        program = self._reader.program
        if node.op not in ("call_function", "call_module") or self._reader.constants.is_constant(node):
            return False
        if program.fake_quant(node) is not None or program.bias_fake_quant(node) is not None:
            return False
        kind = value_type(node)
        return kind is None or kind.is_float

    def _owners(self) -> list[tuple[onnx.NodeProto, str]]:
        """Each optimised node with its FX node.

        The body of a function that onnxruntime inlines (HardSwish, Mish) has names of its own, and belongs to the value
        that the QuantizeLinear behind it takes.
        """
        pairs: list[tuple[onnx.NodeProto, str]] = []
        behind: dict[str, str] = {}  # tensor -> the FX node whose value is made of it
        for node in reversed(self._graph.node):
            owner = self._owner(node)
            is_known = owner in self._written
            made = owner if is_known else next((behind[name] for name in node.output if name in behind), "")
            if made and (not node.name or not is_known or node.op_type == "QuantizeLinear"):
                behind.update((name, made) for name in node.input if name not in behind)
            pairs.append((node, owner if is_known or node.op_type == "Transpose" else made or owner))
        return pairs[::-1]

    def _owner(self, node: onnx.NodeProto) -> str:
        """The FX node that an optimised node computes: by its name, else by that of its output."""
        for spelling in (node.name, _REWRITTEN.sub("", node.name.split("/", 1)[0])):
            if fx_name(spelling) in self._written:
                return fx_name(spelling)
        if node.op_type == "Transpose":  # inserted around kernels that want channels last
            return ""
        return fx_name(_REWRITTEN.sub("", node.output[0]))

    def _operators(self, name: str) -> list[onnx.NodeProto]:
        """The ONNX nodes of the file that compute an FX node's reals: no quantizers, no arithmetic on sizes."""
        return [
            node
            for node in self._written.get(name, [])
            if node.op_type not in _QUANTIZERS and self._file_types.get(node.output[0], 0) in _REAL_TYPES | {0}
        ]

    def _kernel(self, name: str) -> NodeKernel:
        operators = self._operators(name)
        running = [
            node
            for node in self._running.get(name, [])
            if node.op_type not in _QUANTIZERS and self._is_real_or_code(node)
        ]
        integer = [node for node in running if self._is_integer(node)]
        kind = KernelKind.ABSORBED
        if running:
            kind = (
                KernelKind.INTEGER
                if len(integer) == len(running)
                else KernelKind.PARTLY
                if integer
                else KernelKind.FLOAT
            )
        reason = (
            self._reason(operators, {_REWRITTEN.sub("", node.name) for node in integer})
            if kind in (KernelKind.FLOAT, KernelKind.PARTLY)
            else ""
        )
        types = tuple(node.op_type for node in operators)
        return NodeKernel(name, types, tuple(node.op_type for node in running), kind, reason)

    def _reason(self, operators: list[onnx.NodeProto], integer: set[str]) -> str:
        reasons = [why_float(self._file, node, self._options) for node in operators if node.name not in integer]
        return next((reason for reason in reasons if reason), "")

    def _is_real_or_code(self, node: onnx.NodeProto) -> bool:
        kinds = {self._types.get(name, 0) for name in node.output if name}
        return bool(kinds & (_CODE_TYPES | _REAL_TYPES))

    def _is_integer(self, node: onnx.NodeProto) -> bool:
        return node.op_type in _INTEGER_TO_FLOAT or self._types.get(node.output[0], 0) in _CODE_TYPES

    def _leftover(self) -> int:
        inputs = {value.name for value in self._graph.input}
        outputs = {value.name for value in self._graph.output}
        return sum(
            (node.op_type == "QuantizeLinear" and node.input[0] not in inputs)
            or (node.op_type == "DequantizeLinear" and node.output[0] not in outputs)
            for node in self._graph.node
        )


def _element_types(graph: onnx.GraphProto) -> dict[str, int]:
    """Element types of all tensors; onnxruntime does not write those that its layout transformation made."""
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values if value.type.tensor_type.elem_type}
    types.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    for node in graph.node:
        known = types.get(node.input[0], 0) if node.input else 0
        if node.op_type.startswith("QLinear") or node.op_type == "QuantizeLinear":
            known = onnx.TensorProto.UINT8
        elif node.op_type == "DequantizeLinear" or node.op_type in _INTEGER_TO_FLOAT:
            known = onnx.TensorProto.FLOAT
        for name in node.output:
            types.setdefault(name, known)
    return types


def _by_fx_name(pairs: Iterable[tuple[onnx.NodeProto, str]]) -> dict[str, list[onnx.NodeProto]]:
    found: dict[str, list[onnx.NodeProto]] = {}
    for node, name in pairs:
        found.setdefault(name, []).append(node)
    return found
