"""QLinearSigmoid, QLinearLeakyRelu, QLinearConcat, QLinearWhere: every code of many grids."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fxquant.numerics.codes import Grid
from fxquant.numerics.kernels.tables import leaky_relu, logistic, number_codes, on_grid, regrid, sigmoid
from fxquant.numerics.rounding import dequantize
from fxquant.numerics.runtime import Level, RuntimeOptions, optimised_graph
from tests.numerics.quantized_models import (
    Case,
    Operator,
    bytes_of,
    decades,
    differing,
    grid,
    random_cases,
    seeds,
    tensor,
    tied_cases,
)

Formula = Callable[[torch.Tensor, Grid, Grid], torch.Tensor]
SIGMOID = Operator("Sigmoid", "QLinearSigmoid")
CONCAT = Operator("Concat", "QLinearConcat", {"axis": 0})
WHERE = Operator("Where", "QLinearWhere", plain=(0,))
EVERY = np.arange(256, dtype=np.uint8)


def leaky(slope: float) -> Operator:
    return Operator("LeakyRelu", "QLinearLeakyRelu", {"alpha": slope})


def of(formula: Formula) -> Callable[[Case], torch.Tensor]:
    return lambda case: formula(tensor(EVERY), case.operands[0], case.out)


def unit_cases(count: int, seed: int) -> list[Case]:
    """Input grids around [-6, 6], output grids of [0, 1]."""
    scales = np.random.default_rng(seed).uniform(0.02, 0.08, count)
    return [Case((grid(scale, 128),), grid(1 / 255, 0)) for scale in scales]


def sigmoid_of_torch(x: torch.Tensor, of: Grid, out: Grid) -> torch.Tensor:
    return on_grid(torch.sigmoid(dequantize(x, of.scale, of.zero_point)), out)


def leaky_relu_in_codes(x: torch.Tensor, of: Grid, out: Grid) -> torch.Tensor:
    centred = (x - of.zero_point).to(torch.float32)
    steps = torch.where(centred >= 0, centred, centred * 0.01) * (of.scale / out.scale)
    return (torch.round(steps) + out.zero_point).clamp(out.qmin, out.qmax).to(torch.int64)


def regrid_by_ratio(x: torch.Tensor, of: Grid, out: Grid) -> torch.Tensor:
    steps = (x - of.zero_point).to(torch.float32) * (of.scale / out.scale)
    return (torch.round(steps) + out.zero_point).clamp(out.qmin, out.qmax).to(torch.int64)


def test_sigmoid_is_onnxruntimes() -> None:
    assert differing(SIGMOID, [EVERY], unit_cases(300, seed=1), of(sigmoid)) == 0


def test_sigmoid_of_torch_is_found_to_differ() -> None:
    assert differing(SIGMOID, [EVERY], unit_cases(300, seed=1), of(sigmoid_of_torch)) > 0


@given(seed=seeds, decades=decades)
def test_sigmoid_is_onnxruntimes_on_any_grids(seed: int, decades: float) -> None:
    assert differing(SIGMOID, [EVERY], random_cases(20, 1, seed, decades), of(sigmoid)) == 0


def test_sigmoid_is_onnxruntimes_on_narrow_grids() -> None:
    cases = [Case(case.operands, grid(1 / qmax, 0, qmax)) for case in unit_cases(20, 2) for qmax in (3, 7, 15, 127)]
    assert differing(SIGMOID, [EVERY], cases, of(sigmoid)) == 0


def test_logistic_function_saturates_and_is_odd_around_a_half() -> None:
    x = torch.linspace(-40, 40, 4001)
    found = logistic(x)
    assert float(found.min()) >= 0.0 and float(found.max()) == 1.0
    assert torch.allclose(found, torch.sigmoid(x.double()).float(), atol=3e-7, rtol=0)


@pytest.mark.parametrize("slope", [0.01, 0.1, 0.2, -0.5, 0.0, 3.0])
def test_leaky_relu_is_onnxruntimes(slope: float) -> None:
    cases = random_cases(200, 1, seed=3) + tied_cases(50, 1, 3.0, seed=4)
    assert differing(leaky(slope), [EVERY], cases, of(leaky_relu(slope))) == 0


def test_leaky_relu_in_codes_is_found_to_differ() -> None:
    assert differing(leaky(0.01), [EVERY], tied_cases(50, 1, 6.0, seed=4), of(leaky_relu_in_codes)) > 0


@given(seed=seeds, decades=decades, slope=st.floats(0.0, 1.0, width=32))
def test_leaky_relu_is_onnxruntimes_on_any_grids(seed: int, decades: float, slope: float) -> None:
    assert differing(leaky(slope), [EVERY], random_cases(20, 1, seed, decades), of(leaky_relu(slope))) == 0


@given(seed=seeds, decades=decades)
def test_concatenation_is_onnxruntimes_on_any_grids(seed: int, decades: float) -> None:
    cases = random_cases(20, 3, seed, decades)
    inputs = [EVERY, EVERY[::-1].copy(), bytes_of(seed, 1)]

    def joined(case: Case) -> torch.Tensor:
        return torch.cat([regrid(tensor(x), of, case.out) for x, of in zip(inputs, case.operands, strict=True)])

    assert differing(CONCAT, inputs, cases, joined) == 0


@given(seed=seeds, decades=decades)
def test_choice_is_onnxruntimes_on_any_grids(seed: int, decades: float) -> None:
    condition, chosen, other = bytes_of(seed, 5, 1, 7) > 99, bytes_of(seed + 1, 6, 1), bytes_of(seed + 2, 1, 6, 7)

    def choice(case: Case) -> torch.Tensor:
        first, second = (regrid(tensor(x), of, case.out) for x, of in zip((chosen, other), case.operands, strict=True))
        return torch.where(torch.from_numpy(condition), first, second)

    assert differing(WHERE, [condition, chosen, other], random_cases(20, 2, seed, decades), choice) == 0


@pytest.mark.parametrize("operator", [CONCAT, WHERE], ids=["concat", "where"])
def test_codes_times_a_ratio_are_found_to_differ(operator: Operator) -> None:
    """The same comparison with the formula finds no difference."""
    condition = EVERY % 3 == 0
    inputs = [EVERY, EVERY] if operator is CONCAT else [condition, EVERY, EVERY]

    def compute(move: Formula) -> Callable[[Case], torch.Tensor]:
        def codes(case: Case) -> torch.Tensor:
            first, second = (move(tensor(EVERY), of, case.out) for of in case.operands)
            return torch.cat([first, second]) if operator is CONCAT else torch.where(mask, first, second)

        mask = torch.from_numpy(condition)
        return codes

    cases = tied_cases(50, 2, 6.0, seed=5)
    assert differing(operator, inputs, cases, compute(regrid)) == 0
    assert differing(operator, inputs, cases, compute(regrid_by_ratio)) > 0


@pytest.mark.parametrize("number", [0.7, 1e-3, 3e5, -0.7, -1e-3, 0.0])
def test_number_beside_codes_has_the_code_and_grid_that_onnxruntime_gives_it(number: float) -> None:
    """Read from the QLinearWhere that onnxruntime made of Where(condition, dequantized codes, number)."""
    arrays = {"s": np.float32(0.1), "z": np.uint8(3), "number": np.float32(number)}
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "s", "z"], ["real"]),
        helper.make_node("Where", ["mask", "real", "number"], ["chosen"]),
        helper.make_node("QuantizeLinear", ["chosen", "s", "z"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("mask", TensorProto.BOOL, [8]),
        helper.make_tensor_value_info("x", TensorProto.UINT8, [8]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.UINT8, [8])
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]
    graph = helper.make_graph(nodes, "where", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    made = optimised_graph(model.SerializeToString(), RuntimeOptions(Level.ALL, threads=1)).graph
    (node,) = (node for node in made.node if node.op_type == "QLinearWhere")
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.initializer}
    code, scale, zero_point = (held[name].item() for name in node.input[4:7])
    found, of = number_codes(number, torch.device("cpu"))
    assert (int(found), float(of.scale), int(of.zero_point)) == (code, scale, zero_point)
