"""Programs, float and quantized, as ONNX models: names, forms, opsets, numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from fxquant.errors import ExportError
from fxquant.graph.program import Program, Stage
from fxquant.lowering.export import check_model
from fxquant.lowering.lower import lower
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.numerics.runtime import Level, RuntimeOptions, optimised_graph
from fxquant.spec import QuantSpec, Target
from tests.lowering.programs import (
    RESIDUAL_SHARES,
    RESIDUAL_VALUES,
    S8_PER_CHANNEL,
    U8,
    Residual,
    calibrate_on,
    fake_quant_of,
    float_program,
    image,
    insert,
    quantized,
    residual_program,
)
from tests.ops.harness import run_onnx

aten = torch.ops.aten
STEPS_TOLERATED = 1  # of the output's grid: float convolutions round differently in torch and onnxruntime


def output_steps(
    program: Program, model: ir.Model, x: torch.Tensor, value: str, level: Level = Level.DISABLED
) -> float:
    """Largest difference between onnxruntime and the program, in steps of the grid of `value`."""
    with torch.no_grad():
        expected = program.module(x).numpy()
    (actual,) = run_onnx(model, [x], level)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / fake_quant_of(program, value).scale.item())


def kernels(model: ir.Model) -> Counter[str]:
    """Operators of the graph that onnxruntime runs."""
    data = ir.serde.serialize_model(model).SerializeToString()
    return Counter(node.op_type for node in optimised_graph(data, RuntimeOptions(Level.EXTENDED)).graph.node)


@pytest.mark.parametrize("opset", [13, 17, 19, 21, 23])
def test_quantized_program_fuses_whole_when_lowered(opset: int) -> None:
    program = residual_program()
    model = lower(program, opset)
    check_model(model)
    found = kernels(model)
    assert found["QuantizeLinear"] == 1 and found["DequantizeLinear"] == 1, found  # the graph's input and output
    assert found["QLinearConv"] == 2 and found["QLinearAdd"] == 1 and found["QGemm"] == 1, found
    assert found["QLinearGlobalAveragePool"] == 1 and found["MaxPool"] == 1, found
    for batch in (1, 2, 5):
        x = image(batch, seed=batch)
        assert output_steps(program, model, x, "linear") <= STEPS_TOLERATED
        assert output_steps(program, model, x, "linear", Level.ALL) <= STEPS_TOLERATED


def test_lowered_comparison_fails_when_a_weight_code_is_changed() -> None:
    program = residual_program()
    model = lower(program)
    codes = model.graph.initializers["fc_weight.codes"]
    assert codes.const_value is not None
    changed = codes.const_value.numpy().copy()
    changed[0, 0] += 100 if changed[0, 0] < 0 else -100
    codes.const_value = ir.tensor(changed)
    assert output_steps(program, model, image(5, 9), "linear") > STEPS_TOLERATED


def test_names_follow_the_graph_when_lowered() -> None:
    model = lower(residual_program())
    nodes = {node.name: node.op_type for node in model.graph}
    assert len(nodes) == len(list(model.graph))
    assert nodes["relu.quantize"] == "QuantizeLinear" and nodes["relu_fq"] == "DequantizeLinear"
    assert (nodes["conv2d"], nodes["add"], nodes["max_pool2d"], nodes["linear"]) == ("Conv", "Add", "MaxPool", "Gemm")
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            assert node.inputs[0] is not None and str(node.inputs[0].name).endswith(".codes"), node
        elif node.op_type != "QuantizeLinear":
            assert node.outputs[0].name == node.name
    assert model.graph.inputs[0].name == "x" and model.graph.outputs[0].name == "output"


def test_every_value_has_shape_and_dtype_when_lowered() -> None:
    model = lower(residual_program(spec=QuantSpec(7)))
    for node in model.graph:
        for value in node.outputs:
            assert value.shape is not None and value.dtype is not None, value
            assert all(isinstance(size, int) or size.value == "batch" for size in value.shape), value


def test_stored_dtypes_are_integers_when_parameters_are_quantized() -> None:
    initializers = lower(residual_program()).graph.initializers
    weight, bias = initializers["conv1_weight.codes"], initializers["conv1_bias.codes"]
    assert (weight.dtype, bias.dtype) == (ir.DataType.INT8, ir.DataType.INT32)
    assert not any(
        v.dtype == ir.DataType.FLOAT and v.shape is not None and len(v.shape) > 1 for v in initializers.values()
    )


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (S8_PER_CHANNEL, ir.DataType.INT8),
        (replace(S8_PER_CHANNEL, bits=4), ir.DataType.INT8),
        (replace(S8_PER_CHANNEL, signed=False), ir.DataType.UINT8),
        (replace(S8_PER_CHANNEL, bits=12), ir.DataType.INT16),
        (QuantSpec(16), ir.DataType.UINT16),
    ],
)
def test_weight_dtype_follows_its_spec_when_lowered(spec: QuantSpec, dtype: ir.DataType) -> None:
    program = residual_program(weight_spec=spec)
    model = lower(program)
    check_model(model)
    codes = model.graph.initializers["conv1_weight.codes"]
    assert codes.dtype == dtype and codes.const_value is not None
    expected = fake_quant_of(program, "conv1_weight").codes(program.module.get_parameter("conv1.weight"))
    np.testing.assert_array_equal(codes.const_value.numpy().astype(np.int64), expected.numpy())
    assert output_steps(program, model, image(3, 4), "linear") <= STEPS_TOLERATED


def test_sixteen_bits_are_refused_when_the_opset_has_none() -> None:
    program = residual_program(spec=QuantSpec(16))
    assert output_steps(program, lower(program, 21), image(3), "linear") <= 3  # rounding of float sums, on fine grids
    with pytest.raises(ExportError, match=r"'x_fq' quantizes to 16 bits.*expected opset 21.*got opset 19"):
        lower(program, 19)
    with pytest.raises(ExportError, match="16 bits"):
        lower(residual_program(weight_spec=replace(S8_PER_CHANNEL, bits=16)), 17)


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(7)])
def test_narrow_grids_are_clipped_on_codes_when_lowered(spec: QuantSpec) -> None:
    program = residual_program(spec=spec)
    model = lower(program)
    clips = [node for node in model.graph if node.op_type == "Clip"]
    assert len(clips) == len(RESIDUAL_VALUES)
    for node in clips:
        bounds = [value.const_value.numpy() for value in node.inputs[1:] if value is not None and value.const_value]
        assert bounds == [0, 2**spec.bits - 1] and str(node.outputs[0].name).endswith(".codes")
    assert output_steps(program, model, 3 * image(4, 5), "linear") <= STEPS_TOLERATED  # beyond the calibrated range
    found = kernels(model)
    assert found["DequantizeLinear"] == 1 and found["QLinearConv"] == 2, found


@pytest.mark.parametrize("bits", [9, 10, 15])
def test_narrow_grids_are_clipped_on_reals_when_stored_in_16_bits(bits: int) -> None:
    program = float_program(nn.ReLU(), image())
    insert(program, program.node("input_1"), QuantSpec(bits))
    program.recompile()
    calibrate_on(program, image(8))
    x = 5 * image(64, 5)
    model = lower(program)
    assert output_steps(program, model, x, "input_1") == 0.0
    assert output_steps(program, model, x, "input_1", Level.ALL) == 0.0
    assert float(program.module(x).max()) == float(fake_quant_of(program, "input_1").encoding.max.float())


def test_strict_signed_grids_keep_out_the_lowest_code_when_lowered() -> None:
    spec = QuantSpec(8, signed=True, symmetric=True, strict=True)
    program = residual_program(spec=spec)
    program.target = Target.TENSORRT
    model = lower(program)
    assert model.metadata_props["fxquant.note"] == "not certified on onnxruntime"
    assert "fxquant.note" not in lower(residual_program()).metadata_props
    bounds = next(node for node in model.graph if node.name == "x.clip").inputs[1:]
    assert [int(v.const_value.numpy()) for v in bounds if v is not None and v.const_value is not None] == [-127, 127]
    assert output_steps(program, model, 3 * image(4, 5), "linear") <= STEPS_TOLERATED


def test_float_program_is_lowered_when_captured() -> None:
    program = float_program(Residual(), image())
    model = lower(program)
    check_model(model)
    x = image(4)
    np.testing.assert_allclose(run_onnx(model, [x])[0], program.module(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert model.metadata_props["fxquant.stage"] == "captured"
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in model.graph}


def test_lowering_is_refused_when_values_have_no_range() -> None:
    program = residual_program(calibrate=False)
    with pytest.raises(ExportError, match=r"values have no range.*got .*conv2d_1.*calibrate\(program") as error:
        lower(program)
    assert all(name in str(error.value) for name in RESIDUAL_VALUES if name not in RESIDUAL_SHARES)
    calibrate_on(program, image())
    fake_quant_of(program, "relu").mode = Mode.OBSERVE
    with pytest.raises(ExportError, match=r"1 values have no range.*got relu"):
        lower(program)


def test_lowering_changes_nothing_when_it_runs() -> None:
    program = residual_program()
    with torch.no_grad():
        program.module.get_parameter("conv1.weight").mul_(
            3.0
        )  # the grid follows at the next forward, and in the export
    before = program.fingerprint()
    model = lower(program)
    assert program.fingerprint() == before
    assert model.metadata_props["fxquant.fingerprint"] == before
    assert output_steps(program, model, image(3), "linear") <= STEPS_TOLERATED
    assert program.fingerprint() != before


def test_model_stays_as_it_is_when_training_goes_on() -> None:
    module = Residual()
    program = float_program(module, image())
    model = lower(program)
    x = image(3)
    before = run_onnx(model, [x])[0]
    with torch.no_grad():
        for parameter in program.module.parameters():
            parameter.add_(1.0)
    np.testing.assert_array_equal(run_onnx(model, [x])[0], before)


def test_quantizer_is_left_out_when_it_is_off() -> None:
    program = residual_program()
    for name in ("relu", "conv1_weight"):
        fake_quant_of(program, name).mode = Mode.OFF
    model = lower(program)
    names = {node.name for node in model.graph}
    assert not names & {"relu.quantize", "conv1_weight_fq", "conv1_bias_fq"}
    assert "conv1_weight" in model.graph.initializers
    assert output_steps(program, model, image(3), "linear") <= STEPS_TOLERATED


def test_weight_is_transposed_in_its_initializer_when_the_input_has_rank_three() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 8)
    program = quantized(float_program(nn.Linear(8, 5, bias=False), x[:2]), ("input_1", "linear"), x)
    model = lower(program)
    codes = model.graph.initializers["weight.codes"]
    assert codes.shape == ir.Shape([8, 5])
    dequantize = next(node for node in model.graph if node.name == "weight_fq")
    assert dequantize.attributes["axis"].as_int() == 1
    assert "Transpose" not in {node.op_type for node in model.graph}
    assert output_steps(program, model, x, "linear") <= STEPS_TOLERATED


def test_constant_operand_becomes_an_integer_initializer_when_quantized() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.randn(3, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.shift

    program = quantized(float_program(Shift(), image()), ("x", "shift", "mul"), image(8))
    model = lower(program)
    assert model.graph.initializers["shift.codes"].dtype == ir.DataType.UINT8
    assert kernels(model)["QLinearMul"] == 1
    assert output_steps(program, model, image(3), "mul") <= STEPS_TOLERATED


def test_computed_weight_becomes_an_initializer_when_it_depends_on_parameters_alone() -> None:
    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True))

    program = quantized(float_program(Standardised(), image()), ("x", "conv2d"), image(8))
    model = lower(program)
    assert [node.op_type for node in model.graph].count("Conv") == 1 and len(model.graph) == 6
    assert model.graph.initializers["sub.codes"].dtype == ir.DataType.INT8
    assert output_steps(program, model, image(3), "conv2d") <= STEPS_TOLERATED


def test_tied_weight_gets_two_grids_when_wanted_with_two_specs() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.relu(nn.functional.linear(x, self.weight))
            return nn.functional.linear(hidden, self.weight)

    torch.manual_seed(0)
    x = torch.randn(8, 8)
    program = float_program(Tied(), x[:2])
    for value in ("x", "relu", "linear_1"):
        insert(program, program.node(value), U8)
    weight = program.node("weight")
    first = insert(program, weight, S8_PER_CHANNEL)
    program.module.add_submodule("fake_quants.second", FakeQuant(QuantSpec(8, True, True), follows=True))
    with program.graph.inserting_after(first):
        second = program.graph.create_node("call_module", "fake_quants.second", (weight,), {}, name="weight_fq_1")
    second.meta = dict(first.meta)
    program.node("linear_1").replace_input_with(first, second)
    program.recompile()
    calibrate_on(program, x)
    model = lower(program)
    check_model(model)
    assert {"weight.codes", "weight.codes.1"} <= set(model.graph.initializers)
    assert output_steps(program, model, x, "linear_1") <= STEPS_TOLERATED


@dataclass
class Result:
    """Two named outputs."""

    logits: torch.Tensor
    hidden: torch.Tensor


torch.export.register_dataclass(Result, serialized_type_name="tests.lowering.Result")


class Named(nn.Module):
    """Returns its input, a duplicate and a computed value in the form asked for."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: torch.Tensor) -> Any:
        y = torch.relu(x)
        if self.form == "dict":
            return {"logits": y, "x": x, "states": [y, y * 2]}
        if self.form == "dataclass":
            return Result(y, y * 2)
        return (y, x, y) if self.form == "tuple" else y


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("dict", ["logits", "x_1", "states_0", "states_1"]),
        ("dataclass", ["logits", "hidden"]),
        ("tuple", ["output", "output_1", "output_2"]),
        ("tensor", ["output"]),
    ],
)
def test_outputs_are_named_when_lowered(form: str, names: list[str]) -> None:
    x = image()
    module = Named(form)
    model = lower(float_program(module, x))
    check_model(model)
    assert [value.name for value in model.graph.outputs] == names
    expected = torch.utils._pytree.tree_leaves(module(x))
    for got, want in zip(run_onnx(model, [x]), expected, strict=True):
        np.testing.assert_array_equal(got, want.numpy())


def test_unused_parameters_are_not_written_when_lowered() -> None:
    class Unused(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Parameter(torch.zeros(100, 100))

    model = lower(float_program(Unused(), image()))
    assert all(value.uses() for value in model.graph.initializers.values())
    assert not any("spare" in name for name in model.graph.initializers)


def test_metadata_say_what_was_lowered() -> None:
    program = residual_program()
    model = lower(program)
    assert model.producer_name == "fxquant"
    assert model.metadata_props["fxquant.target"] == "onnxruntime-x64"
    assert model.metadata_props["fxquant.stage"] == str(Stage.CALIBRATED)
    assert model.metadata_props["fxquant.fingerprint"] == program.fingerprint()


def test_opset_is_refused_when_out_of_range() -> None:
    with pytest.raises(ExportError, match=r"opset; expected an opset from 13 to \d+.*got 12"):
        lower(residual_program(), 12)


def test_half_precision_is_refused_by_name_when_quantized() -> None:
    x = image().half()
    program = float_program(nn.ReLU(), x)
    insert(program, program.node("relu"), U8)
    program.recompile()
    calibrate_on(program, x)
    with pytest.raises(ExportError, match=r"'relu_fq' cannot be written.*torch.float16.*model\.float"):
        lower(program)
