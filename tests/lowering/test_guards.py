"""Each guard refuses by name what onnxruntime would compute differently; where cheap, the wrong answer is shown."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from fxquant.errors import ExportError, ParityError
from fxquant.graph.program import Program
from fxquant.lowering.lower import lower
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.numerics.runtime import Level, RuntimeOptions, optimised_graph
from fxquant.spec import Granularity, QuantSpec, Target
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


@dataclass(frozen=True)
class Wrong:
    """How onnxruntime with optimisations differs from onnxruntime without, in codes of one output."""

    differing: int
    total: int
    worst: float

    def __str__(self) -> str:
        return f"{self.differing} of {self.total} codes wrong, by up to {self.worst:g} steps"


def wrong_codes(program: Program, value: str, *inputs: torch.Tensor) -> Wrong:
    """What onnxruntime makes of the program's file when nothing is guarded; `value` is the program's output."""
    plain, fused = (unguarded(program, level, *inputs) for level in (Level.DISABLED, Level.ALL))
    steps = np.abs(plain - fused) / fake_quant_of(program, value).scale.item()
    return Wrong(int(np.sum(steps > 0.5)), steps.size, float(steps.max()))


def unguarded(program: Program, level: Level, *inputs: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The output of the program's file as it is written for another target."""
    program.target = Target.OPENVINO
    model = lower(program)
    program.target = Target.ONNXRUNTIME_X64
    found: np.ndarray[Any, np.dtype[np.float32]] = run_onnx(model, inputs, level)[0]
    return found


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
    wrong = wrong_codes(program, kind, x)
    assert wrong.differing > wrong.total // 2 and wrong.worst > 20, wrong
    program, x = _square(kind, axis=0)
    lower(program)
    right = wrong_codes(program, kind, x)
    assert right.differing <= right.total // 500 and right.worst <= 1, right


