"""Barriers: what onnxruntime would rewrite silently, computed as the file says; and the rewrite, shown without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from fxquant.graph.program import Program
from fxquant.lowering.lower import lower
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.numerics.runtime import Level
from fxquant.spec import QuantSpec, Target
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


@dataclass(frozen=True)
class Changed:
    """How many output values onnxruntime's optimisations change by more than float rounding."""

    differing: int
    total: int

    def __str__(self) -> str:
        return f"{self.differing} of {self.total} values wrong"


def changed(program: Program, x: torch.Tensor, target: Target) -> Changed:
    """Level ALL against none, of the program's file for `target`."""
    program.target = target
    model = lower(program)
    plain, optimised = run_onnx(model, [x])[0], run_onnx(model, [x], Level.ALL)[0]
    return Changed(int(np.sum(np.abs(plain - optimised) > 1e-5)), plain.size)


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


def _two_quantizers_around(middle: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Program, torch.Tensor]:
    """Two grids, and between them what onnxruntime removes."""

    class Around(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return middle(x)

    program = program_of(Around(), image(8), values=True, weights=False)
    second = next(module for node, module in program.fake_quant_nodes() if node.args[0] is not program.node("x"))
    second.scale.mul_(1.37)
    return program, image(8, 3)


def _two_quantizers_around_a_product_with_one() -> tuple[Program, torch.Tensor]:
    return _two_quantizers_around(lambda x: x * 1.0)


def _two_quantizers_around_transpositions() -> tuple[Program, torch.Tensor]:
    return _two_quantizers_around(lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2))


def _two_quantizers_around_one_that_is_off() -> tuple[Program, torch.Tensor]:
    program, x = _two_quantizers_in_a_row()
    program.module.add_submodule("fake_quants.third", FakeQuant(U8))
    with program.graph.inserting_after(program.node("x_fq")):
        third = program.graph.create_node("call_module", "fake_quants.third", (program.node("x_fq"),), {}, name="off")
    third.meta = dict(program.node("x_fq").meta)
    program.node("second_fq").replace_input_with(program.node("x_fq"), third)
    program.recompile()
    fake_quant_of(program, "third").mode = Mode.OFF
    return program, x


class _Folded(nn.Module):
    """A layer, and around it what onnxruntime folds into it."""

    def __init__(self, layer: nn.Module, *, padding: bool = False, factor: bool = False, shift: bool = False) -> None:
        super().__init__()
        self.layer, self.padding = layer, padding
        self.factor = nn.Parameter(torch.rand(8, 1, 1) + 0.5) if factor else None
        self.shift = nn.Parameter(torch.randn(8, 1, 1)) if shift else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(nn.functional.pad(x, (1, 1, 1, 1)) if self.padding else x)
        x = x if self.factor is None else x * self.factor
        return x if self.shift is None else torch.relu(x + self.shift)


def _float_convolution_behind_a_pad() -> tuple[Program, torch.Tensor]:
    module = _Folded(nn.Conv2d(3, 8, 3, bias=False), padding=True)
    return program_of(module, image(8), values=True, weights=False), image(8, 3)


def _float_convolution_and_product() -> tuple[Program, torch.Tensor]:
    module = _Folded(nn.Conv2d(3, 8, 3), factor=True)
    return program_of(module, image(8), values=True, weights=False), image(8, 3)


def _float_convolution_and_sum() -> tuple[Program, torch.Tensor]:
    module = _Folded(nn.Conv2d(3, 8, 3, bias=False), shift=True)
    return program_of(module, image(8), values=True, weights=False), image(8, 3)


class _Product(nn.Module):
    """x w + b, spelled in one of several ways; `first` comes before it."""

    def __init__(self, spelling: str, first: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(32, 32)), nn.Parameter(torch.randn(32))
        self.spelling, self.first = spelling, first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.spelling == "addmm":
            return torch.addmm(self.shift, x, self.weight)
        if self.spelling == "transposed":
            return torch.matmul(x, self.weight.t())
        return torch.matmul(x, self.weight) + (self.shift if self.spelling == "sum" else 0.0)


def _product_program(module: nn.Module, *, on_grid: bool, weights: bool) -> tuple[Program, torch.Tensor]:
    x = torch.randn(16, 32)
    program = capture_for_test(module.eval(), (x,), [False])
    if weights:
        insert(program, program.node("weight"), QuantSpec(8, signed=True, symmetric=True))
    if on_grid:
        insert(program, program.node("x"), U8)
    if not weights:
        insert(program, [node for node in program.graph.nodes if node.op == "call_function"][-1], U8)
    program.recompile()
    calibrate_on(program, x)
    return program, x


