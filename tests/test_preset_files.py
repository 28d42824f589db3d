"""The reader of ONNX files that tests/test_presets.py relies on sees what is planted in a file written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.preset_files import Structure


def model(**changes: Any) -> onnx.ModelProto:
    """x -> Q -> DQ -> Conv(weight, bias) -> Relu -> Q -> DQ -> y, with some constants replaced."""
    constants: dict[str, Any] = {
        "xs": np.float32(0.5),
        "xz": np.uint8(3),
        "w.codes": np.full((2, 1, 1, 1), 5, np.int8),
        "ws": np.array([0.25, 0.5], np.float32),
        "wz": np.zeros(2, np.int8),
        "b.codes": np.ones(2, np.int32),
        "bs": np.array([0.125, 0.25], np.float32),
        "bz": np.zeros(2, np.int32),
        "ys": np.float32(0.75),
        "yz": np.uint8(0),
    } | changes
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["x.codes"]),
        helper.make_node("DequantizeLinear", ["x.codes", "xs", "xz"], ["x_fq"]),
        helper.make_node("DequantizeLinear", ["w.codes", "ws", "wz"], ["w_fq"], axis=0),
        helper.make_node("DequantizeLinear", ["b.codes", "bs", "bz"], ["b_fq"], axis=0),
        helper.make_node("Conv", ["x_fq", "w_fq", "b_fq"], ["conv"]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("QuantizeLinear", ["relu", "ys", "yz"], ["y.codes"]),
        helper.make_node("DequantizeLinear", ["y.codes", "ys", "yz"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y"))
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], tensors))


def test_grids_are_read_from_the_file() -> None:
    structure = Structure(model())
    first, last = structure.activations()
    assert (first.dtype, float(first.scale), int(first.zero_point), first.axis, first.codes) == (
        "uint8",
        0.5,
        3,
        None,
        None,
    )
    assert last.scale == np.float32(0.75) and not first.equals(last) and first.equals(first)
    weight, bias = structure.weights()["conv"], structure.biases()["conv"]
    assert (weight.dtype, weight.axis, weight.scale.tolist()) == ("int8", 0, [0.25, 0.5])
    assert weight.codes is not None and weight.codes.max() == 5
    assert bias is not None and bias.dtype == "int32"


def test_edges_are_read_from_the_file() -> None:
    structure = Structure(model())
    assert [structure.is_quantized(name) for name in ("x", "x_fq", "conv", "relu", "y")] == [
        False,
        True,
        False,
        False,
        True,
    ]
    assert structure.producer("conv") == "Conv" and structure.producer("x") == ""
    behind = structure.quantizer_behind("conv")
    assert behind is not None and behind.scale == np.float32(0.75)
    assert structure.quantizer_behind("y") is None


@pytest.mark.parametrize("zero_point", [np.int8(3), np.uint8(4)])
def test_grid_of_another_zero_point_is_another_grid(zero_point: Any) -> None:
    old, new = Structure(model()).activations()[0], Structure(model(xz=zero_point)).activations()[0]
    assert not old.equals(new)


def test_float_weight_and_float_bias_are_told_from_codes() -> None:
    changed = model()
    conv = next(node for node in changed.graph.node if node.op_type == "Conv")
    for position, name in ((1, "w"), (2, "b")):
        conv.input[position] = name
        changed.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float32), name))
    structure = Structure(changed)
    assert structure.float_weights() == ["conv"] and structure.weights() == {}
    assert structure.biases() == {"conv": None}
    assert Structure(model()).float_weights() == []