class _Transposed(nn.Module):
    """A layer whose weight is transposed when the model runs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        scale = torch.linspace(0.1, 2.0, 8)
        self.weight = nn.Parameter(torch.randn(8, 8) * scale if kind == "matmul" else torch.randn(8, 8, 3, 3))
        self.kind = kind
        if kind == "conv2d":
            self.weight.data.mul_(scale.view(8, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "matmul":
            return torch.matmul(x, self.weight.t())
        return nn.functional.conv2d(x, self.weight.transpose(0, 1))


@pytest.mark.parametrize(("kind", "axis", "shape"), [("matmul", 1, (8, 8)), ("conv2d", 0, (8, 8, 6, 6))])
def test_weight_axis_is_refused_when_a_transposition_hides_it(kind: str, axis: int, shape: tuple[int, ...]) -> None:
    def program(spec: QuantSpec) -> Program:
        torch.manual_seed(0)
        program = float_program(_Transposed(kind), x[:2])
        insert(program, program.node("weight"), spec)
        for name in ("x", kind):
            insert(program, program.node(name), U8)
        program.recompile()
        calibrate_on(program, x)
        return program

    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    hidden = program(replace(S8_PER_CHANNEL, granularity=Granularity(axis)))
    with pytest.raises(ExportError, match=rf"node '{kind}'.*is a constant with a scale for each.*fold-constants"):
        lower(hidden)
    wrong = wrong_codes(hidden, kind, x)
    assert wrong.differing > wrong.total // 2, wrong
    lower(program(replace(S8_PER_CHANNEL, granularity=Granularity())))


def test_bias_scale_is_refused_when_it_comes_from_another_input() -> None:
    program = residual_program()
    bias = program.node("fc_bias_fq")
    bias.args = (bias.args[0], program.node("x_fq"), bias.args[2])
    program.recompile()
    assert fake_quant_of(program, "x").scale != fake_quant_of(program, "adaptive_avg_pool2d").scale
    with pytest.raises(ExportError, match=r"node 'linear'.*'fc_bias_fq' comes from x_fq, fc_weight_fq.*quantize-bias"):
        lower(program)
    wrong = wrong_codes(program, "linear", image(32))
    assert wrong.differing > wrong.total // 2 and wrong.worst > 1, wrong


def test_bias_scale_is_refused_when_it_is_one_percent_off() -> None:
    torch.manual_seed(0)
    module = Residual()
    nn.init.normal_(module.conv2.get_parameter("bias"), std=2.0)
    program = quantized(float_program(module, image()), RESIDUAL_VALUES, image(8), shares=RESIDUAL_SHARES)
    fake_quant_of(program, "x").scale.copy_(1.01 * fake_quant_of(program, "relu").scale)
    bias = program.node("conv2_bias_fq")
    bias.args = (bias.args[0], program.node("x_fq"), bias.args[2])
    program.link_biases()
    program.recompile()
    with pytest.raises(ExportError, match=r"node 'conv2d_1'.*the scale of its bias 'conv2_bias_fq' comes from x_fq"):
        lower(program)
    wrong = wrong_codes(program, "linear", image(64))
    assert wrong.differing > wrong.total // 20, wrong


def test_activation_is_refused_when_it_has_a_scale_for_each_channel() -> None:
    program = residual_program(specs={"conv2d_1": replace(U8, granularity=Granularity(1))})
    with pytest.raises(ExportError, match=r"node 'conv2d_1_fq'.*'conv2d_1' is an activation with a scale for each"):
        lower(program)
    with pytest.raises(ParityError, match="onnxruntime refuses the model"):
        unguarded(program, Level.ALL, image())


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
    with pytest.raises(ParityError, match="onnxruntime (refuses|could not run) the model"):
        unguarded(program, Level.ALL, image())
    lower(quantized(float_program(_Shift(), image()), ("x", "shift", "add"), image(8)))


def test_signed_activation_is_refused_on_onnxruntime_only() -> None:
    program = residual_program(spec=QuantSpec(8, signed=True))
    with pytest.raises(ExportError, match=r"node 'x_fq'.*'x' is a signed activation.*unsigned.*besides: relu_fq"):
        lower(program)
    wrong = _left_in_float(program)
    assert wrong > _left_in_float(residual_program()) == 2, f"{wrong} quantizers left"  # of the input and output
    program.target = Target.XNNPACK
    assert lower(program).metadata_props["fxquant.note"] == "not certified on onnxruntime"


def _left_in_float(program: Program) -> int:
    """QuantizeLinear and DequantizeLinear that onnxruntime leaves in the graph when nothing is guarded."""
    program.target = Target.OPENVINO
    data = ir.serde.serialize_model(lower(program)).SerializeToString()
    nodes = optimised_graph(data, RuntimeOptions(Level.EXTENDED)).graph.node
    return sum(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in nodes)


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
        module.weight[2].abs_()
    x = torch.rand(16, 8)
    program = quantized(float_program(module, x[:2]), ("input_1", "linear"), x)
    codes = program.bias_fake_quant(program.node("bias_fq"))
    assert codes is not None and codes.codes(module.bias)[2] == 2**31 - 1
    with pytest.raises(ExportError, match=r"node 'linear'.*int32 accumulator may reach 2\.14\d*e\+09"):
        lower(program)
    wrong = wrong_codes(program, "linear", x)
    assert wrong.differing == len(x), wrong  # one channel of four
    with torch.no_grad():
        program.module.get_parameter("bias")[2] = 1.0
    lower(program)


def test_accumulator_is_accepted_when_its_weights_are_small_enough() -> None:
    def program(filled: int, bits: int = 8) -> Program:
        module = nn.Linear(80_000, 1, bias=False)
        with torch.no_grad():
            module.weight.zero_()
            module.weight[0, :filled] = 1.0
        x = torch.rand(2, 80_000)
        spec = replace(S8_PER_CHANNEL, bits=bits)
        return quantized(float_program(module, x), ("input_1", "linear"), x, weight_spec=spec)

    full = torch.ones(2, 80_000)
    lower(program(60_000))  # 60,000 * 255 * 127 < 2^31
    right = wrong_codes(program(60_000), "linear", full)
    assert right.differing == 0, right
    with pytest.raises(ExportError, match=r"node 'linear'.*int32 accumulator"):
        lower(program(70_000))
    wrong = wrong_codes(program(70_000), "linear", full)
    assert wrong.differing == wrong.total and wrong.worst > 200, wrong
    lower(program(80_000, bits=7))  # 80,000 * 255 * 64 < 2^31


def test_accumulator_is_refused_when_a_product_of_activations_is_too_long() -> None:
    class Product(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.matmul(x, y)

    def program(length: int) -> Program:
        x, y = torch.rand(2, 1, length), torch.rand(2, length, 1)
        return quantized(float_program(Product(), x, y), ("x", "y", "matmul"), x, y)

    lower(program(33_000))  # 33,000 * 255 * 255 < 2^31
    with pytest.raises(ExportError, match=r"node 'matmul'.*int32 accumulator"):
        lower(program(33_100))
    wrong = wrong_codes(program(33_100), "matmul", torch.ones(2, 1, 33_100), torch.ones(2, 33_100, 1))
    assert wrong.differing == wrong.total and wrong.worst > 200, wrong


@pytest.mark.parametrize(("zero_point", "longest"), [(0, 33_025), (128, 65_793), (200, 42_107)])
def test_accumulator_of_a_product_reaches_as_far_as_its_zero_points_let_it(zero_point: int, longest: int) -> None:
    class Product(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.matmul(x, y)

    def program(length: int) -> Program:
        x, y = torch.rand(2, 1, length), torch.rand(2, length, 1)
        found = quantized(float_program(Product(), x, y), ("x", "y", "matmul"), x, y)
        fake_quant_of(found, "y").zero_point.fill_(zero_point)
        return found

    assert longest == (2**31 - 1) // (255 * max(zero_point, 255 - zero_point))
    lower(program(longest))
    with pytest.raises(ExportError, match=r"node 'matmul'.*int32 accumulator"):
        lower(program(longest + 1))
