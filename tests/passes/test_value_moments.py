"""Moments of values behind folded batch norms: those of data, with sums of dependent values, or declined."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxquant.passes import FoldBatchNorm
from fxquant.passes.moments import Moments
from fxquant.passes.value_moments import Known, value_moments
from tests.helpers import run_pass
from tests.passes.harness import captured

Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
ROWS = 20_000


class Normed(nn.Module):
    """A function of two independent normal values y and z, and of a constant for each channel."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(3, 4)
        self.norm1, self.norm2 = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.constant = nn.Parameter(torch.tensor([-1.0, 0.5, 0.0, 2.0]))
        self.function = function

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.function(self.norm1(self.one(x)), self.norm2(self.two(other)), self.constant)


def found_and_sampled(function: Function) -> tuple[Known, torch.Tensor]:
    """What is known of function(y, z, c), and what it is for data of which the batch norms tell the moments."""
    torch.manual_seed(0)
    model, inputs = Normed(function).train(), (torch.randn(ROWS, 3), torch.randn(ROWS, 3))
    for norm in (model.norm1, model.norm2):
        norm.momentum = None
        nn.init.normal_(norm.bias)
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    with torch.no_grad():
        model(*inputs)
        sampled = model.eval()(*inputs).double()
    program = captured(model, *inputs)
    run_pass(FoldBatchNorm(), program)
    output = next(node for node in program.graph.nodes if node.op == "output")
    return value_moments(program)[output.all_input_nodes[0]], sampled


KNOWN: dict[str, Function] = {
    "relu": lambda y, z, c: torch.relu(y),
    "relu of a value and itself": lambda y, z, c: torch.relu(y + y),
    "relu of a value and its multiple": lambda y, z, c: torch.relu(y + 2 * y),
    "relu of a value less a part of it": lambda y, z, c: torch.relu(y - 0.7 * (y - 1.0)),
    "relu of a value less itself": lambda y, z, c: torch.relu(y - y + 0.5),
    "relu of sums of sums": lambda y, z, c: torch.relu((y + z) - (0.5 * y - z)),
    "relu of a difference of layers": lambda y, z, c: torch.relu(y - 0.5 * z),
    "sum with alpha": lambda y, z, c: torch.relu(torch.add(y, z, alpha=3)),
    "negative": lambda y, z, c: torch.relu(-y),
    "number less a value": lambda y, z, c: torch.relu(1 - y),
    "number less a multiple": lambda y, z, c: torch.relu(torch.rsub(y, 2, alpha=3)),
    "constant less a value": lambda y, z, c: torch.relu(c - y),
    "constant less a multiple": lambda y, z, c: torch.relu(torch.rsub(y, c, alpha=3)),
    "constant and a multiple": lambda y, z, c: torch.relu(torch.add(c, y, alpha=2)),
    "value and a multiple of a constant": lambda y, z, c: torch.relu(torch.add(y, c, alpha=2)),
    "value less a multiple of a constant": lambda y, z, c: torch.relu(torch.sub(y, c, alpha=2)),
    "constant times a value": lambda y, z, c: F.silu(c * y),
    "relu of a relu": lambda y, z, c: torch.relu(torch.relu(y)),
    "relu6 of a relu": lambda y, z, c: F.relu6(torch.relu(3 * y)),
    "relu of a relu6": lambda y, z, c: torch.relu(F.relu6(3 * y)),
    "clip of a clip": lambda y, z, c: F.hardtanh(F.hardtanh(y, -1.0, 0.5), -0.5, 2.0),
    "clip of clips beside it": lambda y, z, c: F.hardtanh(F.hardtanh(y, -1.0, 0.0), 0.5, 2.0),
}
MEAN_ALONE: dict[str, Function] = {
    "value less its relu": lambda y, z, c: y - torch.relu(y),
    "two functions of a value": lambda y, z, c: F.silu(y) + torch.sigmoid(y - 1),
    "flattened twice": lambda y, z, c: y.flatten(1) + torch.relu(y),
}


