"""Which kernels onnxruntime really runs: sessions on the CPU, and the counts in the graph that it optimised."""

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy
import onnx
import onnxruntime
from numpy.typing import NDArray

from benchmarks.runner import Json

INTEGER_CONVOLUTIONS = frozenset({"QLinearConv", "ConvInteger"})
FLOAT_CONVOLUTIONS = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose"})
INTEGER_MATMULS = frozenset(
    {"QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul"}
)
FLOAT_MATMULS = frozenset({"Gemm", "MatMul", "FusedGemm", "FusedMatMul"})


@dataclass(frozen=True)
class KernelCounts:
    """Nodes of an optimised graph by what they compute in.

    `leftover` counts the QuantizeLinear and DequantizeLinear nodes inside: all but those that read a graph input or
    write a graph output, where a model with float inputs and outputs needs them.
    """

    integer_convolutions: int
    float_convolutions: int
    integer_matmuls: int
    float_matmuls: int
    leftover: int

    def is_all_integer(self, convolutions: int, matmuls: int) -> bool:
        """Whether exactly that many convolutions and matrix products run, all on integers, with nothing left over."""
        return self == KernelCounts(convolutions, 0, matmuls, 0, 0)

    def __str__(self) -> str:
        convolutions = f"conv {self.integer_convolutions}/{self.integer_convolutions + self.float_convolutions}"
        matmuls = f"matmul {self.integer_matmuls}/{self.integer_matmuls + self.float_matmuls}"
        return f"{convolutions} {matmuls} Q/DQ {self.leftover}"

    def to_dict(self) -> dict[str, Json]:
        """The counts by name."""
        return {
            "integer_convolutions": self.integer_convolutions,
            "float_convolutions": self.float_convolutions,
            "integer_matmuls": self.integer_matmuls,
            "float_matmuls": self.float_matmuls,
            "leftover_quantize_dequantize_inside": self.leftover,
        }


def count_kernels(graph: onnx.GraphProto) -> KernelCounts:
    """Count the kernels of an optimised graph by op type."""
    types = Counter(node.op_type for node in graph.node)
    inputs = {value.name for value in graph.input}
    outputs = {value.name for value in graph.output}
    leftover = sum(
        (node.op_type == "QuantizeLinear" and node.input[0] not in inputs)
        or (node.op_type == "DequantizeLinear" and node.output[0] not in outputs)
        for node in graph.node
    )

    def total(names: frozenset[str]) -> int:
        return sum(types[name] for name in names)

    return KernelCounts(
        integer_convolutions=total(INTEGER_CONVOLUTIONS),
        float_convolutions=total(FLOAT_CONVOLUTIONS),
        integer_matmuls=total(INTEGER_MATMULS),
        float_matmuls=total(FLOAT_MATMULS),
        leftover=leftover,
    )


@dataclass(frozen=True)
class Session:
    """An onnxruntime session with one input and one output, with every optimisation on, and its kernels' counts."""

    session: onnxruntime.InferenceSession
    kernels: KernelCounts

    def run(self, images: NDArray[numpy.float32]) -> NDArray[numpy.float32]:
        """The first output, (N, classes), for images (N, 3, H, W)."""
        name = self.session.get_inputs()[0].name
        output: NDArray[numpy.float32] = self.session.run(None, {name: images})[0]
        return output


def open_session(path: Path, threads: int) -> Session:
    """Load `path` on the CPU provider with `threads` threads at optimisation level ALL."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # onnxruntime warns on every saved optimised model that it fits this machine only, which is what is wanted here.
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(optimised)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(optimised, load_external_data=False).graph
    return Session(session, count_kernels(graph))
