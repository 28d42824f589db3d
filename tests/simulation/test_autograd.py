"""The exact form under what autograd's users do: several forwards, inference mode, checkpoints, second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fxquant
from fxquant.errors import FxquantError
from fxquant.graph.program import Program
from fxquant.simulation import islands, tables
from tests.simulation.programs import calibrated, noise, outputs

X = noise(2, 3, 6, 6)


class Net(nn.Module):
    """A product, a table of one code, one of two, an operation by formula, an island, a product of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.one(x)
        b = F.gelu(a * torch.sigmoid(self.two(a)) + a)
        b = torch.matmul(b, torch.softmax(b.transpose(2, 3), -1))
        found: torch.Tensor = self.fc(b.mean((2, 3)))
        return found


def exact_program() -> Program:
    torch.manual_seed(0)
    program = calibrated(Net(), X)
    program.simulate = "exact"
    return program


def gradients_of(loss: torch.Tensor, program: Program) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(program.module.parameters())))


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def gradients_alone(x: torch.Tensor = X) -> list[torch.Tensor]:
    """Of one forward and backward of a fresh program, with nothing between them."""
    program = exact_program()
    return gradients_of(program.module(x).square().sum(), program)


def test_two_forwards_before_one_backward_add_their_gradients() -> None:
    program = exact_program()
    loss = program.module(X).square().sum() + program.module(-2 * X).square().sum()
    pairs = zip(gradients_alone(), gradients_alone(-2 * X), strict=True)
    for found, (one, other) in zip(gradients_of(loss, program), pairs, strict=True):
        torch.testing.assert_close(found, one + other)


def _forward(program: Program, folder: Path) -> None:
    with torch.no_grad():
        program.module(X)


def _parity(program: Program, folder: Path) -> None:
    path = folder / "model.onnx"
    fxquant.export_onnx(program, path)
    fxquant.check_parity(program, path, [X], simulation="exact", progress=False)


def _moved_grids(program: Program, folder: Path) -> None:
    """A step of training, and grids estimated anew."""
    with torch.no_grad():
        for _, module in program.fake_quant_nodes():
            module.scale.mul_(2.0)
            module.zero_point.add_(1)


@pytest.mark.parametrize("between", [_forward, _parity, _moved_grids])
def test_what_runs_between_forward_and_backward_does_not_change_gradients(
    tmp_path: Path, between: Callable[[Program, Path], None]
) -> None:
    program = exact_program()
    loss = program.module(X).square().sum()
    between(program, tmp_path)
    assert_equal(gradients_of(loss, program), gradients_alone())


@pytest.mark.parametrize("simulation", ["exact", "integer"])
def test_inference_mode_computes_the_same_and_training_follows_it(simulation: str) -> None:
    program = exact_program()
    with torch.inference_mode():
        found = outputs(program, simulation, X).clone()
        copied = outputs(program.copy(), simulation, X).clone()
    with torch.no_grad():
        assert torch.equal(found, outputs(program, simulation, X)) and torch.equal(found, copied)
    program.simulate = "exact"
    assert_equal(gradients_of(program.module(X).square().sum(), program), gradients_alone())


def test_a_program_made_in_inference_mode_is_computed_there() -> None:
    with torch.inference_mode():
        found = exact_program().module(X).clone()
    with torch.no_grad():
        assert torch.equal(found, exact_program().module(X))


def test_checkpointed_forwards_have_the_same_gradients_from_the_first_step() -> None:
    program = exact_program()
    found = checkpoint(program.module, X, use_reentrant=False)
    assert_equal(gradients_of(found.square().sum(), program), gradients_alone())


def test_tables_show_nothing_to_saved_tensor_hooks() -> None:
    program, seen = exact_program(), []
    for _ in range(2):
        packed: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, p=packed: p.append(t.shape) or t, lambda t: t):
            program.module(X)
        seen.append(packed)
    assert seen[0] == seen[1]


def test_derivatives_are_not_made_before_a_backward_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for module, name in ((tables, "_derivatives"), (islands, "_derivative")):
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, make=make, name=name: made.append(name) or make(*args))
    program = exact_program()
    loss = program.module(X).sum()
    assert not made
    gradients_of(loss, program)
    count = len(made)
    assert {"_derivatives", "_derivative"} == set(made)
    gradients_of(program.module(X).sum(), program)
    assert len(made) == count


class Squared(nn.Module):
    """One kernel whose second derivative is not 0."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        computed = {
            "product": lambda: self.layer(x),
            "matmul": lambda: torch.matmul(x, x.transpose(0, 1)),
            "pair": lambda: x * x,
            "unary": lambda: torch.sigmoid(x),
            "general": lambda: torch.softmax(x, -1),
        }
        found: torch.Tensor = computed[self.kind]()
        return found


@pytest.mark.parametrize("kind", ["product", "matmul", "pair", "unary", "general"])
def test_second_derivatives_are_refused(kind: str) -> None:
    x = noise(4, 4)
    program = calibrated(Squared(kind), x)
    leaf = x.clone().requires_grad_()
    found = outputs(program, "exact", leaf)
    with pytest.raises(FxquantError, match="first derivatives.*create_graph.*float"):
        torch.autograd.grad(found.square().sum(), leaf, create_graph=True)
    found = outputs(program, "float", leaf)
    (gradient,) = torch.autograd.grad(found.square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
    assert second.abs().max() > 0
