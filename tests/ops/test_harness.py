"""The harness itself, with planted faults."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import fx, nn

from fxquant.errors import ExportError
from fxquant.lowering.lower import lower
from fxquant.ops.base import OpDef, OpTable, Role, Writer, table_of
from tests.ops import harness
from tests.ops.harness import assert_emits_like_torch, compare

aten = torch.ops.aten


def _add(node: fx.Node, w: Writer) -> ir.Value:
    like = w.dtype(node)
    result: ir.Value = w.op("Add", [w.operand(node.args[0], like), w.operand(node.args[1], like)])
    return result


def _sub(node: fx.Node, w: Writer) -> ir.Value:
    result: ir.Value = w.op("Sub", [w.operand(node.args[0]), w.operand(node.args[1])])
    return result


def _reshape(node: fx.Node, w: Writer) -> ir.Value:
    sizes: Any = node.args[1]
    result: ir.Value = w.op("Reshape", [w.operand(node.args[0]), w.sizes(sizes)])
    return result


def _size(node: fx.Node, w: Writer) -> ir.Value:
    index = node.args[1]
    assert isinstance(index, int)
    shape = w.op("Shape", [w.operand(node.args[0])])
    result: ir.Value = w.op("Gather", [shape, w.constant(np.array([index]))], axis=0)
    return result


def _split(node: fx.Node, w: Writer) -> tuple[ir.Value, ...]:
    result: tuple[ir.Value, ...] = w.op(
        "Split", [w.operand(node.args[0]), w.constant(np.array([1, 3]))], axis=1, outputs=2
    )
    return result


ADD = OpDef("add", (aten.add.Tensor,), Role.COMPUTE, _add)
RESHAPE = OpDef("reshape", (aten.reshape.default,), Role.GRID_PRESERVING, _reshape)
SIZE = OpDef("size", (aten.sym_size.int,), Role.INDEX, _size)
SPLIT = OpDef("split", (aten.split_with_sizes.default,), Role.GRID_PRESERVING, _split)


def _use(monkeypatch: pytest.MonkeyPatch, *definitions: OpDef) -> None:
    table: OpTable = table_of([definitions])
    monkeypatch.setattr(harness, "lower", lambda program, opset: lower(program, opset, table))


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, generator=generator), torch.randn(2, 4, generator=generator)


def test_harness_passes_when_emission_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, ADD)
    model = assert_emits_like_torch(lambda a, b: aten.add.Tensor(a, b), _inputs(), only="Add")
    assert [node.name for node in model.graph] == ["add"]
    assert model.graph.outputs[0].name == "output"


def test_harness_fails_when_the_operator_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, replace(ADD, emit=_sub))
    with pytest.raises(AssertionError, match="output 0"):
        assert_emits_like_torch(lambda a, b: aten.add.Tensor(a, b), _inputs())


def test_harness_fails_when_off_by_more_than_its_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    def emit(node: fx.Node, w: Writer) -> ir.Value:
        result: ir.Value = w.op("Add", [_add(node, w), w.constant(np.array(1e-4, np.float32))])
        return result

    _use(monkeypatch, replace(ADD, emit=emit))
    with pytest.raises(AssertionError, match="output 0"):
        assert_emits_like_torch(lambda a, b: aten.add.Tensor(a, b), _inputs())
    assert_emits_like_torch(lambda a, b: aten.add.Tensor(a, b), _inputs(), atol=1e-3)


def test_harness_fails_when_the_batch_is_baked_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def emit(node: fx.Node, w: Writer) -> ir.Value:
        result: ir.Value = w.op("Reshape", [w.operand(node.args[0]), w.constant(np.array([2, 2, 2]))])
        return result

    def function(x: torch.Tensor) -> Any:
        return aten.reshape.default(x, [x.shape[0], 2, 2])

    _use(monkeypatch, replace(RESHAPE, emit=emit), SIZE)
    with pytest.raises(Exception, match="Reshape|reshape"):
        assert_emits_like_torch(function, _inputs()[:1])
    _use(monkeypatch, RESHAPE, SIZE)
    assert_emits_like_torch(function, _inputs()[:1])


def test_harness_fails_when_the_dtype_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, replace(ADD, emit=lambda node, w: w.cast(_add(node, w), torch.float64)))
    with pytest.raises((AssertionError, Exception), match="dtype|[Tt]ype"):
        assert_emits_like_torch(lambda a, b: aten.add.Tensor(a, b), _inputs())


def test_harness_names_each_output_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, SPLIT, ADD)

    def function(x: torch.Tensor) -> Any:
        first, second = aten.split_with_sizes.default(x, [1, 3], 1)
        return aten.add.Tensor(first, second)

    model = assert_emits_like_torch(function, _inputs()[:1])
    assert [value.name for value in model.graph.node("split_with_sizes").outputs] == ["getitem", "getitem_1"]
    assert operator.getitem is not None


def test_harness_fails_when_parameters_are_swapped() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor([1.0, 2.0]))
            self.b = nn.Parameter(torch.tensor([3.0, 5.0]))

        def forward(self, x: torch.Tensor) -> Any:
            return aten.add.Tensor(aten.add.Tensor(x, self.a), self.a)

    module, x = Two(), torch.ones(2, 2)
    model = lower(harness.capture_for_test(module, (x,), [True]), 21, table_of([(ADD,)]))
    compare(module, model, [x], atol=0, rtol=0)
    assert "b" not in model.graph.initializers
    module.a.data += 1
    with pytest.raises(AssertionError, match="output 0"):
        compare(module, model, [x], atol=0, rtol=0)


def test_harness_reports_an_operator_that_the_opset_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, replace(ADD, emit=lambda node, w: w.op("Gelu", [w.operand(node.args[0])])))
    with pytest.raises(ExportError, match="Gelu from opset 20"):
        assert_emits_like_torch(lambda a, b: aten.add.Tensor(a, b), _inputs(), opset=19)