def _weight_only_addmm() -> tuple[Program, torch.Tensor]:
    return _product_program(_Product("addmm"), on_grid=False, weights=True)


def _weight_only_product_with_a_transposition() -> tuple[Program, torch.Tensor]:
    return _product_program(_Product("transposed"), on_grid=False, weights=True)


def _product_behind_a_flattening() -> tuple[Program, torch.Tensor]:
    module = _Product("product", lambda x: torch.flatten(torch.reshape(x, (16, 4, 8)), 1))
    return _product_program(module, on_grid=True, weights=True)


def _product_behind_a_relu() -> tuple[Program, torch.Tensor]:
    return _product_program(_Product("product", torch.relu), on_grid=True, weights=True)


def _float_product_and_sum() -> tuple[Program, torch.Tensor]:
    return _product_program(_Product("sum"), on_grid=True, weights=False)


def _max_pool_behind_a_pad() -> tuple[Program, torch.Tensor]:
    class Padded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.max_pool2d(nn.functional.pad(x - 2.0, (1, 1, 1, 1)), 3)

    return program_of(Padded(), image(8), values=False, weights=False), image(8, 3)


def _average_pool_behind_a_pad() -> tuple[Program, torch.Tensor]:
    class Padded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.avg_pool2d(nn.functional.pad(x, (1, 1, 1, 1)), 3, 1)

    program = program_of(Padded(), image(8), values=True, weights=False)
    first, second = (module for _, module in program.fake_quant_nodes())
    second.scale.copy_(first.scale / 1.5)  # a mean of nine often lies halfway between two codes then
    return program, image(64, 3)


def _near_uniform_softmax() -> tuple[Program, torch.Tensor]:
    x = torch.randn(4, 6, 16) * 0.1
    return program_of(nn.Softmax(-1), x, values=True, weights=False), x


CASES: tuple[tuple[Callable[[], tuple[Program, torch.Tensor]], float], ...] = (
    (_float_convolution, 0.02),
    (_float_convolution_and_relu, 0.02),
    (_float_convolution_behind_a_pad, 0.02),
    (_float_convolution_and_product, 0.02),
    (_float_convolution_and_sum, 0.02),
    (_float_linear, 0.02),
    (_float_linear_of_fixed_rank_three, 0.02),
    (_float_product_and_sum, 0.02),
    (_float_bias, 0.0),
    (_weight_only_product, 0.9),
    (_weight_only_addmm, 0.9),
    (_weight_only_product_with_a_transposition, 0.9),
    (_product_behind_a_flattening, 0.9),
    (_product_behind_a_relu, 0.9),
    (_two_quantizers_in_a_row, 0.9),
    (_two_quantizers_around_a_product_with_one, 0.9),
    (_two_quantizers_around_transpositions, 0.9),
    (_two_quantizers_around_one_that_is_off, 0.9),
    (_max_pool_behind_a_pad, 0.2),
    (_average_pool_behind_a_pad, 0.0),
    (_near_uniform_softmax, 0.2),
)


@pytest.mark.parametrize(("case", "without"), CASES, ids=[case.__name__.strip("_") for case, _ in CASES])
def test_barrier_keeps_what_the_file_says_when_onnxruntime_optimises(
    case: Callable[[], tuple[Program, torch.Tensor]], without: float
) -> None:
    torch.manual_seed(0)
    program, x = case()
    guarded = changed(program, x, Target.ONNXRUNTIME_X64)
    assert guarded.differing == 0, f"with barriers: {guarded}"
    bare = changed(program, x, Target.OPENVINO)
    assert bare.differing > without * bare.total, f"without: {bare}"


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


def test_barrier_is_left_out_when_a_float_layer_reads_a_float_input() -> None:
    """The same layer on an input with a grid has one."""
    program = program_of(nn.Conv2d(3, 8, 3), image(8), values=True, weights=False)
    assert "Max" in {node.op_type for node in lower(program).graph}
    fake_quant_of(program, "input_1").mode = Mode.OFF
    assert "Max" not in {node.op_type for node in lower(program).graph}
    assert changed(program, image(8, 3), Target.ONNXRUNTIME_X64).differing == 0
