"""The certificate is the largest sum that a channel can reach; what is beyond it is computed exactly all the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxquant
from fxquant.graph.manager import PassManager
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import Mode
from fxquant.passes import AssignSpecs, InsertFakeQuant, QuantizeBias, SelectPerChannel
from fxquant.simulation import Strategy, strategies
from fxquant.simulation.accumulate import EXACT_IN_FLOAT32, largest_sum
from tests.capture.nets import ConvNet
from tests.simulation.programs import calibrated, noise, outputs

weights = st.lists(st.integers(-127, 127), min_size=1, max_size=5)


def worst_by_force(weight: list[int], bias: int | None, low: int, high: int) -> int:
    """Largest magnitude of any partial sum, in any order, over all inputs at their bounds or 0."""
    worst = 0
    terms = len(weight) + (bias is not None)
    for xs in itertools.product((low, 0, high), repeat=len(weight)):
        products = [x * w for x, w in zip(xs, weight, strict=True)] + ([bias] if bias is not None else [])
        subsets = itertools.product((0, 1), repeat=terms)
        worst = max(worst, *(abs(sum(p for p, taken in zip(products, s, strict=True) if taken)) for s in subsets))
    return worst


@given(weights, st.none() | st.integers(-(2**23), 2**23), st.integers(-255, 0), st.integers(0, 255))
def test_largest_sum_is_the_worst_case(weight: list[int], bias: int | None, low: int, high: int) -> None:
    found = largest_sum(
        torch.tensor([weight], dtype=torch.float32),
        None if bias is None else torch.tensor([float(bias)]),
        float(low),
        float(high),
    )
    assert found == worst_by_force(weight, bias, low, high)


def test_largest_sum_is_that_of_the_worst_channel() -> None:
    weight = torch.tensor([[1.0, 2.0], [-100.0, -27.0], [3.0, -4.0]])
    assert largest_sum(weight, None, -10.0, 245.0) == 127 * 245
    assert largest_sum(weight, torch.tensor([0.0, 5.0, -9000.0]), -10.0, 245.0) == 127 * 245
    assert largest_sum(weight, torch.tensor([0.0, -5.0, -90000.0]), -10.0, 245.0) == 90000 + 4 * 245 + 3 * 10


@pytest.mark.parametrize("products", [1000, 70_000])
def test_largest_sum_is_exact_in_wide_layers(products: int) -> None:
    """Beyond 65,793 products float32 might round the sum of the weights' magnitudes."""
    codes = torch.randint(-127, 128, (3, products), generator=torch.Generator().manual_seed(0))
    positive, negative = codes.clamp(min=0).sum(1), -codes.clamp(max=0).sum(1)
    expected = torch.maximum(positive * 200 + negative * 55, negative * 200 + positive * 55).max()
    assert largest_sum(codes.float(), None, -55.0, 200.0) == float(expected)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_largest_sum_is_zero_without_channels_or_products(shape: tuple[int, int]) -> None:
    assert largest_sum(torch.zeros(shape), None, -1.0, 1.0) == 0.0


