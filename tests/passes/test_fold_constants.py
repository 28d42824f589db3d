"""fold-constants: expressions over parameters are computed once."""

from __future__ import annotations

import torch
from torch import nn

from fxquant.passes import FoldConstants
from tests.helpers import assert_rewrites, run_pass
from tests.passes.harness import captured, difference, output, reasons


class Normalized(nn.Module):
    """A linear layer with a normalized weight, a transposed one behind it, and a gathered bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.turned = nn.Parameter(torch.randn(4, 4))
        self.table = nn.Parameter(torch.randn(7))
        self.register_buffer("index", torch.tensor([0, 3, 3, 6]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight / self.weight.norm(dim=1, keepdim=True)
        return torch.matmul(nn.functional.linear(x, weight), self.turned.t()) + self.table[self.index]


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_expressions_become_buffers() -> None:
    program = captured(Normalized(), X)
    run_pass(FoldConstants(), program)
    assert [node.target for node in program.graph.nodes if str(node.target).startswith("folded.")] == [
        "folded.div.value",
        "folded.index_1.value",
    ]
    assert not [node for node in program.graph.nodes if "norm" in str(node.target)]


def test_view_of_a_parameter_is_declined_with_the_reason() -> None:
    entry = run_pass(FoldConstants(), captured(Normalized(), X))
    assert "not folded: it shows all of one parameter, and stays a weight" in reasons(entry)


def test_random_expression_is_not_folded() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.bernoulli(self.a.sigmoid() * 0)

    program = captured(Noise(), X)
    run_pass(FoldConstants(), program)
    assert [node for node in program.graph.nodes if "bernoulli" in str(node.target)]


def test_outputs_are_preserved_and_twice_is_once() -> None:
    model = Normalized()
    expected, program = output(model, X), captured(model, X)
    run_pass(FoldConstants(), program, X)
    assert difference(program, expected, X) < 1e-6
    assert not run_pass(FoldConstants(), program).modified


def test_nothing_is_done_to_a_plain_net() -> None:
    assert_rewrites(run_pass(FoldConstants(), captured(nn.Linear(4, 4), X)), "", 0)


def test_diff_holds_the_buffer_and_not_the_expression() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.a * 2.0

    entry = run_pass(FoldConstants(), captured(Scaled(), X))
    assert_rewrites(
        entry,
        """
        - a = get a : float32[4]
        - mul = aten.mul(a, other=2.0) : float32[4]
        - add = aten.add(x, mul) : float32[s0, 4]
        + mul_folded = get folded.mul.value : float32[4]
        + add = aten.add(x, mul_folded) : float32[s0, 4]
        """,
        len(entry.edits),
    )
