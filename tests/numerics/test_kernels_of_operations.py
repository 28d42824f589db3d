"""The kernels that operations name: what they compute from a node's arguments, and which nodes they decline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import fx

from fxquant.lowering.lower import lower
from fxquant.numerics.codes import Codes, codes_from_integers
from fxquant.ops.base import Role
from fxquant.ops.elementwise import add_is_reversed
from fxquant.ops.kernels import GeneralKernel, Kernel, PairKernel, UnaryKernel
from fxquant.ops.table import TABLE
from tests.helpers import Builder
from tests.numerics.quantized_models import Case, Operator, bytes_of, differing, grid, random_cases, run, tensor

aten = torch.ops.aten
SHAPE, FULL = (3, 8, 7), (3, 8, 6)
CODES = bytes_of(1, 2, *SHAPE)


def call(target: Any, *args: Any, inputs: Sequence[tuple[int, ...]] = (SHAPE,), **kwargs: Any) -> fx.Node:
    """A call of an operation; "x0", "x1" ... among its args are inputs of these shapes, to which a batch is added."""
    build = Builder()
    nodes = {f"x{position}": build.input(f"x{position}", *shape) for position, shape in enumerate(inputs)}

    def filled(value: Any) -> Any:
        return [filled(item) for item in value] if isinstance(value, list) else nodes.get(value, value)

    return build.call(
        "y", target, *(filled(value) if isinstance(value, str | list) else value for value in args), **kwargs
    )


def kernel_of(node: fx.Node) -> Kernel:
    definition = TABLE.find(node)
    assert definition is not None and definition.kernel is not None
    return definition.kernel


def average(kernel: int, stride: int, pads: Sequence[int], counts: int = 0) -> Operator:
    attributes = {"kernel_shape": (kernel,) * 2, "strides": (stride,) * 2, "pads": pads, "count_include_pad": counts}
    return Operator("AveragePool", "QLinearAveragePool", attributes)


ADAPTIVE = {"kernel_shape": (2, 7), "strides": (2, 1)}
ONE = [
    (aten.avg_pool2d.default, ([2, 2],), average(2, 2, (0, 0, 0, 0))),
    (aten.avg_pool2d.default, ([3, 3], [2, 2], [1, 1]), average(3, 2, (1, 1, 1, 1), 1)),
    (aten.avg_pool2d.default, ([3, 3], [2, 2], [1, 1], False, False), average(3, 2, (1, 1, 1, 1))),
    (aten.avg_pool2d.default, ([3, 3], [2, 2], [0, 0], True), average(3, 2, (0, 0, 1, 0))),
    (aten.avg_pool2d.default, ([3, 3], [2, 2], [1, 1], True, False), average(3, 2, (1, 1, 2, 1))),
    (aten.adaptive_avg_pool2d.default, ([1, 1],), Operator("GlobalAveragePool", "QLinearGlobalAveragePool")),
    (aten.adaptive_avg_pool2d.default, ([4, 1],), Operator("AveragePool", "QLinearAveragePool", ADAPTIVE)),
    (aten.softmax.int, (-1,), Operator("Softmax", "QLinearSoftmax", {"axis": -1})),
    (aten._softmax.default, (1, False), Operator("Softmax", "QLinearSoftmax", {"axis": 1})),
    (aten.cat.default, (), Operator("Concat", "QLinearConcat", {"axis": 2})),
]


@pytest.mark.parametrize(("target", "args", "operator"), ONE, ids=lambda value: str(value)[:40])
def test_kernel_computes_what_onnxruntime_does_for_a_nodes_arguments(
    target: Any, args: tuple[Any, ...], operator: Operator
) -> None:
    joins = target is aten.cat.default
    node = call(target, *((["x0", "x0"], -2) if joins else ("x0", *args)))
    kernel = kernel_of(node)
    assert isinstance(kernel, GeneralKernel) and kernel.codes is not None and kernel.declines(node) == ""
    inputs = [CODES, CODES] if joins else [CODES]
    cases = random_cases(20, len(inputs), seed=2, decades=0.3)

    def formula(case: Case) -> torch.Tensor:
        assert kernel.codes is not None
        parts = [codes_from_integers(tensor(x), of) for x, of in zip(inputs, case.operands, strict=True)]
        return kernel.codes(node, [parts, -2] if joins else [parts[0], *args], case.out)

    assert differing(operator, inputs, cases, formula) == 0


def test_stack_and_choice_compute_what_onnxruntime_does() -> None:
    case = random_cases(1, 2, seed=3)[0]
    x, y = (codes_from_integers(tensor(CODES), of) for of in case.operands)
    joined = run(Operator("Concat", "QLinearConcat", {"axis": 0}), [CODES, CODES], [case])[0]
    stack = kernel_of(call(aten.stack.default, ["x0", "x1"], 0, inputs=(SHAPE, SHAPE)))
    assert isinstance(stack, GeneralKernel) and stack.codes is not None
    node = call(aten.stack.default, ["x0", "x1"], 0, inputs=(SHAPE, SHAPE))
    assert torch.equal(stack.codes(node, [[x, y], 0], case.out).flatten(0, 1), joined)
    condition = CODES > 99
    chosen = run(Operator("Where", "QLinearWhere", plain=(0,)), [condition, CODES, CODES], [case])[0]
    where = TABLE.find(_where())
    assert where is not None and isinstance(where.kernel, GeneralKernel) and where.kernel.codes is not None
    args: list[Codes | torch.Tensor] = [torch.from_numpy(condition), x, y]
    assert torch.equal(where.kernel.codes(_where(), args, case.out), chosen)


def _where(*, number: bool = False) -> fx.Node:
    build = Builder()
    mask, x, y = build.input("mask", *SHAPE, dtype=torch.bool), build.input("x", *SHAPE), build.input("y", *SHAPE)
    return build.call("z", aten.where.ScalarOther if number else aten.where.self, mask, x, 0.5 if number else y)


def test_functions_of_one_code_and_of_two_name_their_formulas() -> None:
    one = grid(0.1, 3)
    leaky = kernel_of(call(aten.leaky_relu.default, "x0", 0.5))
    assert isinstance(leaky, UnaryKernel) and leaky.codes_for is not None
    codes = leaky.codes_for(call(aten.leaky_relu.default, "x0", 0.5))
    assert codes(torch.tensor([1, 3, 9]), one, one).tolist() == [2, 3, 9]
    for target, operator in ((aten.add.Tensor, "QLinearAdd"), (aten.mul.Tensor, "QLinearMul")):
        kernel = kernel_of(call(target, "x0", "x1", inputs=(SHAPE, SHAPE)))
        assert isinstance(kernel, PairKernel) and kernel.codes is not None and kernel.operator == operator


DECLINED = [
    (call(aten.add.Tensor, "x0", 2.0), "two tensors"),
    (call(aten.mul.Scalar, "x0", 2.0), "two tensors"),
    (call(aten.add.Tensor, "x0", "x1", inputs=(SHAPE, SHAPE), alpha=2), "unscaled"),
    (_where(number=True), ""),
    (call(aten.avg_pool2d.default, "x0", [2, 2], [2, 2], [0, 0], False, True, 3), "divisor_override"),
    (call(aten.avg_pool2d.default, "x0", [3, 3], [2, 2], [1, 1], True), "a node of its own"),
    (call(aten.adaptive_avg_pool2d.default, "x0", [3, 7]), "differ in size"),
    (call(aten.softmax.int, "x0", -1, torch.float64), "cast first"),
    (call(aten._softmax.default, "x0", -1, False), ""),
    (call(aten.add.Tensor, "x0", "x1", inputs=(SHAPE, SHAPE)), ""),
    (call(aten.sigmoid.default, "x0"), ""),
    (call(aten.stack.default, ["x0", "x1"], 1, inputs=(SHAPE, SHAPE)), ""),
]


@pytest.mark.parametrize(("node", "reason"), DECLINED, ids=lambda value: str(value))
def test_kernel_declines_what_onnxruntime_computes_in_float(node: fx.Node, reason: str) -> None:
    found = kernel_of(node).declines(node)
    assert reason in found and bool(reason) == bool(found)


def test_every_operation_that_computes_on_activations_names_a_kernel() -> None:
    roles = (Role.COMPUTE, Role.FIXED_RANGE, Role.CONCAT, Role.WEIGHTED)
    missing = [definition.name for definition in TABLE if definition.role in roles and definition.kernel is None]
    assert missing == []


@pytest.mark.parametrize(
    ("first", "second", "is_reversed"),
    [(FULL, FULL, False), (FULL, (3, 1, 1), False), ((3, 1, 1), FULL, True), ((1, 8, 6), FULL, True)],
    ids=str,
)
def test_sum_is_emitted_with_the_operand_of_full_size_first(
    first: tuple[int, ...], second: tuple[int, ...], is_reversed: bool
) -> None:
    build = Builder()
    x, y = build.input("x", *first), build.input("y", *second)
    node = build.add("z", x, y)
    build.output(node)
    add = next(found for found in lower(build.program(), 21).graph if found.op_type == "Add")
    assert [value.name for value in add.inputs if value is not None] == (["y", "x"] if is_reversed else ["x", "y"])
    assert add_is_reversed(node, (2, *first), (2, *second)) == is_reversed


def test_sum_of_single_elements_is_reversed_by_onnxruntime() -> None:
    node = call(aten.add.Tensor, "x0", "x1", inputs=((1, 1), (1, 1)))
    assert add_is_reversed(node, (1, 1, 1), (1, 1, 1)) and not add_is_reversed(node, (2, 1, 1), (2, 1, 1))
