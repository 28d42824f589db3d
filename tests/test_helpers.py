"""The helpers of the tests tell right from wrong: each is given a planted fault."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage, ValueType
from fxquant.graph.rewriter import Rewriter
from tests import helpers
from tests.helpers import Builder, assert_golden, assert_rewrites, aten, relative_difference, residual_program, run_pass


@dataclass(frozen=True)
class Gate(Pass):
    """Put a sigmoid in the place of every relu."""

    name: ClassVar[str] = "gate"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    contract: ClassVar[Contract] = Contract.CHANGES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        for node in program.graph.nodes:
            if node.target is aten.relu.default:
                rewriter.set_target(node, aten.sigmoid.default)


RIGHT = """
    - relu = aten.relu(bn) : float32[s0, 4, 8, 8]  @relu
    + relu = aten.sigmoid(bn) : float32[s0, 4, 8, 8]  @relu
"""


def test_assert_rewrites_accepts_what_happened() -> None:
    entry = run_pass(Gate(), residual_program())
    assert_rewrites(entry, RIGHT, edits=1)
    assert_rewrites(run_pass(Gate(), program_without_relu()), "", edits=0)


def program_without_relu() -> Program:
    build = Builder()
    build.output(build.linear("fc", build.input("x", 4), 2))
    return build.program()


@pytest.mark.parametrize(
    "expected, edits",
    [
        (RIGHT, 2),
        ("", 1),
        (RIGHT.replace("sigmoid", "tanh"), 1),
        (RIGHT.replace("s0", "s1"), 1),
        ("\n".join(RIGHT.splitlines()[:2]), 1),
        ("\n".join(reversed(RIGHT.splitlines())), 1),
    ],
)
def test_assert_rewrites_refuses_what_did_not_happen(expected: str, edits: int) -> None:
    entry = run_pass(Gate(), residual_program())
    with pytest.raises(AssertionError):
        assert_rewrites(entry, expected, edits=edits)


def test_assert_golden_refuses_another_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "GOLDEN", tmp_path)
    monkeypatch.delenv("FXQUANT_UPDATE_GOLDEN", raising=False)
    with pytest.raises(FileNotFoundError):
        assert_golden("a\n", "new.txt")
    (tmp_path / "new.txt").write_text("a\nb\n")
    assert_golden("a\nb\n", "new.txt")
    for wrong in ("a\nb", "a\n", "a\nc\n", "a\nb\n\n"):
        with pytest.raises(AssertionError):
            assert_golden(wrong, "new.txt")


def test_assert_golden_writes_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "GOLDEN", tmp_path)
    monkeypatch.setenv("FXQUANT_UPDATE_GOLDEN", "1")
    assert_golden("a\n", "new.txt")
    assert (tmp_path / "new.txt").read_text() == "a\n"


def test_relative_difference_sees_a_small_change_and_refuses_another_shape() -> None:
    old = torch.tensor([1.0, -4.0])
    assert relative_difference(old, old) == 0.0
    assert relative_difference(old, torch.tensor([1.0, -4.1])) == pytest.approx(0.025, rel=1e-5)
    with pytest.raises(AssertionError):
        relative_difference(old, torch.zeros(2, 1))
    with pytest.raises(AssertionError):
        relative_difference(old, old.double())


def test_builder_finds_types_and_computes_what_they_say() -> None:
    program = residual_program()
    types = {node.name: node.meta.get("type") for node in program.graph.nodes}
    assert types["conv"] == ValueType(("s0", 4, 8, 8), torch.float32)
    assert types["mean"] == ValueType(("s0", 4), torch.float32)
    for batch in (1, 3):
        assert program.module(torch.ones(batch, 3, 8, 8)).shape == (batch, 5)


def test_builder_is_seeded() -> None:
    assert residual_program().fingerprint() == residual_program().fingerprint()
    build = Builder(seed=1)
    assert not torch.equal(build.random(4), Builder().random(4))
