"""Weights quantized in blocks, in ONNX: DequantizeLinear with block_size, and layers that stay in float.

What onnxruntime 1.31.1 does with them otherwise is shown on files without barriers behind the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from fxquant.errors import ExportError, FxquantError, SpecError
from fxquant.graph.program import Program
from fxquant.lowering import writer
from fxquant.lowering.export import check_model, export_onnx
from fxquant.lowering.lower import lower
from fxquant.numerics.fake_quant import BiasFakeQuant
from fxquant.numerics.runtime import Level, RuntimeOptions, optimised_graph
from fxquant.spec import Granularity, QuantSpec, Target
from tests.lowering.programs import (
    S8_PER_CHANNEL,
    U8,
    calibrate_on,
    fake_quant_of,
    float_program,
    insert,
    quantized,
)
from tests.ops.harness import run_onnx

S8 = QuantSpec(8, signed=True, symmetric=True)
ROUNDING = 1e-5  # float products in another order, as a fraction of the largest output


class Product(nn.Module):
    """x w, or x w + b, with w: [in, out]."""

    def __init__(self, with_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 24))
        self.bias = nn.Parameter(torch.randn(24)) if with_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)


@dataclass(frozen=True)
class Case:
    """One layer: how to make it, the shape of its input, and the axis and rank of its weight's blocks."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    axis: int
    operator: str


