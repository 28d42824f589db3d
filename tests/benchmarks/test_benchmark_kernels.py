"""What is counted as integer, float and left over, on graphs whose answer is known; and the answers' quality."""

import math
from pathlib import Path

import numpy
import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks.kernels import KernelCounts, count_kernels, open_session
from benchmarks.quality import judge, sqnr_db


def graph_of(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    """A graph with input 'x' and output 'y'."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    return helper.make_graph(list(nodes), "g", values[:1], values[1:])


def node(kind: str, source: str, result: str) -> onnx.NodeProto:
    """A node by type with one input and one output."""
    return helper.make_node(kind, [source], [result])


def test_border_quantizers_are_not_leftover_when_all_inside_is_integer() -> None:
    counts = count_kernels(
        graph_of(
            node("QuantizeLinear", "x", "a"),
            node("QLinearConv", "a", "b"),
            node("QGemm", "b", "c"),
            node("DequantizeLinear", "c", "y"),
        )
    )
    assert counts == KernelCounts(1, 0, 1, 0, 0)
    assert counts.is_all_integer(1, 1)
    assert not counts.is_all_integer(2, 1)


def test_float_island_is_counted_when_a_convolution_did_not_fuse() -> None:
    counts = count_kernels(
        graph_of(
            node("QuantizeLinear", "x", "a"),
            node("DequantizeLinear", "a", "b"),
            node("FusedConv", "b", "c"),
            node("QuantizeLinear", "c", "d"),
            node("DequantizeLinear", "d", "y"),
        )
    )
    assert counts == KernelCounts(0, 1, 0, 0, 2)
    assert not counts.is_all_integer(1, 0)
    assert str(counts) == "conv 0/1 matmul 0/0 Q/DQ 2"


def test_session_counts_the_kernels_that_onnxruntime_chose(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 2], [1, 2, 3, 4, 5, 6])
    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", d]) for n, d in (("x", 3), ("y", 2))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", shapes[:1], shapes[1:], [weight])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    session = open_session(path, threads=1)
    assert session.kernels == KernelCounts(0, 0, 0, 1, 0)
    answers = session.run(numpy.ones((2, 3), numpy.float32))
    assert answers.tolist() == [[9, 12], [9, 12]]


def test_quality_counts_hits_agreement_and_noise() -> None:
    reference = numpy.array([[3, 1, 0], [0, 2, 1], [0, 1, 2]], numpy.float32)
    logits = numpy.array([[3, 1, 0], [0, 1, 2], [0, 1, 2]], numpy.float32)
    quality = judge(logits, reference, [(0,), (1, 2), (1,)])
    assert quality.top1 == pytest.approx(2 / 3)
    assert quality.agreement == pytest.approx(2 / 3)
    assert quality.sqnr_db == pytest.approx(10 * math.log10(20 / 2))
    assert quality.photos == 3


def test_noise_is_unbounded_when_nothing_differs() -> None:
    logits = numpy.array([[1, 2]], numpy.float32)
    assert sqnr_db(logits, logits) is None
