"""quantize-bias: int32 biases at scale f(sx * sw), as integer kernels add them."""

from __future__ import annotations

import torch
from torch import nn

from fxquant.calibration import calibrate
from fxquant.graph.manager import PassManager
from fxquant.graph.program import NoteKind
from fxquant.numerics.fake_quant import BiasFakeQuant
from fxquant.passes import AssignSpecs, InsertFakeQuant, QuantizeBias
from fxquant.spec import BIAS_SPEC, Granularity, QuantSpec
from tests.helpers import assert_golden, run_pass
from tests.passes.harness import captured, difference, output, reasons
from tests.passes.pipelines import IMAGE, before, residual


def test_biases_of_quantized_layers_are_quantized() -> None:
    program = before(QuantizeBias, residual(), IMAGE)
    run_pass(QuantizeBias(), program)
    assert [str(node.args[0]) for node, _ in program.bias_nodes()] == ["conv1_bias", "conv2_bias", "fc_bias"]
    assert [node.name for node in program.node("conv1_bias_fq").all_input_nodes] == [
        "conv1_bias",
        "x_fq",
        "conv1_weight_fq",
    ]


def test_bias_codes_are_those_of_the_products_scale() -> None:
    program = before(QuantizeBias, residual(), IMAGE)
    run_pass(QuantizeBias(), program)
    calibrate(program, [IMAGE])
    module = program.module.get_submodule("fake_quants.conv1_bias")
    assert isinstance(module, BiasFakeQuant)
    bias = program.module.get_parameter("conv1.bias").detach()
    scale = program.module.fake_quants.x.scale * program.module.fake_quants.conv1_weight.scale  # type: ignore[union-attr]
    assert torch.equal(module.codes(bias), torch.round(bias / scale).to(torch.int32))
    assert module.encoding.spec.bits == BIAS_SPEC.bits


def test_bias_shared_by_two_layers_gets_a_grid_for_each() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    program = before(QuantizeBias, model, torch.randn(2, 4))
    run_pass(QuantizeBias(), program)
    assert len({str(node.target) for node, _ in program.bias_nodes()}) == 2


class Computed(nn.Module):
    """A linear layer whose bias is a sum of two parameters, or of a parameter and what the input says."""

    def __init__(self, reads_input: bool) -> None:
        super().__init__()
        self.weight, self.reads_input = nn.Parameter(torch.randn(4, 4)), reads_input
        self.a, self.b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.a + (x.mean(0) if self.reads_input else self.b))


def test_bias_computed_from_parameters_alone_is_quantized() -> None:
    x = torch.randn(2, 4)
    program = before(QuantizeBias, Computed(reads_input=False), x)
    run_pass(QuantizeBias(), program)
    calibrate(program, [x])
    ((node, module),) = program.bias_nodes()
    assert [arg.name for arg in node.all_input_nodes] == ["add", "x_fq", "weight_fq"]
    bias = program.module.get_parameter("a") + program.module.get_parameter("b")
    assert torch.equal(module(bias, x, x), module.codes(bias) * module.scale)


def test_bias_computed_from_an_activation_is_declined_with_the_reason() -> None:
    program = before(QuantizeBias, Computed(reads_input=True), torch.randn(2, 4))
    entry = run_pass(QuantizeBias(), program)
    assert list(program.bias_nodes()) == []
    assert any(reason.endswith("stays in float: it is computed, not a parameter") for reason in reasons(entry))


def test_bias_that_would_overflow_raises_its_channels_weight_scale_and_is_reported() -> None:
    model = residual()
    with torch.no_grad():
        model.conv1.weight[3] = 1e-9
        model.conv1.bias[3] = 2.0
    program = before(QuantizeBias, model, IMAGE)
    run_pass(QuantizeBias(), program)
    calibrate(program, [IMAGE])
    module = program.module.get_submodule("fake_quants.conv1_bias")
    assert isinstance(module, BiasFakeQuant)
    codes = module.codes(program.module.get_parameter("conv1.bias"))
    assert 2**22 < int(codes[3]) <= 2**23 and int(codes.abs().max()) <= 2**23
    notes = [note for note in program.notes if note.kind is NoteKind.BIAS]
    assert [note.place for note in notes] == ["conv1.bias"] and "1 of 8 channels" in notes[0].text


def test_bias_of_a_channel_without_weights_stays_exact() -> None:
    model = residual()
    with torch.no_grad():
        model.conv1.weight[3] = 0.0
        model.conv1.bias[3] = 0.7321
    program = before(QuantizeBias, model, IMAGE)
    run_pass(QuantizeBias(), program)
    calibrate(program, [IMAGE])
    node, module = next(program.bias_nodes())
    bias = program.module.get_parameter("conv1.bias").detach()
    assert node.name == "conv1_bias_fq"
    assert abs(float(module.codes(bias)[3] * module.scale[3]) - 0.7321) < 1e-6


def test_float_outputs_are_kept_before_calibration_and_twice_is_once() -> None:
    model = residual()
    program = before(QuantizeBias, model, IMAGE)
    run_pass(QuantizeBias(), program)
    assert difference(program, output(model, IMAGE), IMAGE) == 0.0
    assert not run_pass(QuantizeBias(), program).modified


def test_diff_is_golden() -> None:
    program = before(InsertFakeQuant, residual(), IMAGE)
    PassManager([InsertFakeQuant()]).run(program)
    assert_golden(run_pass(QuantizeBias(), program).diff(), "quantize_bias_residual.diff")


def test_bias_of_a_grouped_transposed_convolution_with_several_scales_stays_float() -> None:
    program = captured(nn.ConvTranspose2d(8, 8, 3, groups=4), torch.randn(1, 8, 4, 4))
    weight = QuantSpec(signed=True, symmetric=True, granularity=Granularity(1))
    PassManager([AssignSpecs(weight=weight, integer_ops=("ConvTranspose",)), InsertFakeQuant()]).run(program)
    entry = run_pass(QuantizeBias(), program)
    assert not entry.modified and reasons(entry)[0].endswith("per-channel(1), not one scale for each output channel")
    calibrate(program, [torch.randn(1, 8, 4, 4)])
