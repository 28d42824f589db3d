"""absorb-activation: the quantizer moves behind relu and clip, on a grid that lets onnxruntime remove them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxquant.graph.manager import PassManager
from fxquant.graph.program import output_spec
from fxquant.passes import AbsorbActivation, AssignSpecs
from fxquant.spec import Limits, QuantSpec
from tests.helpers import assert_golden, run_pass
from tests.passes.harness import captured, difference, output, reasons
from tests.passes.pipelines import IMAGE, before, residual


def net(activation: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 3), activation, nn.Conv2d(4, 4, 1))


@pytest.mark.parametrize(
    ("activation", "limits"),
    [
        (nn.ReLU(), Limits(0.0, None, 0)),
        (nn.ReLU6(), Limits(0.0, 6.0, 0)),
        (nn.Hardtanh(-2.0, 3.0), Limits(-2.0, 3.0)),
        (nn.Hardtanh(0.0, 1.0), Limits(0.0, 1.0, 0)),
    ],
)
def test_activation_is_absorbed_with_its_limits(activation: nn.Module, limits: Limits) -> None:
    program = before(AbsorbActivation, net(activation), IMAGE)
    run_pass(AbsorbActivation(), program)
    conv, clip = program.node("_0"), program.node("_1")
    spec = output_spec(clip)
    assert output_spec(conv) is None and spec is not None and spec.limits == limits
    assert program.node("_2").meta["input_specs"][0] == spec  # consumers want the same, else two specs would be wanted


def test_symmetric_signed_grid_keeps_its_zero_point() -> None:
    program = captured(net(nn.ReLU()), IMAGE)
    PassManager([AssignSpecs(activation=QuantSpec(signed=True, symmetric=True))]).run(program)
    run_pass(AbsorbActivation(), program)
    spec = output_spec(program.node("_1"))
    assert output_spec(program.node("_0")) is None and spec is not None and spec.limits == Limits()


class FanOut(nn.Module):
    """A convolution that is read by a relu and by an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        return torch.relu(y) + y


class Above(nn.Module):
    """A clip whose bounds leave out 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(self.conv(x), 1.0, 2.0)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (FanOut(), "relu not absorbed: conv has 2 users (relu, add)"),
        (Above(), "clamp not absorbed: its bounds [1, 2] leave out 0"),
    ],
)
def test_activation_is_declined_with_the_reason(model: nn.Module, reason: str) -> None:
    entry = run_pass(AbsorbActivation(), before(AbsorbActivation, model, IMAGE))
    assert reasons(entry) == [reason] and not entry.modified


def test_outputs_are_preserved_and_twice_is_once() -> None:
    model: Any = residual()
    program = before(AbsorbActivation, model, IMAGE)
    run_pass(AbsorbActivation(), program, IMAGE)
    assert difference(program, output(model, IMAGE), IMAGE) == 0.0
    assert not run_pass(AbsorbActivation(), program).modified


def test_diff_is_golden() -> None:
    program = before(AbsorbActivation, residual(), IMAGE)
    assert_golden(run_pass(AbsorbActivation(), program).diff(), "absorb_activation_residual.diff")
