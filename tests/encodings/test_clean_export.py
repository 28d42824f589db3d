"""The clean float model and what lies beside it: names, axes and values match the encodings file."""

from __future__ import annotations

import json
import operator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.utils import _pytree as pytree

import fxquant
from fxquant import QuantSim, save_encodings
from fxquant.errors import ConfigError
from fxquant.lowering.clean import export_clean
from fxquant.numerics.fake_quant import Mode
from fxquant.sim import file_names, write_files
from fxquant.spec import QuantSpec
from tests.encodings.nets import CASES, calibrated, finalized, net
from tests.helpers import Builder, aten


def _outputs(path: Path, inputs: tuple[torch.Tensor, ...]) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    found: list[Any] = session.run(None, {k: v.numpy() for k, v in zip(names, inputs, strict=True)})
    return found


@pytest.mark.parametrize("name", CASES)
def test_float_model_is_clean_and_names_every_encoding(name: str, tmp_path: Path) -> None:
    program, inputs = finalized(calibrated(name), name), CASES[name].inputs
    before = program.fingerprint()
    export_clean(program, tmp_path / "float.onnx")
    save_encodings(program, tmp_path / "e", "2.0.0")
    assert program.fingerprint() == before
    model = onnx.load(tmp_path / "float.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert not {node.op_type for node in model.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    state = program.module.state_dict()
    stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    values = {out for node in model.graph.node for out in node.output} | {item.name for item in model.graph.input}
    for entry in json.loads((tmp_path / "e").read_text())["encodings"]:
        assert entry["name"] in stored or entry["name"] in values
        if entry["name"] in stored:
            tensor = stored[entry["name"]]
            assert np.array_equal(tensor, state[entry["name"]].numpy())
            scale = np.array(entry["y_scale"])
            if "block_size" in entry:
                assert scale.shape[entry["axis"]] * entry["block_size"] == tensor.shape[entry["axis"]]
            elif "axis" in entry:
                assert scale.shape == (tensor.shape[entry["axis"]],)
    for _, module in program.fake_quant_nodes():
        module.mode = Mode.OFF
    with torch.no_grad():
        expected = pytree.tree_leaves(program.module(*inputs))
    for wanted, found in zip(expected, _outputs(tmp_path / "float.onnx", inputs), strict=True):
        assert np.allclose(wanted.numpy(), found, atol=1e-5)


def test_float_model_has_folded_weights_and_no_helper_of_onnxruntime(tmp_path: Path) -> None:
    export_clean(calibrated("residual"), tmp_path / "float.onnx", opset=17)
    model = onnx.load(tmp_path / "float.onnx")
    stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    assert not np.array_equal(stored["conv1.weight"], net("residual").state_dict()["conv1.weight"].numpy())
    assert {node.op_type for node in model.graph.node} >= {"Relu", "Clip"}  # nothing is left to a quantizer
    assert "Max" not in {node.op_type for node in model.graph.node}


def test_parameter_with_two_grids_has_a_tensor_for_each(tmp_path: Path) -> None:
    program = calibrated("shared")
    save_encodings(program, tmp_path / "e", "1.0.0")
    names = [entry["name"] for entry in json.loads((tmp_path / "e").read_text())["param_encodings"]]
    assert len(names) == len(set(names)) and {"body.0.bias", "body_0_bias_fq_1"} <= set(names)
    export_clean(program, tmp_path / "float.onnx")
    copies = {n.output[0]: n.input[0] for n in onnx.load(tmp_path / "float.onnx").graph.node if n.op_type == "Identity"}
    assert copies["body_0_bias_fq_1"] == "body.0.bias"


class Collisions(nn.Module):
    """Outputs called like a parameter and like a value; a parameter whose path is a value's name; a value twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.weight, self.relu = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = torch.relu(self.layer(x))
        z = torch.sigmoid(y @ self.weight)
        return {"weight": z @ self.relu, "again": y, "once more": y, "sigmoid": z @ z.mT}


def test_tensors_that_would_be_called_alike_have_names_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Collisions().eval(), torch.randn(2, 8)
    sim = QuantSim(model, x)
    sim.compute_encodings([x], progress=False)
    sim.export(tmp_path)
    found = onnx.load(tmp_path / "model_float.onnx")
    assert [item.name for item in found.graph.output] == ["weight", "again", "once more", "sigmoid"]
    content = json.loads((tmp_path / "model.encodings").read_text())
    names = {section: {e["name"] for e in content[f"{section}_encodings"]} for section in ("param", "activation")}
    assert names["param"] == {"layer.weight", "layer.bias", "weight.1", "relu_1"}
    assert names["activation"] == {"x", "again", "matmul", "sigmoid.1", "weight", "mT", "sigmoid"}
    stored = {item.name: numpy_helper.to_array(item) for item in found.graph.initializer}
    assert np.array_equal(stored["weight.1"], model.weight.detach().numpy())
    for wanted, output in zip(model(x).values(), _outputs(tmp_path / "model_float.onnx", (x,)), strict=True):
        assert np.allclose(wanted.detach().numpy(), output, atol=1e-5)


def test_part_that_is_returned_in_float_and_quantized_elsewhere_keeps_its_name(tmp_path: Path) -> None:
    build = Builder()
    split = build.call("split", aten.split.Tensor, build.input("x", 4, 3, 3), 2, 1)
    part, again = (build.call(name, operator.getitem, split, 0) for name in ("part", "again"))
    build.output(again, build.relu("relu", build.fake_quant(part, QuantSpec())))
    export_clean(build.program(), tmp_path / "float.onnx")
    found = onnx.load(tmp_path / "float.onnx").graph.node
    assert [(node.op_type, node.input[0]) for node in found] == [("Slice", "x"), ("Relu", "part"), ("Identity", "part")]


def test_sim_export_writes_all_files_that_belong_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sim = QuantSim(net("residual"), CASES["residual"].inputs)
    sim.compute_encodings([CASES["residual"].inputs], progress=False)
    path = sim.export(tmp_path, "net", encodings_version="0.6.1")
    assert path == tmp_path / "net.onnx"
    names = {"net.onnx", "net.fxq", "net_float.onnx", "net.encodings", "net_state_dict.pth"}
    assert {item.name for item in tmp_path.iterdir()} == names == set(file_names("net"))
    state = torch.load(tmp_path / "net_state_dict.pth", weights_only=True)
    assert not [key for key in state if key.startswith("fake_quants")]
    assert torch.equal(state["conv1.weight"], sim.model.get_parameter("conv1.weight").detach())
    assert not torch.equal(state["conv1.weight"], net("residual").state_dict()["conv1.weight"])
    other = QuantSim(net("residual"), CASES["residual"].inputs)
    report = other.load_encodings(tmp_path / "net.encodings")
    assert report.version == "0.6.1" and report.is_complete
    assert torch.equal(other.model(*CASES["residual"].inputs), sim.model(*CASES["residual"].inputs))
    assert fxquant.load_program(tmp_path / "net.fxq").stage is fxquant.Stage.FINALIZED


def test_export_that_fails_midway_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = finalized(calibrated("linears"), "linears")
    (tmp_path / "model.onnx").write_text("old")

    def fail(*_: Any) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr("torch.save", fail)
    with pytest.raises(fxquant.FxquantError, match="cannot be written"):
        write_files(program, tmp_path)
    assert [(item.name, item.read_text()) for item in tmp_path.iterdir()] == [("model.onnx", "old")]
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="version"):
        write_files(program, tmp_path, encodings_version="3")
    assert (tmp_path / "model.onnx").read_text() == "old"
