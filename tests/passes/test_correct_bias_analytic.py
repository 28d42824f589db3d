"""correct-bias from batch norm statistics: formulas against sampling, agreement with measurement, declines."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fxquant.calibration import calibrate
from fxquant.capture import capture
from fxquant.graph.manager import PassManager
from fxquant.graph.pass_data import PassData, float_twin
from fxquant.graph.pipeline import load_pipeline
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import Mode
from fxquant.passes import CorrectBias, FoldBatchNorm
from fxquant.passes.clipped_normal import clipped, integrated, leaky
from fxquant.passes.correct_bias import Method
from fxquant.passes.moments import Moments
from fxquant.passes.value_moments import value_moments
from tests.helpers import run_pass
from tests.passes.harness import captured, reasons
from tests.passes.test_correct_bias import BITS, calibrated, correct, mean_errors

ANALYTIC = CorrectBias(method=Method.ANALYTIC)
Z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
WEIGHTS = torch.exp(-Z.square() / 2) / torch.exp(-Z.square() / 2).sum()


def summed(mean: float, std: float, function: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, float]:
    """Mean and deviation of function(mean + std z) by a sum over a fine grid."""
    values = function(mean + std * Z)
    first = float((values * WEIGHTS).sum())
    return first, math.sqrt(float(((values - first).square() * WEIGHTS).sum()))


NUMBERS = st.floats(-8, 8, allow_nan=False)
STDS = st.one_of(st.just(0.0), st.floats(1e-12, 1e-6), st.floats(1e-3, 5.0))


@settings(max_examples=60, deadline=None)
@given(
    NUMBERS, STDS, st.sampled_from([(0.0, math.inf), (0.0, 6.0), (-math.inf, 1.0), (-1.0, 1.0), (-math.inf, math.inf)])
)
def test_moments_of_clipped_normals_are_those_of_a_sum(mean: float, std: float, bounds: tuple[float, float]) -> None:
    found = clipped(torch.tensor([mean]).double(), torch.tensor([std]).double(), *bounds)
    expected = summed(float(torch.tensor(mean)), float(torch.tensor(std)), lambda x: x.clamp(*bounds))
    assert abs(float(found[0]) - expected[0]) < 1e-6
    assert abs(float(found[1]) - expected[1]) < 1e-6 + 1e-4 * std


@settings(max_examples=30, deadline=None)
@given(NUMBERS, STDS, st.sampled_from([0.0, 0.01, 0.3, -0.5]))
def test_moments_of_leaky_relus_are_those_of_a_sum(mean: float, std: float, slope: float) -> None:
    found = leaky(torch.tensor([mean]).double(), torch.tensor([std]).double(), slope)
    expected = summed(float(torch.tensor(mean)), float(torch.tensor(std)), lambda x: torch.where(x > 0, x, slope * x))
    assert abs(float(found[0]) - expected[0]) < 1e-6 and abs(float(found[1]) - expected[1]) < 1e-6 + 1e-4 * std


def test_smooth_functions_are_integrated() -> None:
    mean, std = torch.tensor([-1.0, 0.0, 2.5], dtype=torch.float64), torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    found = integrated(mean, std, F.silu)
    for index in range(3):
        expected = summed(float(mean[index]), float(std[index]), F.silu)
        assert abs(float(found[0][index]) - expected[0]) < 1e-6 and abs(float(found[1][index]) - expected[1]) < 1e-6


class Normed(nn.Module):
    """Convolutions with batch norms: relu, depthwise and relu6, a shortcut, leaky relu, padding and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            (
                nn.Conv2d(3, 16, 3, padding=1, bias=False),
                nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
                nn.Conv2d(16, 24, 1, bias=False),
                nn.Conv2d(24, 24, 3, 2, padding=1, bias=False),
            )
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(conv.out_channels) for conv in self.convs)
        self.side, self.fc = nn.Conv2d(16, 24, 1), nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norms[0](self.convs[0](x)))
        x = F.relu6(self.norms[1](self.convs[1](x)))
        x = F.leaky_relu(self.norms[2](self.convs[2](x)), 0.1)
        x = self.norms[3](self.convs[3](x))
        found: torch.Tensor = self.fc(torch.relu(x).mean((2, 3)))
        return found


