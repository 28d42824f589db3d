"""onnxruntime sessions: what they run, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fxquant.errors import ParityError
from fxquant.numerics.runtime import (
    Level,
    RuntimeOptions,
    cpu_flags,
    instruction_set,
    open_session,
    optimised_graph,
    runtime_build,
    runtime_version,
)


def model(node: onnx.NodeProto, kind: int = TensorProto.FLOAT, weight: np.ndarray | None = None) -> onnx.ModelProto:
    """A model of one node from x [n, 4] to y; `weight` is its initializer w."""
    x = helper.make_tensor_value_info("x", kind, ["n", 4])
    y = helper.make_tensor_value_info("y", kind, None)
    initializers = [] if weight is None else [numpy_helper.from_array(weight, "w")]
    graph = helper.make_graph([node], "g", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def matmul(size: int = 4) -> onnx.ModelProto:
    return model(
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"), weight=np.eye(4, size, dtype=np.float32)
    )


def test_session_runs_bytes_and_files_when_inputs_are_given(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(matmul(), path)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    for source in (path, str(path), path.read_bytes()):
        session = open_session(source)
        assert session.input_names == ("x",) and session.output_names == ("y",)
        assert np.array_equal(session.run({"x": x, "unused": x})["y"], x)


def test_external_data_is_found_when_the_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(matmul(), path, save_as_external_data=True, location="model.data", size_threshold=0)
    x = np.ones((1, 4), np.float32)
    assert np.array_equal(open_session(path).run({"x": x})["y"], x)
    data = onnx.load(path, load_external_data=False).SerializeToString()
    assert np.array_equal(open_session(data, data_folder=tmp_path).run({"x": x})["y"], x)
    with pytest.raises(ParityError, match="cannot load the model"):
        open_session(data, data_folder=tmp_path / "elsewhere")


def test_optimised_graph_leaves_no_file_and_reads_large_constants_of_neither(tmp_path: Path) -> None:
    found = optimised_graph(matmul(4096).SerializeToString(), RuntimeOptions(Level.EXTENDED))
    assert found.level is Level.EXTENDED
    assert [node.op_type for node in found.graph.node] == ["MatMul"]
    assert all(not tensor.raw_data for tensor in found.graph.initializer)
    assert list(tmp_path.iterdir()) == []


def test_missing_kernel_is_an_error_with_node_and_remedy() -> None:
    determinant = model(helper.make_node("Det", ["x"], ["y"], name="my_det"), TensorProto.DOUBLE)
    with pytest.raises(ParityError, match=r"no kernel for node 'my_det' \(Det") as caught:
        open_session(determinant.SerializeToString())
    assert "Leave the node in float" in caught.value.remedy


@pytest.mark.parametrize(
    ("node", "kind"),
    [
        (helper.make_node("NoSuchOperator", ["x"], ["y"], name="culprit"), TensorProto.FLOAT),
        (helper.make_node("Erf", ["x"], ["y"], name="culprit"), TensorProto.INT32),
        (helper.make_node("Flatten", ["x"], ["y"], name="culprit", axis=9), TensorProto.FLOAT),
    ],
)
def test_invalid_model_is_an_error_with_its_node(node: onnx.NodeProto, kind: int) -> None:
    with pytest.raises(ParityError, match="refuses the model at node 'culprit'"):
        open_session(model(node, kind).SerializeToString())


def test_garbage_and_missing_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="cannot load the model"):
        open_session(b"garbage")
    with pytest.raises(ParityError, match=r"cannot load the model \(.*none.onnx\)"):
        open_session(tmp_path / "none.onnx")


def test_wrong_inputs_are_errors_with_what_was_given() -> None:
    session = open_session(matmul().SerializeToString())
    with pytest.raises(ParityError, match="model input 'x' is not given; expected inputs x; got z"):
        session.run({"z": np.zeros((1, 4), np.float32)})
    with pytest.raises(ParityError, match=r"invalid dimensions.*Inputs given: x float32\[1, 3\]"):
        session.run({"x": np.zeros((1, 3), np.float32)})
    with pytest.raises(ParityError, match=r"data type.*Inputs given: x float64\[1, 4\]"):
        session.run({"x": np.zeros((1, 4))})


def test_negative_threads_are_refused() -> None:
    with pytest.raises(ParityError, match="RuntimeOptions.threads"):
        RuntimeOptions(threads=-1)


def test_environment_is_named() -> None:
    assert runtime_version().count(".") == 2
    assert "build type" in runtime_build()
    flags = cpu_flags()
    assert instruction_set().endswith(flags[0] if flags else "")
