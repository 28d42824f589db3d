"""The exact form's gradients are fake quantization's, where both round alike.

On power-of-two scales they always do. On others a code in some hundred thousand differs, so that in small nets most
inputs are rounded alike.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import models
from fxquant.graph.program import Program
from fxquant.numerics.codes import Grid
from fxquant.numerics.rounding import fake_quantize
from fxquant.parity.simulation import CodeSimulation, FloatSimulation
from fxquant.simulation import exact
from tests.simulation.programs import calibrated, gradients, largest_error, noise, on_powers_of_two

TOLERANCE = 1e-5  # relative to a gradient's largest magnitude
aten = torch.ops.aten


def assert_same_gradients(program: Program, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients in the exact form, which are those in the float form."""
    expected, found = gradients(program, "float", *inputs), gradients(program, "exact", *inputs)
    assert all(torch.isfinite(grad).all() for grad in found.values())
    assert largest_error(expected, found) <= TOLERANCE
    return found


class Net(nn.Module):
    """A convolution, then `rest` of its output and of the input's second half of channels."""

    def __init__(self, rest: Any) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 5, 1)
        self.norm = nn.LayerNorm(8)
        self.rest = rest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.rest(self, self.one(x), self.two(x)))
        return found


BETWEEN: list[tuple[str, Any]] = [
    ("relu", lambda net, a, b: F.relu(a)),
    ("relu6", lambda net, a, b: F.relu6(3 * a)),
    ("hardtanh", lambda net, a, b: F.hardtanh(a, -0.5, 0.5)),
    ("clamp", lambda net, a, b: torch.clamp(a, -0.5, 0.25)),
    ("relu-clamp", lambda net, a, b: torch.clamp(F.relu(a), max=0.5)),
    ("add", lambda net, a, b: a + b),
    ("add-relu", lambda net, a, b: F.relu(a + b)),
    ("add-broadcast", lambda net, a, b: a + F.adaptive_avg_pool2d(b, 1)),
    ("add-same", lambda net, a, b: a + a),
    ("mul", lambda net, a, b: a * b),
    ("mul-broadcast", lambda net, a, b: a * F.adaptive_avg_pool2d(b, 1)),
    ("mul-same", lambda net, a, b: a * a),
    ("average-pool", lambda net, a, b: F.avg_pool2d(a, 2)),
    ("max-pool", lambda net, a, b: F.max_pool2d(a, 2)),
    ("concat", lambda net, a, b: torch.cat([a[:, :3], b[:, 3:]], 1)),
    ("sigmoid", lambda net, a, b: torch.sigmoid(a)),
    ("softmax", lambda net, a, b: torch.softmax(4 * a, 1)),
    ("leaky-relu", lambda net, a, b: F.leaky_relu(a, 0.25)),
    ("where", lambda net, a, b: torch.where(b > 0, a, b)),
    ("layer-norm", lambda net, a, b: net.norm(a)),
    ("gelu", lambda net, a, b: F.gelu(a)),
    ("matmul", lambda net, a, b: torch.matmul(a, b.transpose(2, 3))),
    ("matmul-attention", lambda net, a, b: torch.matmul(torch.softmax(torch.matmul(a, b.transpose(2, 3)), -1), b)),
]


def net_program(rest: Any, seed: int = 0) -> Program:
    """A program on power-of-two scales whose grids clip: they are calibrated on half of the input."""
    torch.manual_seed(seed)
    return on_powers_of_two(calibrated(Net(rest), 0.5 * noise(2, 4, 8, 8, seed=seed)))


@pytest.mark.parametrize("rest", [entry[1] for entry in BETWEEN], ids=[entry[0] for entry in BETWEEN])
def test_gradients_are_fake_quantization_s_behind(rest: Any) -> None:
    assert_same_gradients(net_program(rest), noise(2, 4, 8, 8))


# QLinearSoftmax takes 1 / scale for a whole number, so that on others most of its codes are not fake quantization's.
ROUNDED_ALIKE = [entry for entry in BETWEEN if "softmax" not in entry[0] and entry[0] != "matmul-attention"]


@pytest.mark.parametrize("rest", [entry[1] for entry in ROUNDED_ALIKE], ids=[entry[0] for entry in ROUNDED_ALIKE])
def test_gradients_are_fake_quantization_s_on_arbitrary_scales_behind(rest: Any) -> None:
    alike = 0
    for seed in range(12):
        torch.manual_seed(seed)
        program = calibrated(Net(rest), 0.5 * noise(1, 4, 8, 8, seed=seed))
        x = noise(1, 4, 8, 8, seed=seed)
        expected, found = gradients(program, "float", x), gradients(program, "exact", x)
        if codes_alike(program, x):
            alike += 1
            assert largest_error(expected, found) <= TOLERANCE
        if alike == 2:
            return
    pytest.fail(f"{alike} of 12 inputs were rounded alike, expected 2")