@pytest.mark.parametrize("case", KNOWN | MEAN_ALONE)
def test_moments_are_those_of_data(case: str) -> None:
    found, sampled = found_and_sampled((KNOWN | MEAN_ALONE)[case])
    assert isinstance(found, Moments), found
    spread = sampled.std(0)
    assert bool(((found.mean - sampled.mean(0)).abs() < 0.03 * spread + 5e-3).all()), (found.mean, sampled.mean(0))
    if case in MEAN_ALONE:
        assert found.std is None
    else:
        assert found.std is not None
        assert bool(((found.std - spread).abs() < 0.03 * spread + 5e-3).all()), (found.std, spread)


DEVIATION, NORMAL = "the deviation of what {} reads is not known", "what {} reads is no normal variable"
DECLINED: dict[str, tuple[Function, str]] = {
    "value less its relu": (lambda y, z, c: torch.relu(y - torch.relu(y)), DEVIATION.format("relu_1")),
    "two functions of a value": (lambda y, z, c: torch.tanh(F.silu(y) + y), DEVIATION.format("tanh")),
    "functions of sums": (lambda y, z, c: F.silu(torch.relu(y + z) + z), DEVIATION.format("silu")),
    "parts side by side": (
        lambda y, z, c: torch.relu(torch.cat([y, z], 1) + torch.cat([y, y], 1)),
        DEVIATION.format("relu"),
    ),
    "rectified and shifted": (lambda y, z, c: torch.relu(torch.relu(y) - 0.5), NORMAL.format("relu_1")),
    "rectified and scaled": (lambda y, z, c: F.relu6(2 * F.relu6(y)), NORMAL.format("hardtanh_1")),
    "smooth behind relu": (lambda y, z, c: F.silu(torch.relu(y)), NORMAL.format("silu")),
    "leaky behind relu": (lambda y, z, c: F.leaky_relu(torch.relu(y)), NORMAL.format("leaky_relu")),
    "relu behind smooth": (lambda y, z, c: torch.relu(F.silu(y)), NORMAL.format("relu")),
    "sum of rectified": (lambda y, z, c: torch.relu(torch.relu(y) + torch.relu(z) - 1), NORMAL.format("relu_2")),
    "rectified beside normal": (lambda y, z, c: torch.relu(torch.cat([torch.relu(y), z], 1)), NORMAL.format("relu_1")),
    "product": (lambda y, z, c: y * z, "mul multiplies or divides two values: the mean of a product is not"),
    "quotient": (lambda y, z, c: y / z, "div multiplies or divides two values: the mean of a product is not"),
    "divided": (lambda y, z, c: c / y, "nothing is known of the mean behind div"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_is_not_known_is_declined_with_the_reason(case: str) -> None:
    function, reason = DECLINED[case]
    found, _ = found_and_sampled(function)
    assert isinstance(found, str) and found.startswith(reason), found


def test_shortcut_of_another_layer_counts_as_independent() -> None:
    found, sampled = found_and_sampled(lambda y, z, c: torch.relu(torch.relu(y) + z))
    assert isinstance(found, Moments)
    assert float((found.mean - sampled.mean(0)).abs().max()) < 0.1 * float(sampled.std(0).max())


class Residual(nn.Module):
    """Blocks relu(f(x) + x), with batch norms in f."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if index == 0 else 16, 16, 3, padding=1) for index in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16, momentum=None) for _ in self.convs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norms[0](self.convs[0](x)))
        for index in (1, 3):
            y = torch.relu(self.norms[index](self.convs[index](x)))
            x = torch.relu(self.norms[index + 1](self.convs[index + 1](y)) + x)
        return x


def test_mean_behind_residual_blocks_is_near_that_of_data() -> None:
    torch.manual_seed(0)
    model, x = Residual().train(), torch.randn(32, 3, 16, 16)
    with torch.no_grad():
        model(x)
        sampled = model.eval()(x).double().mean((0, 2, 3))
    program = captured(model, x)
    run_pass(FoldBatchNorm(), program)
    found = value_moments(program)[program.node("relu_4")]
    assert isinstance(found, Moments), found
    assert float((found.mean - sampled).norm() / sampled.norm()) < 0.12


def test_value_whose_axes_are_counted_from_elsewhere_is_declined() -> None:
    found, _ = found_and_sampled(lambda y, z, c: y + torch.relu(z).reshape(1, ROWS, 4))
    assert isinstance(found, str)
    found, _ = found_and_sampled(lambda y, z, c: torch.relu(y) + c.reshape(1, 1, 4))
    assert found == "add gives its input more axes, of which another may be the channels'"
