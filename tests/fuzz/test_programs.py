"""Random programs agree with onnxruntime in every certified code; planted faults are found, and shrink to one layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings

import fxquant
from fxquant.graph.program import Program
from fxquant.numerics.codes import Grid
from fxquant.numerics.runtime import Level
from fxquant.simulation import certification, integer
from fxquant.simulation.certification import Platform
from tests.fuzz.check import REFUSALS, Outcome, Plan, Verdict, check_program
from tests.fuzz.description import Description
from tests.fuzz.draw import descriptions, draw_description, random_choices, random_description
from tests.fuzz.judge import why_void
from tests.fuzz.shrink import Record, shrink
from tests.parity.files import change_code, plant

QUICK = settings(
    max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
SLOW_BLOCKS, BLOCK = 6, 25
INTEGER_ALONE = Plan(("integer",), (Level.ALL,), batches=1)


@dataclass
class Seen:
    """What a test has seen of the programs that it took."""

    programs: int = 0
    refused: int = 0
    compared: int = 0

    def add(self, outcome: Outcome) -> None:
        """Count one program."""
        self.programs += 1
        self.refused += outcome.verdict is Verdict.REFUSED
        self.compared += outcome.codes.compared

    def assert_telling(self) -> None:
        """Codes were compared, and few programs refused: else the absence of faults would say nothing."""
        assert not (reason := why_void(self.programs, self.refused, self.compared)), reason


def assert_good(description: Description, seen: Seen) -> None:
    """Nothing crashed and nothing differs; else the failure with the description that repeats it."""
    outcome = check_program(description)
    assert not outcome.verdict.is_bad, f"{outcome.key}\n{outcome.text}\n{description}\n{description.to_json()}"
    assert outcome.codes.differing == 0 and outcome.codes.inherited == 0
    seen.add(outcome)


def assert_random_programs_good() -> None:
    """The programs of hypothesis, all of them judged at the end."""
    seen = Seen()

    @QUICK
    @given(descriptions())
    def check(description: Description) -> None:
        assert_good(description, seen)

    check()
    seen.assert_telling()


def test_random_program_agrees_with_onnxruntime() -> None:
    assert_random_programs_good()


@pytest.mark.parametrize("block", [1, 2, 4])
def test_random_program_agrees_with_onnxruntime_when_weights_are_in_blocks(block: int) -> None:
    seen = Seen()
    for number in range(2 * block, 2 * block + 2):
        drawn = random_description(4, number)
        assert_good(replace(drawn, recipe=replace(drawn.recipe, block=block)), seen)
    seen.assert_telling()


def test_programs_that_are_all_refused_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(program: Program, path: Path) -> Path:
        raise fxquant.errors.ExportError("its int32 accumulator may reach 3e9")

    monkeypatch.setattr(fxquant, "export_onnx", refuse)
    with pytest.raises(AssertionError, match="no code of 25 programs was compared"):
        assert_random_programs_good()


def test_programs_none_of_whose_tensors_is_certified_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certification, "here", lambda: Platform("0.0.0", "unknown"))
    seen = Seen()
    with pytest.raises(AssertionError, match="no code of 3 programs was compared"):
        for number in range(3):
            assert_good(random_description(0, number), seen)
        seen.assert_telling()


@pytest.mark.parametrize(
    ("programs", "refused", "compared", "why"),
    [
        (25, 0, 0, "no code of 25 programs was compared"),
        (25, 3, 900, "3 of 25 programs were refused, more than 10%"),
        (25, 2, 900, ""),
        (10, 1, 900, ""),
        (3, 1, 900, "1 of 3 programs were refused, more than 10%"),
    ],
)
def test_run_shows_nothing_when_too_little_was_compared(programs: int, refused: int, compared: int, why: str) -> None:
    assert why_void(programs, refused, compared) == why


@pytest.mark.slow
@pytest.mark.parametrize("block", range(SLOW_BLOCKS))
def test_random_programs_agree_with_onnxruntime_when_there_are_many(block: int) -> None:
    seen = Seen()
    for number in range(block * BLOCK, (block + 1) * BLOCK):
        assert_good(random_description(0, number), seen)
    seen.assert_telling()


def rounds_wrongly(accumulator: torch.Tensor, multiplier: torch.Tensor, out: Grid) -> torch.Tensor:
    """Requantization as (int)(x + 0.5), which rounds negative numbers up."""
    scaled = accumulator.to(torch.float32) * multiplier
    low, high = float(out.qmin - out.zero_point), float(out.qmax - out.zero_point)
    return torch.trunc(scaled.clamp(low, high) + 0.5).to(torch.int64) + out.zero_point


def is_found(description: Description) -> bool:
    """Whether the integer simulation of a program differs from onnxruntime."""
    return check_program(description, INTEGER_ALONE).verdict is Verdict.FAULT


def first_failure(fails: Callable[[Description], bool], most: int = 40) -> Record:
    """The choices of the first of `most` programs that fails."""
    for number in range(most):
        record = Record(random_choices(0, number))
        if fails(draw_description(record)):
            return record
    raise AssertionError(f"none of {most} programs fails")


def test_wrong_rounding_of_a_kernel_is_found_and_shrinks_to_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "requantize", rounds_wrongly)
    shrunk, _ = shrink(tuple(first_failure(is_found).choices), is_found)
    assert len(shrunk.layers) == 1, shrunk
    outcome = check_program(shrunk, INTEGER_ALONE)
    assert outcome.text.startswith(("QLinear", "QGemm", "Reshape+QGemm")) and outcome.codes.differing > 0, outcome.text
    monkeypatch.undo()
    assert check_program(shrunk, INTEGER_ALONE).verdict is Verdict.PASSED


def test_hypothesis_shrinks_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "requantize", rounds_wrongly)
    few = settings(QUICK, max_examples=300)
    shrunk = find(descriptions(), is_found, settings=few)
    assert len(shrunk.layers) == 1, shrunk


def test_corrupt_weight_code_is_found_and_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    export = fxquant.export_onnx

    def corrupt(program: Program, path: Path) -> Path:
        weights = [node for node, module in program.fake_quant_nodes() if module.follows]
        export(program, path)
        return plant(path, change_code(f"{weights[0].args[0]}.codes", -1)).replace(path) if weights else path

    monkeypatch.setattr(fxquant, "export_onnx", corrupt)
    shrunk, _ = shrink(tuple(first_failure(is_found).choices), is_found)
    assert len(shrunk.layers) == 1, shrunk
    assert check_program(shrunk, INTEGER_ALONE).text.startswith("stored: ")


def test_error_without_a_guard_is_a_crash_and_a_guard_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    description = random_description(0, 0)
    for error, verdict, text in (
        (RuntimeError("boom"), Verdict.CRASHED, "RuntimeError: boom"),
        (fxquant.FxquantError("no"), Verdict.CRASHED, "no"),
        (fxquant.errors.ExportError("its int32 accumulator may reach 3e9"), Verdict.REFUSED, next(iter(REFUSALS))),
    ):

        def refuse(program: Program, path: Path, error: Exception = error) -> Path:
            raise error

        monkeypatch.setattr(fxquant, "export_onnx", refuse)
        outcome = check_program(description, INTEGER_ALONE)
        assert (outcome.verdict, outcome.stage) == (verdict, "export")
        assert text in outcome.text