def codes_alike(program: Program, x: torch.Tensor) -> bool:
    """Whether both forms compute the same codes at every quantizer."""
    found = []
    for simulation in (FloatSimulation(), CodeSimulation("exact", exact.ExactArithmetic)):
        found.append([step.value for step in simulation.run(program, {"x": x}, {}) if not step.is_output])
    return all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
def test_gradients_are_fake_quantization_s_in_linear_layers(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Linear(8, 3))
    x = noise(*shape)
    assert_same_gradients(on_powers_of_two(calibrated(model, x)), 2 * x)


def test_gradients_are_fake_quantization_s_in_resnet18() -> None:
    model = models.randomise(models.ResNet18(), 0)
    x = noise(2, 3, 32, 32)
    found = assert_same_gradients(on_powers_of_two(calibrated(model, x)), x)
    assert len(found) == 2 + 2 * 21


def test_gradients_are_fake_quantization_s_in_mobilenet_v2() -> None:
    model = models.randomise(models.MobileNetV2(), 0)
    x = noise(2, 3, 32, 32)
    found = assert_same_gradients(on_powers_of_two(calibrated(model, x)), x)
    assert len(found) == 2 + 2 * 53


def test_gradients_are_fake_quantization_s_where_channels_are_dead_or_their_scale_was_raised() -> None:
    """A dead channel's scale is 2^-60, or what its bias needs: gradients are multiplied and divided by it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1))
    with torch.no_grad():
        model[0].weight[0] = 0.0
        model[0].bias[0] = 0.0
        model[0].weight[1] = 0.0
        model[0].weight[2] *= 1e-7
    x = noise(2, 3, 6, 6)
    program = on_powers_of_two(calibrated(model, x))
    scales = next(fq for node, fq in program.fake_quant_nodes() if fq.scale.ndim).scale
    assert scales[0] == 2.0**-60 and scales[2] > 1e-7 / 127
    found = assert_same_gradients(program, x)
    bias = next(grad for name, grad in found.items() if name.endswith("0.bias"))
    assert (bias != 0).all()


def test_gradients_of_each_channel_are_as_near_where_channels_differ_by_decades() -> None:
    """The error of a dead channel is relative to that channel's own gradient."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 6, 3)
    with torch.no_grad():
        model.weight *= torch.logspace(-12, 0, 6).view(-1, 1, 1, 1)
        model.bias.zero_()
    x = noise(2, 3, 6, 6)
    program = on_powers_of_two(calibrated(model, x))
    expected, found = gradients(program, "float", x), gradients(program, "exact", x)
    for name in ("weight", "bias"):
        error = (expected[name] - found[name]).flatten(1 if name == "weight" else 0)
        own = expected[name].abs().reshape(6, -1).amax(1)
        assert (error.reshape(6, -1).abs().amax(1) <= TOLERANCE * own).all()


@pytest.mark.parametrize("target", [None, aten.relu.default, aten.clamp.default, aten.hardtanh.default])
def test_gradient_bounds_are_those_of_fake_quantization_at_ties_and_edges(target: Any) -> None:
    """Every multiple of 1/8, ties of the grid included, and its neighbours in float32."""
    multiples = torch.arange(-400, 401) / 8
    y = torch.cat(
        [multiples, torch.nextafter(multiples, torch.tensor(1e9)), torch.nextafter(multiples, -multiples - 1)]
    )
    for zero_point in (0, 127, 128, 255):
        grid = Grid(torch.tensor(0.25), torch.tensor(zero_point), 0, 255)
        graph = torch.fx.Graph()
        arguments = (graph.placeholder("x"), *(() if target in (None, aten.relu.default) else (-6.0, 6.0)))
        nodes = () if target is None else (graph.call_function(target, arguments),)
        low, high = exact.gradient_bounds(nodes, grid)
        real = y.clone().requires_grad_()
        value = real if target is None else target(real, *arguments[1:])
        fake_quantize(value, grid.scale, grid.zero_point, 0, 255).sum().backward()
        steps = y / grid.scale
        assert torch.equal(real.grad, ((steps > low) & (steps < high)).float())


@pytest.mark.parametrize("name", ["0", "two.weight", "one.bias"])
def test_comparison_finds_a_planted_fault(name: str) -> None:
    program = net_program(BETWEEN[5][1])
    x = noise(2, 4, 8, 8)
    expected = gradients(program, "exact", x)
    planted = {**expected, name: expected[name] * (1 + 2 * TOLERANCE)}
    assert largest_error(expected, planted) > TOLERANCE


def test_comparison_finds_a_wrong_straight_through_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    program = net_program(BETWEEN[0][1])
    x = noise(2, 4, 8, 8)
    expected = gradients(program, "float", x)
    monkeypatch.setattr(exact, "gradient_bounds", lambda activations, out: (-1e9, 1e9))
    assert largest_error(expected, gradients(program, "exact", x)) > TOLERANCE
