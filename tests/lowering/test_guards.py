"""Each guard refuses by name what onnxruntime would compute differently; where cheap, the wrong answer is shown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fxquant.errors import ExportError
from fxquant.graph.program import Program
from fxquant.lowering.lower import lower
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.numerics.runtime import Level
from fxquant.spec import Granularity, QuantSpec, Target
from tests.lowering.programs import (
    S8_PER_CHANNEL,
    U8,
    calibrate_on,
    fake_quant_of,
    float_program,
    image,
    insert,
    quantized,
    residual_program,
)
from tests.ops.harness import run_onnx

MANY_STEPS = 20


def wrong_steps(program: Program, value: str, *inputs: torch.Tensor) -> float:
    """How far onnxruntime with optimisations is from onnxruntime without, in steps, when nothing is guarded."""
    program.target = Target.OPENVINO
    model = lower(program)
    program.target = Target.ONNXRUNTIME_X64
    plain, fused = run_onnx(model, inputs)[0], run_onnx(model, inputs, Level.ALL)[0]
    return float(np.abs(plain - fused).max() / fake_quant_of(program, value).scale.item())


def _square(kind: str, axis: int) -> tuple[Program, torch.Tensor]:
    torch.manual_seed(0)
    module = nn.Conv2d(8, 8, 3, bias=False) if kind == "conv2d" else nn.Linear(8, 8, bias=False)
    x = torch.randn(8, 8, 6, 6) if kind == "conv2d" else torch.randn(8, 8)
    with torch.no_grad():
        module.weight.mul_(torch.linspace(0.1, 2.0, 8).view(1, 8, *[1] * (module.weight.ndim - 2)))
    spec = replace(S8_PER_CHANNEL, granularity=Granularity(axis))
    return quantized(float_program(module, x[:2]), ("input_1", kind), x, weight_spec=spec), x


@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_weight_axis_is_refused_when_it_is_not_the_output_channels(kind: str) -> None:
    program, x = _square(kind, axis=1)
    with pytest.raises(ExportError, match=rf"node '{kind}'.*'weight_fq' has a scale .* axis 1.*along axis 0"):
        lower(program)
    assert wrong_steps(program, kind, x) > MANY_STEPS
    program, x = _square(kind, axis=0)
    lower(program)
    assert wrong_steps(program, kind, x) <= 1


def test_bias_scale_is_refused_when_it_comes_from_another_input() -> None:
    program = residual_program()
    bias = program.node("fc_bias_fq")
    bias.args = (bias.args[0], program.node("x_fq"), bias.args[2])
    program.recompile()
    assert fake_quant_of(program, "x").scale != fake_quant_of(program, "adaptive_avg_pool2d").scale
    with pytest.raises(ExportError, match=r"node 'linear'.*'fc_bias_fq' comes from x_fq, fc_weight_fq.*quantize-bias"):
        lower(program)


def test_activation_is_refused_when_it_has_a_scale_for_each_channel() -> None:
    program = residual_program(specs={"conv2d_1": replace(U8, granularity=Granularity(1))})
    with pytest.raises(ExportError, match=r"node 'conv2d_1_fq'.*'conv2d_1' is an activation with a scale for each"):
        lower(program)


class _Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


def test_constant_operand_is_refused_when_it_has_a_scale_for_each_channel() -> None:
    spec = replace(U8, granularity=Granularity(1))
    program = quantized(float_program(_Shift(), image()), ("x", "shift", "add"), image(8), specs={"shift": spec})
    with pytest.raises(ExportError, match=r"node 'add'.*operand 'shift_fq' is a constant with a scale for each"):
        lower(program)
    lower(quantized(float_program(_Shift(), image()), ("x", "shift", "add"), image(8)))


def test_signed_activation_is_refused_on_onnxruntime_only() -> None:
    program = residual_program(spec=QuantSpec(8, signed=True))
    with pytest.raises(ExportError, match=r"node 'x_fq'.*'x' is a signed activation.*unsigned.*besides: relu_fq"):
        lower(program)
    program.target = Target.XNNPACK
    assert lower(program).metadata_props["fxquant.note"] == "not certified on onnxruntime"


def _two_readers(same: bool) -> Program:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(x)
            return torch.max_pool2d(y, 2) + torch.max_pool2d(y, 2)

    program = float_program(Two(), image())
    first = insert(program, program.node("relu"), U8)
    program.module.add_submodule("fake_quants.second", FakeQuant(U8))
    with program.graph.inserting_after(first):
        second = program.graph.create_node(
            "call_module", "fake_quants.second", (program.node("relu"),), {}, name="second_fq"
        )
    second.meta = dict(first.meta)
    program.node("max_pool2d_1").replace_input_with(first, second)
    program.recompile()
    calibrate_on(program, image(8))
    if not same:
        fake_quant_of(program, "second").scale.mul_(1.5)
    return program


def test_two_grids_on_one_activation_are_refused_when_they_differ() -> None:
    with pytest.raises(ExportError, match=r"node 'relu'.*2 different grids \(relu_fq, second_fq\)"):
        lower(_two_readers(same=False))
    names = [node.name for node in lower(_two_readers(same=True)).graph]
    assert len(names) == len(set(names))


def test_accumulator_is_refused_when_it_may_exceed_int32() -> None:
    torch.manual_seed(0)
    module = nn.Linear(8, 4)
    with torch.no_grad():
        module.bias[2] = 1e6
    x = torch.rand(16, 8)
    program = quantized(float_program(module, x[:2]), ("input_1", "linear"), x)
    codes = program.bias_fake_quant(program.node("bias_fq"))
    assert codes is not None and codes.codes(module.bias)[2] == 2**31 - 1
    with pytest.raises(ExportError, match=r"node 'linear'.*int32 accumulator may reach 2\.14\d*e\+09"):
        lower(program)
    with torch.no_grad():
        program.module.get_parameter("bias")[2] = 1.0
    lower(program)


def test_accumulator_is_accepted_when_its_weights_are_small_enough() -> None:
    def program(filled: int) -> Program:
        module = nn.Linear(80_000, 1, bias=False)
        with torch.no_grad():
            module.weight.zero_()
            module.weight[0, :filled] = 1.0
        x = torch.rand(2, 80_000)
        return quantized(float_program(module, x), ("input_1", "linear"), x)

    lower(program(60_000))  # 60,000 * 255 * 127 < 2^31
    with pytest.raises(ExportError, match=r"node 'linear'.*int32 accumulator"):
        lower(program(70_000))


def test_accumulator_is_refused_when_a_product_of_activations_is_too_long() -> None:
    class Product(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.matmul(x, y)

    def program(length: int) -> Program:
        x, y = torch.rand(2, 1, length), torch.rand(2, length, 1)
        return quantized(float_program(Product(), x, y), ("x", "y", "matmul"), x, y)

    lower(program(33_000))
    with pytest.raises(ExportError, match=r"node 'matmul'.*int32 accumulator"):
        lower(program(33_100))
