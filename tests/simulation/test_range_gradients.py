"""Learned ranges train in the exact form as in the float form, where both round alike; moving averages are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import FxquantError
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.simulation import learned_ranges
from fxquant.spec import SpecOverride
from tests.simulation.programs import CONFIG, calibrated, gradients, largest_error, noise, outputs
from tests.simulation.test_gradients import BETWEEN, TOLERANCE, Net, codes_alike

LEARNED = ("lsq", "lsq+", "min-max", "log2")
ROUNDED_APART = 1e-4  # u, up to 255, is rounded to 2^-17 of a step in either form, and rint(u) - u is below half a step
RANGES = ("range.scale", "range.low", "range.high", "range.log2_scale")


def learning(model: nn.Module, training: str, *inputs: torch.Tensor, weights: str | None = None) -> Program:
    """A program of `model`, calibrated, whose activations (and weights) have such ranges."""
    sim = fxquant.QuantSim(
        model.eval(),
        inputs,
        "int8_per_channel",
        activation=SpecOverride(training=training),
        weight=SpecOverride(training=weights or training),
    )
    fxquant.calibrate(sim.program, [inputs], progress=False)
    program: Program = sim.program
    return program


def quantizers(program: Program) -> list[FakeQuant]:
    return [module for _, module in program.fake_quant_nodes()]


def on_powers_of_two(program: Program) -> Program:
    """The same, begun on grids where both forms round alike: scales the next lower power of two, zero points even."""
    for module in {id(module): module for module in quantizers(program)}.values():
        module.scale.copy_(torch.exp2(torch.floor(torch.log2(module.scale))))
        module.zero_point.sub_(module.zero_point % 2)
        module.engage()
        before = module.scale.clone(), module.zero_point.clone()
        module.sync()
        assert torch.equal(module.scale, before[0]) and torch.equal(module.zero_point, before[1])
    return program


def range_names(found: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in found if name.endswith(RANGES)]


def assert_same_gradients(
    program: Program, *inputs: torch.Tensor, tolerance: float = TOLERANCE
) -> dict[str, torch.Tensor]:
    expected, found = gradients(program, "float", *inputs), gradients(program, "exact", *inputs)
    assert largest_error(expected, found) <= tolerance
    names = range_names(found)
    parameters = {
        name for name, one in program.module.named_parameters() if name.endswith(RANGES) and one.requires_grad
    }
    assert names and set(names) == parameters
    return found


def net_program(rest: Any, training: str) -> Program:
    torch.manual_seed(0)
    return on_powers_of_two(learning(Net(rest), training, 0.5 * noise(2, 4, 8, 8)))


@pytest.mark.parametrize("rest", [entry[1] for entry in BETWEEN], ids=[entry[0] for entry in BETWEEN])
def test_range_gradients_are_fake_quantization_s_behind(rest: Any) -> None:
    found = assert_same_gradients(net_program(rest, "lsq+"), noise(2, 4, 8, 8))
    scales = [name for name in range_names(found) if name.endswith("scale")]
    assert sum(bool((found[name] != 0).any()) for name in scales) >= len(scales) - 1


@pytest.mark.parametrize("training", LEARNED)
@pytest.mark.parametrize("name", ["relu6", "add-relu", "sigmoid", "layer-norm", "concat"])
def test_range_gradients_are_fake_quantization_s_for_every_parameter(name: str, training: str) -> None:
    assert_same_gradients(net_program(dict(BETWEEN)[name], training), noise(2, 4, 8, 8))


@pytest.mark.parametrize("name", ["relu", "add", "gelu"])
def test_range_gradients_are_fake_quantization_s_on_arbitrary_scales(name: str) -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        program = learning(Net(dict(BETWEEN)[name]), "lsq+", 0.5 * noise(1, 4, 8, 8, seed=seed))
        x = noise(1, 4, 8, 8, seed=seed)
        if codes_alike(program, x):
            assert_same_gradients(program, x, tolerance=ROUNDED_APART)
            return
    pytest.fail("no input was rounded alike")


def test_ranges_are_learned_where_nothing_else_is() -> None:
    """Neither weights nor inputs want a gradient: kernels may not spend what the range needs."""
    program = net_program(dict(BETWEEN)["relu"], "lsq")
    x, found = noise(2, 4, 8, 8), {}
    for name, parameter in program.module.named_parameters():
        parameter.requires_grad_(name.endswith(RANGES))
    for simulation in ("float", "exact"):
        program.module.zero_grad()
        outputs(program, simulation, x).square().sum().backward()
        found[simulation] = {name: p.grad.clone() for name, p in program.module.named_parameters() if p.requires_grad}
    for name, expected in found["float"].items():
        assert torch.allclose(found["exact"][name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())), name


@pytest.mark.parametrize("simulation", ["float", "exact"])
def test_training_ranges_lowers_the_loss(simulation: str) -> None:
    """Ranges begun eight times too small grow again."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), noise(4, 3, 8, 8)
    wanted = model(x).detach()
    program = learning(model, "log2", x)
    with torch.no_grad():
        for module in quantizers(program):
            module.range.log2_scale -= 3.0
    program.simulate = simulation
    ranges = [parameter for name, parameter in program.module.named_parameters() if name.endswith(RANGES)]
    optimizer, losses = torch.optim.Adam(ranges, lr=0.1), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (program.module(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


def test_nothing_is_kept_for_ranges_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    program = net_program(dict(BETWEEN)["relu"], "lsq")
    monkeypatch.setattr(learned_ranges, "_learn", lambda *parts: pytest.fail("the range was asked for"))
    with torch.no_grad():
        outputs(program, "exact", noise(2, 4, 8, 8))
    with torch.inference_mode():
        outputs(program, "exact", noise(2, 4, 8, 8))


def test_second_derivatives_of_a_learned_range_are_refused() -> None:
    program = net_program(dict(BETWEEN)["relu"], "lsq")
    for name, parameter in program.module.named_parameters():
        parameter.requires_grad_(name.endswith(RANGES))
    ranges = [parameter for parameter in program.module.parameters() if parameter.requires_grad]
    loss = outputs(program, "exact", noise(2, 4, 8, 8)).square().sum()
    with pytest.raises(FxquantError, match="first derivatives"):
        torch.autograd.grad(loss, ranges, create_graph=True)


@pytest.mark.parametrize("simulation", ["exact", "integer"])
def test_moving_averages_are_refused_in_training_mode(simulation: str) -> None:
    program = learning(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "moving-average", noise(2, 3, 6, 6), weights="static"
    )
    program.module.train()
    with pytest.raises(FxquantError, match=r"moving average of '.+'.*simulate = 'float'"):
        outputs(program, simulation, noise(2, 3, 6, 6))
    program.module.eval()
    before = [module.scale.clone() for module in quantizers(program)]
    outputs(program, simulation, 9 * noise(2, 3, 6, 6))
    assert all(torch.equal(module.scale, one) for module, one in zip(quantizers(program), before, strict=True))
    program.module.train()
    for module in quantizers(program):
        module.mode = Mode.FROZEN
    outputs(program, simulation, noise(2, 3, 6, 6))


FAULTS: list[tuple[str, Callable[..., Any]]] = [
    ("codes for units", lambda codes, units, *kept: learned_ranges.learn(codes, lambda *k: units(*k).round_(), *kept)),
    ("no range", lambda codes, units, *kept: codes),
    ("double", lambda codes, units, *kept: learned_ranges.learn(codes, lambda *k: units(*k) * 1.01, *kept)),
]


@pytest.mark.parametrize("fault", [entry[1] for entry in FAULTS], ids=[entry[0] for entry in FAULTS])
def test_comparison_finds_a_planted_fault(fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = net_program(dict(BETWEEN)["relu"], "lsq"), noise(2, 4, 8, 8)
    monkeypatch.setattr("fxquant.simulation.exact.learn", fault)
    with pytest.raises(AssertionError):
        assert_same_gradients(program, x)


class Joined(nn.Module):
    """Two convolutions, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.one(x), self.two(x)], 1)


def test_shared_ranges_get_gradients_of_all_readers(tmp_path: Path) -> None:
    """A concatenation's inputs are on its grid: one range, quantized at three places."""
    text = CONFIG.read_text(encoding="utf-8")
    for old, new in (("concat = false", "concat = true"), ("activation = { ", 'activation = { training = "lsq", ')):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    torch.manual_seed(0)
    x = noise(2, 3, 6, 6)
    pipeline = fxquant.load_pipeline(tmp_path / "config.toml")
    program = on_powers_of_two(calibrated(Joined(), 0.5 * x, pipeline=pipeline))
    calls = [fq for fq in quantizers(program) if fq is program.module.get_submodule("fake_quants.cat")]
    assert len(calls) == 3
    found = assert_same_gradients(program, x)
    assert float(found["fake_quants.cat.range.scale"]) != 0.0