def normed(seed: int = 0) -> tuple[nn.Module, list[torch.Tensor]]:
    """The net, whose running statistics are those of the data that comes with it."""
    torch.manual_seed(seed)
    model, data = Normed().train(), [torch.randn(16, 3, 16, 16) for _ in range(4)]
    for norm in model.norms:
        assert isinstance(norm, nn.BatchNorm2d)
        norm.momentum = None
        nn.init.normal_(norm.bias)
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    with torch.no_grad():
        for batch in data:
            model(batch)
    return model.eval(), data


def weights_alone(program: Program) -> Program:
    """A copy in which nothing but weights is quantized."""
    twin = program.copy()
    for _, module in twin.fake_quant_nodes():
        if not module.follows:
            module.mode = Mode.OFF
    return twin


def test_analytic_and_measured_corrections_agree_in_sign_and_size() -> None:
    model, data = normed()
    program = calibrated(model, data)
    reference, expected, measured = float_twin(program), program.copy(), program.copy()
    correct(measured, data)
    run_pass(ANALYTIC, expected)
    paths = [f"convs.{index}.bias" for index in (1, 2, 3)] + ["fc.bias"]
    old = torch.cat([program.module.get_parameter(path).detach() for path in paths])
    by_data = torch.cat([measured.module.get_parameter(path).detach() for path in paths]) - old
    by_norms = torch.cat([expected.module.get_parameter(path).detach() for path in paths]) - old
    correlation = float(torch.corrcoef(torch.stack([by_data, by_norms]))[0, 1])
    ratio = float((by_data * by_norms).sum() / by_data.square().sum())
    large = by_data.abs() > 0.2 * by_data.abs().max()
    signs = float((by_data[large].sign() == by_norms[large].sign()).float().mean())
    assert correlation > 0.9 and 0.7 < ratio < 1.3 and signs > 0.9, (correlation, ratio, signs)
    before = mean_errors(program, reference, data)["convs_1"].abs().max()
    assert float(mean_errors(expected, reference, data)["convs_1"].abs().max()) < 0.3 * float(before)


def test_expected_error_at_borders_leaves_out_the_taps_that_padding_reads() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3, 2, padding=1)).eval()
    with torch.no_grad():
        model[0].weight.zero_()  # type: ignore[union-attr,operator]  # so that what it gives is its bias everywhere
    assert isinstance(model[1], nn.BatchNorm2d) and model[1].running_var is not None
    nn.init.normal_(model[1].bias)
    model[0].bias.data.zero_()  # type: ignore[union-attr]
    model[1].running_var.zero_()
    data = [torch.randn(2, 3, 6, 6)]
    program = calibrated(model, data)
    reference = weights_alone(program)
    before = mean_errors(reference, float_twin(program), data)["_2"]
    run_pass(ANALYTIC, program)
    after = mean_errors(weights_alone(program), float_twin(reference), data)["_2"]
    assert float(before.abs().max()) > 1e-2 and float(after.abs().max()) < 1e-5


def test_borders_do_not_count_where_the_size_of_the_image_is_not_known() -> None:
    data, biases = [torch.randn(2, 3, 6, 6)], []
    size = {2: torch.export.Dim("height", min=4, max=64), 3: torch.export.Dim("width", min=4, max=64)}
    for padding, dynamic in ((1, (size,)), (0, None)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3, padding=padding))
        assert isinstance(model[1], nn.BatchNorm2d)
        nn.init.normal_(model[1].bias)
        program = capture(model.eval(), (data[0],), dynamic_shapes=dynamic)
        load_pipeline("int8_per_tensor").override(weight=BITS).prepare(program)
        calibrate(program, data, progress=False)
        before = program.module.get_parameter("2.bias").clone()
        run_pass(ANALYTIC, program)
        biases.append(program.module.get_parameter("2.bias") - before)
    assert float(biases[0].detach().abs().max()) > 1e-3
    torch.testing.assert_close(biases[0], biases[1])


def test_twice_is_once_and_measured_corrections_are_replaced() -> None:
    model, data = normed()
    program, other = calibrated(model, data), calibrated(model, data)
    assert run_pass(ANALYTIC, program).modified
    assert not run_pass(ANALYTIC, program).modified
    correct(other, data)
    run_pass(ANALYTIC, other)
    for path in ("convs.1.bias", "convs.3.bias"):
        assert torch.allclose(program.module.get_parameter(path), other.module.get_parameter(path), atol=1e-5)


