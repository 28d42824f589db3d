"""Barriers: what onnxruntime would rewrite silently, computed as the file says; and the rewrite, shown without them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from fxquant.graph.program import Program
from fxquant.lowering.lower import lower
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.numerics.runtime import Level
from fxquant.spec import Target
from tests.lowering.programs import (
    S8_PER_CHANNEL,
    U8,
    WEIGHTED,
    calibrate_on,
    fake_quant_of,
    float_program,
    image,
    insert,
)
from tests.ops.harness import capture_for_test, run_onnx


def changed(program: Program, x: torch.Tensor, target: Target) -> float:
    """Fraction of output values that onnxruntime's optimisations change by more than float rounding."""
    program.target = target
    model = lower(program)
    plain, optimised = run_onnx(model, [x])[0], run_onnx(model, [x], Level.ALL)[0]
    return float(np.mean(np.abs(plain - optimised) > 1e-5))


def program_of(module: nn.Module, x: torch.Tensor, *, values: bool, weights: bool, dynamic: bool = True) -> Program:
    """Quantize the input and the last value, and the weights (not the biases), as asked."""
    program = capture_for_test(module.eval(), (x[:2] if dynamic else x,), [dynamic])
    functions = [node for node in program.graph.nodes if node.op == "call_function"]
    layers = [node for node in functions if node.target in WEIGHTED]
    if weights:
        for node in layers:
            weight = node.args[1]
            assert isinstance(weight, torch.fx.Node)
            insert(program, weight, S8_PER_CHANNEL)
    if values:
        insert(program, next(node for node in program.graph.nodes if node.op == "placeholder"), U8)
        insert(program, functions[-1], U8)
    program.recompile()
    calibrate_on(program, x)
    return program


def _float_convolution() -> tuple[Program, torch.Tensor]:
    return program_of(nn.Conv2d(3, 8, 3, bias=False), image(8), values=True, weights=False), image(8, 3)


def _float_convolution_and_relu() -> tuple[Program, torch.Tensor]:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    return program_of(module, image(8), values=True, weights=False), image(8, 3)


def _float_linear() -> tuple[Program, torch.Tensor]:
    x = torch.randn(16, 32)
    return program_of(nn.Linear(32, 32), x, values=True, weights=False), x


def _float_linear_of_fixed_rank_three() -> tuple[Program, torch.Tensor]:
    x = torch.randn(4, 6, 32)
    return program_of(nn.Linear(32, 32), x, values=True, weights=False, dynamic=False), x


def _float_bias() -> tuple[Program, torch.Tensor]:
    return program_of(nn.Conv2d(3, 8, 3), image(32), values=True, weights=True), image(32, 3)


def _weight_only_product() -> tuple[Program, torch.Tensor]:
    x = torch.randn(4, 6, 32)
    return program_of(nn.Linear(32, 32, bias=False), x, values=False, weights=True), x


def _two_quantizers_in_a_row() -> tuple[Program, torch.Tensor]:
    class Flat(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.reshape(x, (-1, 192))

    program = float_program(Flat(), image())
    first = insert(program, program.node("x"), U8)
    program.module.add_submodule("fake_quants.second", FakeQuant(U8))
    with program.graph.inserting_after(first):
        second = program.graph.create_node("call_module", "fake_quants.second", (first,), {}, name="second_fq")
    second.meta = dict(first.meta)
    program.node("reshape").replace_input_with(first, second)
    program.recompile()
    calibrate_on(program, image(8))
    fake_quant_of(program, "second").scale.mul_(1.37)
    return program, image(8, 3)


def _near_uniform_softmax() -> tuple[Program, torch.Tensor]:
    x = torch.randn(4, 6, 16) * 0.1
    return program_of(nn.Softmax(-1), x, values=True, weights=False), x


CASES: tuple[tuple[Callable[[], tuple[Program, torch.Tensor]], float], ...] = (
    (_float_convolution, 0.02),
    (_float_convolution_and_relu, 0.02),
    (_float_linear, 0.02),
    (_float_linear_of_fixed_rank_three, 0.02),
    (_float_bias, 0.0),
    (_weight_only_product, 0.9),
    (_two_quantizers_in_a_row, 0.9),
    (_near_uniform_softmax, 0.2),
)


@pytest.mark.parametrize(("case", "without"), CASES)
def test_barrier_keeps_what_the_file_says_when_onnxruntime_optimises(
    case: Callable[[], tuple[Program, torch.Tensor]], without: float
) -> None:
    torch.manual_seed(0)
    program, x = case()
    assert changed(program, x, Target.ONNXRUNTIME_X64) == 0.0
    assert changed(program, x, Target.OPENVINO) > without


def test_barrier_is_left_out_when_nothing_would_be_rewritten() -> None:
    x = torch.randn(16, 32)
    free = program_of(nn.Linear(32, 32), x, values=False, weights=True)
    assert "Max" not in {node.op_type for node in lower(free).graph}
    only_input = program_of(nn.Conv2d(3, 8, 3), image(8), values=False, weights=True)
    assert "Max" not in {node.op_type for node in lower(only_input).graph}


@pytest.mark.parametrize(("spread", "is_kept_in_float"), [(0.1, True), (2.0, False)])
def test_softmax_runs_on_integers_unless_its_grid_is_too_fine(spread: float, is_kept_in_float: bool) -> None:
    torch.manual_seed(0)
    program = program_of(nn.Softmax(-1), torch.randn(4, 6, 16) * spread, values=True, weights=False)
    assert ("Max" in {node.op_type for node in lower(program).graph}) == is_kept_in_float