def planted(model: nn.Module, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> Program:
    """A program with these codes and scales of 1: outputs in float32 where the kernel can, else codes around 128."""
    program = calibrated(model, x)
    for node, module in program.fake_quant_nodes():
        module.mode = Mode.FROZEN
        module.scale.fill_(1.0)
        if node in program.graph.output_node().all_input_nodes:
            module.zero_point.fill_(128)
            module.mode = Mode.OFF if isinstance(model, nn.Linear) else Mode.FROZEN
        else:
            module.zero_point.fill_(0)
    with torch.no_grad():
        for parameter in program.module.parameters():
            parameter.copy_(bias if parameter.ndim == 1 else weight)
    return program


def only(program: Program, x: torch.Tensor) -> Strategy:
    (strategy,) = strategies(program, x).values()
    return strategy


def assert_forms_equal(program: Program, *inputs: torch.Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(outputs(program, "exact", *inputs), outputs(program, "integer", *inputs))


# 255 * 127 * 518 = 16,775,430; what is missing to 2^24 is the bias.
@pytest.mark.parametrize(("above", "parts"), [(-1, 1), (0, 1), (1, 2)])
def test_a_layer_at_the_edge_is_split_beyond_2_to_the_24(above: int, parts: int) -> None:
    bias = 2**24 - 255 * 127 * 518 + above
    weight = torch.full((2, 518), 127.0)
    x = torch.cat([torch.full((1, 518), 255.0), torch.randint(0, 256, (3, 518)).float()])
    program = planted(nn.Linear(518, 2), weight, torch.full((2,), float(bias)), x)
    strategy = only(program, x)
    assert (strategy.parts, strategy.largest) == (parts, EXACT_IN_FLOAT32 + above)
    assert_forms_equal(program, x)


def convolved_to_nothing(x: torch.Tensor, weight: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """The bias at which the first element of each channel's output is 0: an error of 1 shows in its code."""
    operation = nn.functional.conv1d if x.ndim == 3 else nn.functional.conv2d
    return -operation(x.double(), weight.double(), groups=groups)[0].flatten(1)[:, 0].float()


def wide(kind: str, width: int) -> tuple[Program, torch.Tensor]:
    """A layer that contracts `width` inputs, with nearly full-scale codes, and inputs for it."""
    generator = torch.Generator().manual_seed(width)
    shape = {"linear": (3, width), "conv": (3, width // 9, 3, 3)}[kind]
    weight = torch.randint(100, 128, shape, generator=generator).float()
    rows = (4, width) if kind == "linear" else (2, width // 9, 4, 4)
    x = torch.randint(200, 256, rows, generator=generator).float()
    if kind == "conv":
        # Signs at random: sums stay small, so that the bias can bring them to 0.
        weight *= torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0
    if kind == "linear":
        bias = torch.randint(-(2**20), 2**20, (3,), generator=generator).float()
        return planted(nn.Linear(width, 3), weight, bias, x), x
    return planted(nn.Conv2d(width // 9, 3, 3), weight, convolved_to_nothing(x, weight), x), x


@pytest.mark.parametrize(
    ("kind", "width", "parts"),
    [("linear", 450, 1), ("linear", 900, 2), ("linear", 1350, 3), ("linear", 1800, 4), ("linear", 9000, 0)]
    + [("conv", 900, 1), ("conv", 1800, 2), ("conv", 2700, 3), ("conv", 3600, 4), ("conv", 9000, 0)],
)
def test_sums_beyond_the_certificate_are_exact_in_parts_or_float64(kind: str, width: int, parts: int) -> None:
    program, x = wide(kind, width)
    assert only(program, x).parts == parts
    assert_forms_equal(program, x)


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_grouped_convolution_beyond_the_certificate_is_computed_in_float64(has_bias: bool) -> None:
    """Without the bias, the parts of its weight alone would be certified."""
    weight = torch.randint(100, 128, (4, 1200, 1), generator=torch.Generator().manual_seed(0)).float()
    x = torch.randint(200, 256, (2, 2400, 3), generator=torch.Generator().manual_seed(1)).float()
    bias = convolved_to_nothing(x, weight, 2) if has_bias else torch.zeros(4)
    program = planted(nn.Conv1d(2400, 4, 1, groups=2), weight, bias, x)
    assert only(program, x).parts == 0
    assert_forms_equal(program, x)


class Attention(nn.Module):
    """A product of two activations."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, y)


@pytest.mark.parametrize(("size", "parts"), [(257, 1), (259, 2), (700, 3), (2000, 0)])
def test_products_of_activations_are_certified_by_their_grids(size: int, parts: int) -> None:
    """Each product may reach 255^2: 258 of them are the last below 2^24."""
    x, y = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) for shape in ((3, size), (size, 2)))
    program = calibrated(Attention(), x, y)
    (strategy,) = strategies(program, x, y).values()
    assert (strategy.parts, strategy.largest) == (parts, size * 255**2)
    assert_forms_equal(program, x, y)


def test_products_of_activations_are_certified_by_the_farther_end_of_a_grid() -> None:
    """A zero point of 255: centred codes from -255 to 0."""
    x, y = (-torch.rand(shape, generator=torch.Generator().manual_seed(0)) for shape in ((3, 259), (259, 2)))
    program = calibrated(Attention(), x, y)
    (strategy,) = strategies(program, x, y).values()
    assert (strategy.parts, strategy.largest) == (2, 259 * 255**2)
    assert_forms_equal(program, x, y)


def test_gradients_are_the_same_in_parts() -> None:
    """All scales are 1: those of a linear layer on its codes."""
    program, x = wide("linear", 900)
    program.simulate = "exact"
    leaf = x.clone().requires_grad_()
    program.module(leaf).sum().backward()
    weight, bias = sorted(program.module.parameters(), key=lambda parameter: -parameter.ndim)
    assert leaf.grad is not None and weight.grad is not None and bias.grad is not None
    assert torch.allclose(leaf.grad, weight.detach().sum(0).expand_as(leaf), rtol=1e-6)
    assert torch.allclose(weight.grad, x.sum(0).expand_as(weight), rtol=1e-6)
    assert torch.equal(bias.grad, torch.full((3,), 4.0))


def test_comparison_finds_a_wrong_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all is taken for certified, sums beyond 2^24 are rounded on the way."""
    monkeypatch.setattr("fxquant.simulation.accumulate.EXACT_IN_FLOAT32", 2.0**40)
    program, x = wide("linear", 9000)
    with torch.no_grad():
        assert not torch.equal(outputs(program, "exact", x), outputs(program, "integer", x))


def test_strategies_leave_the_program_as_it_is() -> None:
    """Neither statistics nor grids move, and the mode stays."""
    torch.manual_seed(0)
    program = fxquant.capture(ConvNet(), noise(2, 3, 8, 8))
    PassManager([AssignSpecs(), SelectPerChannel(), InsertFakeQuant(), QuantizeBias()]).run(program)
    fxquant.calibrate(program, [(noise(2, 3, 8, 8),)], progress=False)
    program.module.train()
    with torch.no_grad():
        next(program.module.parameters()).mul_(2.0)
    before = {name: tensor.clone() for name, tensor in program.module.state_dict().items()}
    assert any(name.endswith("running_mean") for name in before)
    assert strategies(program, noise(2, 3, 8, 8))
    assert program.module.training and all(module.training for module in program.module.children())
    for name, tensor in program.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_strategies_print_what_they_are() -> None:
    assert str(Strategy(1, 2.0**23)) == "float32 (sums up to 8.389e+06, 0.50 of 2^24)"
    assert str(Strategy(3, 2.0**25)) == "float32 in 3 parts (sums up to 3.355e+07, 2.00 of 2^24)"
    assert str(Strategy(0, 2.0**27)) == "float64 (sums up to 1.342e+08, 8.00 of 2^24)"


def test_strategies_name_each_product_in_order() -> None:
    program = calibrated(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), noise(2, 4))
    assert [strategy.parts for strategy in strategies(program, noise(2, 4)).values()] == [1, 1]