CASES = {
    "conv": Case(lambda: nn.Conv2d(32, 24, 3), (4, 32, 6, 6), 1, "Conv"),
    "conv without bias": Case(lambda: nn.Conv2d(32, 24, 3, bias=False), (4, 32, 6, 6), 1, "Conv"),
    "grouped conv": Case(lambda: nn.Conv2d(64, 24, 3, groups=2, bias=False), (4, 64, 6, 6), 1, "Conv"),
    "conv1d": Case(lambda: nn.Conv1d(32, 24, 3, bias=False), (4, 32, 6), 1, "Conv"),
    "transposed conv": Case(lambda: nn.ConvTranspose2d(32, 24, 3, bias=False), (4, 32, 6, 6), 0, "ConvTranspose"),
    "linear": Case(lambda: nn.Linear(32, 24), (4, 32), 1, "Gemm"),
    "linear without bias": Case(lambda: nn.Linear(32, 24, bias=False), (4, 32), 1, "Gemm"),
    "linear at rank 3": Case(lambda: nn.Linear(32, 24), (4, 5, 32), 1, "Gemm"),
    "linear at rank 3 without bias": Case(lambda: nn.Linear(32, 24, bias=False), (4, 5, 32), 1, "MatMul"),
    "product": Case(lambda: Product(False), (4, 5, 32), 0, "MatMul"),
    "addmm": Case(lambda: Product(True), (4, 32), 0, "Gemm"),
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def program_of(case: Case, *, block: int = 16, spec: QuantSpec = S8, grids: bool = True) -> Program:
    """A calibrated layer with its weight in blocks; `grids`: its input and output are quantized, too."""
    torch.manual_seed(0)
    x = noise(*case.shape)
    program = float_program(case.make(), x)
    weight = next(node for node in program.graph.nodes if node.op == "get_attr" and "weight" in node.name)
    layer = next(iter(weight.users))
    insert(program, weight, replace(spec, granularity=Granularity(case.axis, block)))
    if grids:
        insert(program, next(node for node in program.graph.nodes if node.op == "placeholder"), U8)
        insert(program, layer, U8)
    program.recompile()
    calibrate_on(program, x)
    return program


def proto(program: Program, opset: int = 21) -> onnx.ModelProto:
    model = lower(program, opset)
    check_model(model)
    return ir.to_proto(model)


def weight_node(model: onnx.ModelProto) -> onnx.NodeProto:
    """The DequantizeLinear with blocks."""
    (node,) = [node for node in model.graph.node if any(item.name == "block_size" for item in node.attribute)]
    assert node.op_type == "DequantizeLinear"
    return node


def operators(program: Program) -> list[str]:
    data = ir.serde.serialize_model(lower(program)).SerializeToString()
    return [node.op_type for node in optimised_graph(data, RuntimeOptions(Level.ALL)).graph.node]


@pytest.mark.parametrize("grids", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_layer_is_computed_in_float_as_the_program_does_when_its_weight_is_in_blocks(name: str, grids: bool) -> None:
    program = program_of(CASES[name], grids=grids)
    x = noise(*CASES[name].shape, seed=1)
    with torch.no_grad():
        expected = program.module(x).numpy()
    model = lower(program)
    check_model(model)
    step = max(float(fake.scale) for node, fake in program.fake_quant_nodes() if fake.scale.ndim == 0) if grids else 0
    for level in (Level.DISABLED, Level.EXTENDED, Level.ALL):
        found = run_onnx(model, [x], level)[0]
        differing = np.abs(found - expected) > ROUNDING * np.abs(expected).max()
        assert np.abs(found - expected)[differing].max(initial=0) <= step * 1.001
        assert differing.mean() < 0.01
    ran = operators(program)
    assert not any("QLinear" in kernel or "Integer" in kernel or kernel == "MatMulNBits" for kernel in ran), ran


@pytest.mark.parametrize("name", CASES)
def test_stored_codes_times_blocks_are_the_program_weight_when_written(name: str) -> None:
    case = CASES[name]
    program = program_of(case, block=8)
    weight = next(node for node, fake in program.fake_quant_nodes() if fake.scale.ndim)
    module, source = program.fake_quant(weight), weight.args[0]
    assert module is not None and isinstance(source, torch.fx.Node)
    expected = module(program.tensor(source)).detach().numpy()
    model = proto(program)
    node = weight_node(model)
    codes, scale, zero = (
        next(onnx.numpy_helper.to_array(item) for item in model.graph.initializer if item.name == name)
        for name in node.input
    )
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    axis, block = attributes["axis"], attributes["block_size"]
    assert block == 8 and codes.dtype == np.int8 and zero.dtype == np.int8
    assert scale.shape == tuple(size // 8 if index == axis else size for index, size in enumerate(codes.shape))
    written = codes.astype(np.float32) * scale.repeat(8, axis)
    is_transposed = case.operator == "MatMul" and "linear" in name_of(case)
    assert axis == (0 if is_transposed else case.axis)
    assert np.array_equal(written.T if is_transposed else written, expected)


def name_of(case: Case) -> str:
    return next(name for name, other in CASES.items() if other is case)


@pytest.mark.parametrize(
    ("spec", "dtype", "codes"),
    [
        (replace(S8, bits=4, strict=True), np.int8, (-7, 7)),
        (QuantSpec(4), np.uint8, (0, 15)),
        (QuantSpec(8), np.uint8, (0, 255)),
        (replace(S8, bits=16), np.int16, (-32768, 32767)),
    ],
)
def test_codes_are_stored_in_the_dtype_of_other_weights_when_in_blocks(
    spec: QuantSpec, dtype: Any, codes: tuple[int, int]
) -> None:
    program = program_of(CASES["linear"], spec=spec)
    model = proto(program)
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    array = stored[weight_node(model).input[0]]
    assert array.dtype == dtype
    assert codes[0] <= array.min() <= codes[0] + 1 and codes[1] - 1 <= array.max() <= codes[1]
    x = noise(4, 32, seed=1)
    plain, optimised = (run_onnx(lower(program), [x], level)[0] for level in (Level.DISABLED, Level.ALL))
    assert np.array_equal(plain, optimised)


def test_opset_is_named_when_it_has_no_blocks(tmp_path: Any) -> None:
    program = program_of(CASES["linear"])
    with pytest.raises(ExportError, match=r"'weight_fq' quantizes in blocks of 16.*opset 21 or later.*got opset 20"):
        lower(program, 20)
    path = export_onnx(program, tmp_path / "model.onnx", opset=21)
    onnx.checker.check_model(path, full_check=True)


def test_activation_in_blocks_is_refused_by_name_when_lowered() -> None:
    program = program_of(CASES["linear"])
    module = fake_quant_of(program, "input_1")
    module.spec = replace(module.spec, granularity=Granularity(1, 16))
    program.target = Target.TENSORRT
    with pytest.raises(ExportError, match=r"'input_1_fq' cannot be written.*in blocks"):
        lower(program)


def test_bias_on_the_grid_of_a_weight_in_blocks_is_refused_by_name_when_linked() -> None:
    program = quantized(float_program(nn.Linear(32, 24), noise(4, 32)), ("input_1",), noise(4, 32))
    module = fake_quant_of(program, "weight")
    module.spec = replace(S8_PER_CHANNEL, granularity=Granularity(1, 16))
    assert any(isinstance(module, BiasFakeQuant) for module in program.module.modules())
    with pytest.raises(SpecError, match=r"bias 'bias' is quantized to int32.*got a weight per-block\(1, 16\)"):
        program.link_biases()


@pytest.mark.parametrize("name", ["conv without bias", "conv1d", "product", "linear at rank 3 without bias"])
def test_integer_kernel_fails_when_nothing_prevents_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Barriers, case 6."""
    program = program_of(CASES[name])
    monkeypatch.setattr(writer, "input_to_guard", lambda node: None)
    with pytest.raises(FxquantError, match="QLinear"):
        run_onnx(lower(program), [noise(*CASES[name].shape, seed=1)], Level.ALL)


@pytest.mark.parametrize("name", ["product", "linear at rank 3 without bias", "addmm"])
def test_inputs_are_quantized_silently_when_nothing_prevents_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Barriers, case 2."""
    program = program_of(CASES[name], grids=False)
    monkeypatch.setattr(writer, "input_to_guard", lambda node: None)
    x = noise(*CASES[name].shape, seed=1)
    plain, optimised = (run_onnx(lower(program), [x], level)[0] for level in (Level.DISABLED, Level.ALL))
    assert np.abs(plain - optimised).max() > 1e-3 * np.abs(plain).max()


@pytest.mark.parametrize("name", ["linear", "linear without bias", "linear at rank 3", "transposed conv"])
def test_layer_needs_no_barrier_when_it_has_no_integer_kernel_for_blocks(name: str) -> None:
    program = program_of(CASES[name])
    ours = [node.op_type for node in proto(program).graph.node]
    assert ours.count("Max") == (1 if "conv" not in name and "without" not in name else 0)  # a float bias: case 1
    x = noise(*CASES[name].shape, seed=1)
    plain, optimised = (run_onnx(lower(program), [x], level)[0] for level in (Level.DISABLED, Level.ALL))
    assert np.array_equal(plain, optimised)