class Odd(nn.Module):
    """Ways on which means are lost: an input, a maximum, a product of values, a layer without batch norm, padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(4, 4, 1) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        y = self.a(F.max_pool2d(x, 2)).mean((2, 3)) + self.b(x * torch.sigmoid(2 * x)).mean((2, 3))
        y = y + self.c(self.d(x)).mean((2, 3))
        return y + self.e(torch.relu(F.avg_pool2d(x, 2))).mean((2, 3))


def test_layers_of_whose_input_nothing_is_known_are_declined_with_the_reason() -> None:
    torch.manual_seed(0)
    program = calibrated(Odd().eval(), [torch.randn(2, 3, 8, 8)])
    found = " | ".join(reasons(run_pass(ANALYTIC, program)))
    assert "stem left as it is: nothing is known of x, an input" in found
    assert "a left as it is: nothing is known of the mean behind max_pool2d" in found
    assert "the mean of a product is not the product of means" in found
    assert "c left as it is: no batch norm was folded into d" in found
    assert "e left as it is: the deviation of what relu reads is not known" in found


def test_weight_that_holds_its_codes_is_declined_unless_the_run_knows_it_in_float() -> None:
    model, data = normed()
    program = calibrated(model, data)
    for node, module in program.fake_quant_nodes():
        if module.follows:
            stored = program.tensor(node.all_input_nodes[0])
            with torch.no_grad():
                stored.copy_(module(stored))
            module.mode = Mode.FROZEN
    found = reasons(run_pass(ANALYTIC, program))
    assert sum("its weight holds codes already" in reason for reason in found) == 4, found


def test_run_that_measures_takes_the_float_weight_from_its_beginning() -> None:
    model, data = normed()
    program, plain = calibrated(model, data), calibrated(model, data)
    run_pass(ANALYTIC, plain)
    both = PassManager([CorrectBias(layers="fc"), ANALYTIC])
    both.run(program, data=PassData(data, progress=False))
    assert torch.allclose(program.module.get_parameter("convs.2.bias"), plain.module.get_parameter("convs.2.bias"))


class Paths(nn.Module):
    """Concatenation, a constant factor and shift, a sum, an average and a flattening behind batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        one, two = self.norm1(self.one(x)), self.norm2(self.two(z))
        joined = torch.cat([torch.relu(one), F.hardswish(two)], 1)
        summed = torch.relu(one - 0.5 * two + 1.0)
        return joined, summed, F.avg_pool2d(joined, 2).flatten(1), F.dropout(two, 0.5, self.training).mean((2, 3))


def test_moments_of_values_are_those_of_their_data() -> None:
    torch.manual_seed(0)
    model, inputs = Paths().train(), (torch.randn(64, 3, 16, 16), torch.randn(64, 3, 16, 16))
    for norm in (model.norm1, model.norm2):
        norm.momentum = None
        nn.init.normal_(norm.bias)
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    model(*inputs)
    program = captured(model.eval(), *inputs)
    run_pass(FoldBatchNorm(), program)
    known = value_moments(program)
    outputs = next(node for node in program.graph.nodes if node.op == "output").args[0]
    with torch.no_grad():
        for node, value in zip(outputs, program.module(*inputs), strict=True):
            found = known[node]
            assert isinstance(found, Moments), found
            expected = value.double().movedim(1, 0).flatten(1).mean(1)
            assert found.mean.shape == expected.shape
            noise = 0.05 if len(expected) <= 8 else 0.3  # flattened: few examples of each
            assert float((found.mean - expected).abs().max()) < noise, node.name


@pytest.mark.parametrize("tail", ["permute", "mean over channels"])
def test_channels_that_move_are_not_mistaken_for_others(tail: str) -> None:
    torch.manual_seed(0)

    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.norm(self.conv(x)))
            found: torch.Tensor = self.fc(y.permute(0, 2, 3, 1) if tail == "permute" else y.mean(1))
            return found

    program = calibrated(Moved().eval(), [torch.randn(2, 3, 4, 4)])
    found = reasons(run_pass(ANALYTIC, program))
    assert any(reason.startswith("fc left as it is: ") for reason in found), found
