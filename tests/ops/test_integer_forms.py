"""Which emissions onnxruntime runs on codes between Q and DQ, and that the roles say so.

Each function is lowered, its float inputs get a DequantizeLinear and its float outputs a QuantizeLinear in front of the
graph's inputs and outputs, and the optimised graph is read back: nothing of Q/DQ may be left in it, or all must be.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fxquant.lowering.lower import lower
from fxquant.ops.base import Role
from tests.ops.harness import _batched, _Call, capture_for_test
from tests.ops.inputs import bools, floats, integers, role_of

aten = torch.ops.aten
Function = Callable[..., Any]
Grid = tuple[float, int]

SAME: Grid = (0.05, 121)
OTHER: Grid = (0.09, 117)
QDQ = {"QuantizeLinear", "DequantizeLinear"}

X, Y = floats(2, 3, 4, 6), floats(2, 3, 4, 6, seed=1)
ROWS = integers(6, low=-4, high=4)
PLACES = integers(2, 3, 2, 6, low=0, high=4)

# Output codes are input codes: the outputs of the integer model must be torch's on the codes themselves.
MOVES: list[tuple[str, Function, tuple[torch.Tensor, ...]]] = [
    ("reshape", lambda x: aten.reshape.default(x, [x.shape[0], 12, 6]), (X,)),
    ("view-inferred", lambda x: aten.view.default(x, [-1, 8, 9]), (X,)),
    ("flatten", lambda x: aten.flatten.using_ints(x, 1), (X,)),
    ("unflatten", lambda x: aten.unflatten.int(x, 3, [2, 3]), (X,)),
    ("permute", lambda x: aten.permute.default(x, [0, 2, 3, 1]), (X,)),
    ("transpose", lambda x: aten.transpose.int(x, 1, 2), (X,)),
    ("squeeze", lambda x: aten.squeeze.dim(x, 1), (floats(2, 1, 4),)),
    ("unsqueeze", lambda x: aten.unsqueeze.default(x, 1), (X,)),
    ("expand", lambda x: aten.expand.default(x, [-1, 5, -1]), (floats(2, 1, 4),)),
    ("slice", lambda x: aten.slice.Tensor(x, 2, 1, 3), (X,)),
    ("narrow", lambda x: aten.narrow.default(x, 2, 1, 2), (X,)),
    ("select", lambda x: aten.select.int(x, 1, 0), (X,)),
    ("unbind", lambda x: aten.unbind.int(x, 1), (X,)),
    ("split", lambda x: aten.split.Tensor(x, 2, 3), (X,)),
    ("chunk", lambda x: aten.chunk.default(x, 3, 1), (X,)),
    ("chunk-partly-read", lambda x: aten.chunk.default(x, 3, 1)[1], (X,)),
    ("clone", lambda x: aten.clone.default(x), (X,)),
    ("to-same-dtype", lambda x: aten.to.dtype(x, torch.float32), (X,)),
    ("roll", lambda x: aten.roll.default(x, [1], [2]), (X,)),
    ("roll-two", lambda x: aten.roll.default(x, [1, -2], [1, 2]), (X,)),
    ("flip", lambda x: aten.flip.default(x, [1, -1]), (X,)),
    ("repeat", lambda x: aten.repeat.default(x, [1, 2, 1, 3]), (X,)),
    ("repeat-more-axes", lambda x: aten.repeat.default(x, [2, 1, 1, 1, 2]), (X,)),
    ("repeat_interleave", lambda x: aten.repeat_interleave.self_int(x, 3, 1), (X,)),
    ("unfold", lambda x: aten.unfold.default(x, 2, 2, 1), (X,)),
    ("pixel_shuffle", lambda x: aten.pixel_shuffle.default(x, 2), (floats(2, 8, 3, 5),)),
    ("pixel_unshuffle", lambda x: aten.pixel_unshuffle.default(x, 2), (X,)),
    ("channel_shuffle", lambda x: aten.channel_shuffle.default(x, 2), (floats(2, 6, 3, 3),)),
    ("index", lambda x, i: aten.index.Tensor(x, [None, None, i]), (X, ROWS)),
    ("index_select", lambda x, i: aten.index_select.default(x, 2, aten.abs.default(i) % 4), (X, ROWS)),
    ("gather", lambda x, i: aten.gather.default(x, 2, i), (X, PLACES)),
    ("amax", lambda x: aten.amax.default(x, [2, 3]), (X,)),
    ("amin", lambda x: aten.amin.default(x, [1], True), (X,)),
    ("max.dim", lambda x: aten.max.dim(x, 1)[0], (X,)),
    ("nearest", lambda x: aten.upsample_nearest2d.vec(x, None, [2.0, 2.0]), (X,)),
    ("nearest-size", lambda x: aten.upsample_nearest2d.vec(x, [8, 9], None), (X,)),
    ("nearest-exact", lambda x: aten._upsample_nearest_exact2d.vec(x, None, [2.0, 2.0]), (X,)),
]

COMPUTED: list[tuple[str, Role, Function, tuple[torch.Tensor, ...]]] = [
    ("add", Role.COMPUTE, lambda x, y: aten.add.Tensor(x, y), (X, Y)),
    ("add-broadcast", Role.COMPUTE, lambda x, y: aten.add.Tensor(x, y), (X, floats(4, 1))),
    ("multiply", Role.COMPUTE, lambda x, y: aten.mul.Tensor(x, y), (X, Y)),
    ("leaky_relu", Role.COMPUTE, lambda x: aten.leaky_relu.default(x), (X,)),
    ("where", Role.COMPUTE, lambda b, x, y: aten.where.self(b, x, y), (bools(2, 3, 4, 6), X, Y)),
    ("cat", Role.CONCAT, lambda x, y: aten.cat.default([x, y], 1), (X, Y)),
    ("stack", Role.CONCAT, lambda x, y: aten.stack.default([x, y], 1), (X, Y)),
    ("sigmoid", Role.FIXED_RANGE, lambda x: aten.sigmoid.default(x), (X,)),
    ("softmax", Role.FIXED_RANGE, lambda x: aten.softmax.int(x, -1), (X,)),
    ("softmax-inner", Role.FIXED_RANGE, lambda x: aten.softmax.int(x, 1), (X,)),
]

FLOAT: list[tuple[str, Function, tuple[torch.Tensor, ...]]] = [
    ("add-number", lambda x: aten.add.Tensor(x, 0.5), (X,)),
    ("multiply-number", lambda x: aten.mul.Tensor(x, 0.5), (X,)),
    ("subtract", lambda x, y: aten.sub.Tensor(x, y), (X, Y)),
    ("divide", lambda x, y: aten.div.Tensor(x, y), (X, Y)),
    ("maximum", lambda x, y: aten.maximum.default(x, y), (X, Y)),
    ("square", lambda x: aten.square.default(x), (X,)),
    ("power", lambda x: aten.pow.Tensor_Scalar(x, 2), (X,)),
    ("addcmul", lambda x, y: aten.addcmul.default(x, x, y), (X, Y)),
    ("tanh", lambda x: aten.tanh.default(x), (X,)),
    ("silu", lambda x: aten.silu.default(x), (X,)),
    ("gelu", lambda x: aten.gelu.default(x), (X,)),
    ("hardswish", lambda x: aten.hardswish.default(x), (X,)),
    ("glu", lambda x: aten.glu.default(x), (X,)),
    ("clamp_min", lambda x: aten.clamp_min.default(x, 0.5), (X,)),
    ("pad", lambda x: aten.pad.default(x, [1, 1, 1, 1]), (X,)),
    ("roll-apart", lambda x: aten.roll.default(x, [1, 1], [1, 3]), (X,)),
    ("repeat_interleave-batch", lambda x: aten.repeat_interleave.self_int(x, 3, 0), (X,)),
    ("im2col", lambda x: aten.im2col.default(x, [2, 3], [1, 1], [0, 0], [1, 1]), (X,)),
    ("index-two", lambda x, i: aten.index.Tensor(x, [None, i % 3, i]), (X, ROWS)),
    ("mean", lambda x: aten.mean.dim(x, [2, 3]), (X,)),
    ("sum", lambda x: aten.sum.dim_IntList(x, [1]), (X,)),
    ("topk", lambda x: aten.topk.default(x, 2)[0], (X,)),
    ("bilinear", lambda x: aten.upsample_bilinear2d.vec(x, None, False, [2.0, 2.0]), (X,)),
    ("antialiased", lambda x: aten._upsample_bilinear2d_aa.vec(x, [3, 4], False, None), (X,)),
]


def _ids(rows: list[Any]) -> list[str]:
    return [row[0] for row in rows]


def quantized(function: Function, inputs: tuple[torch.Tensor, ...], grid: Grid, opset: int = 21) -> onnx.ModelProto:
    """The model of `function` from uint8 codes on grid SAME to uint8 codes on `grid`."""
    program = capture_for_test(_Call(function).eval(), inputs, _batched(inputs, True))
    model: onnx.ModelProto = ir.serde.serialize_model(lower(program, opset))
    graph = model.graph
    before = [_coded(graph, value, SAME, "DequantizeLinear") for value in graph.input if _is_float(value)]
    after = [_coded(graph, value, grid, "QuantizeLinear") for value in graph.output if _is_float(value)]
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model


def _is_float(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.elem_type == TensorProto.FLOAT)


def _coded(graph: onnx.GraphProto, value: onnx.ValueInfoProto, grid: Grid, op_type: str) -> onnx.NodeProto:
    name, codes = value.name, f"{value.name}.codes"
    graph.initializer.append(numpy_helper.from_array(np.array(grid[0], np.float32), f"{name}.scale"))
    graph.initializer.append(numpy_helper.from_array(np.array(grid[1], np.uint8), f"{name}.zero"))
    value.name, value.type.tensor_type.elem_type = codes, TensorProto.UINT8
    source, result = (codes, name) if op_type == "DequantizeLinear" else (name, codes)
    return helper.make_node(op_type, [source, f"{name}.scale", f"{name}.zero"], [result], name=f"{name}.{op_type}")


def run(model: onnx.ModelProto, feeds: list[torch.Tensor], folder: Path) -> tuple[list[np.ndarray[Any, Any]], set[str]]:
    """Outputs, and the operator types of the graph that onnxruntime ran."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [found.name for found in session.get_inputs()]
    outputs = session.run(None, {name: feed.numpy() for name, feed in zip(names, feeds, strict=True)})
    return list(outputs), {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}


def _codes(x: torch.Tensor, grid: Grid = SAME) -> torch.Tensor:
    return (torch.round(x / torch.tensor(grid[0])) + grid[1]).clamp(0, 255).to(torch.uint8)


def _reals(codes: torch.Tensor) -> torch.Tensor:
    return (codes.float() - SAME[1]) * torch.tensor(SAME[0])


def _feeds(inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [_codes(x) if x.is_floating_point() else x for x in inputs]


@pytest.mark.parametrize(("name", "function", "inputs"), MOVES, ids=_ids(MOVES))
def test_grid_preserving_runs_on_codes(
    name: str, function: Function, inputs: tuple[torch.Tensor, ...], tmp_path: Path
) -> None:
    feeds = _feeds(inputs)
    outputs, kernels = run(quantized(function, inputs, SAME), feeds, tmp_path)
    assert not kernels & QDQ
    on_codes = [x.float() if x.dtype == torch.uint8 else x for x in feeds]
    expected = function(*on_codes)
    for got, want in zip(outputs, expected if isinstance(expected, (tuple, list)) else [expected], strict=True):
        np.testing.assert_array_equal(got, want.to(torch.uint8).numpy())
    assert role_of(function, inputs) is Role.GRID_PRESERVING


@pytest.mark.parametrize(("name", "role", "function", "inputs"), COMPUTED, ids=_ids(COMPUTED))
def test_compute_runs_in_an_integer_kernel(
    name: str, role: Role, function: Function, inputs: tuple[torch.Tensor, ...], tmp_path: Path
) -> None:
    grid = (1 / 256, 0) if role is Role.FIXED_RANGE else OTHER
    feeds = _feeds(inputs)
    (got,), kernels = run(quantized(function, inputs, grid), feeds, tmp_path)
    assert not kernels & QDQ
    expected = _codes(function(*[_reals(x) if x.dtype == torch.uint8 else x for x in feeds]), grid)
    assert np.abs(got.astype(int) - expected.numpy().astype(int)).max() <= 1
    assert role_of(function, inputs) is role


@pytest.mark.parametrize(("name", "function", "inputs"), FLOAT, ids=_ids(FLOAT))
def test_float_island_stays_in_float(
    name: str, function: Function, inputs: tuple[torch.Tensor, ...], tmp_path: Path
) -> None:
    _, kernels = run(quantized(function, inputs, OTHER), _feeds(inputs), tmp_path)
    assert kernels >= QDQ
    assert role_of(function, inputs) is Role.FLOAT


@pytest.mark.parametrize("number", [0.0, -3.3, -torch.inf, torch.finfo(torch.float32).min])
def test_where_with_a_number_runs_on_codes_and_saturates(number: float, tmp_path: Path) -> None:
    """onnxruntime quantizes the number too (its dummy DQ), and for infinities as well as for any other it is right."""

    def function(mask: torch.Tensor, x: torch.Tensor) -> Any:
        return aten.where.ScalarOther(mask, x, number)

    feeds = _feeds((bools(2, 3, 4, 6), X))
    (got,), kernels = run(quantized(function, (bools(2, 3, 4, 6), X), OTHER), feeds, tmp_path)
    assert "QLinearWhere" in kernels
    np.testing.assert_array_equal(got, _codes(function(feeds[0], _reals(feeds[1])), OTHER).numpy())


@pytest.mark.parametrize(("low", "high"), [(0.0, None), (0.0, 6.0)])
def test_clip_disappears_where_the_grid_ends_within_it(low: float, high: float | None, tmp_path: Path) -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> Any:
        total = aten.add.Tensor(x, y)
        return aten.relu.default(total) if high is None else aten.clamp.default(total, low, high)

    _, kernels = run(quantized(function, (X, Y), (6 / 255, 0)), _feeds((X, Y)), tmp_path)
    assert kernels == {"QLinearAdd"}
    _, wider = run(quantized(function, (X, Y), (7 / 255, 4)), _feeds((X, Y)), tmp_path)
    assert wider >= QDQ


def test_planted_fault_is_seen(tmp_path: Path) -> None:
    """Codes on another grid than the input's cannot be passed through: the check of left-over Q/DQ must notice."""
    _, kernels = run(quantized(lambda x: aten.flatten.using_ints(x, 1), (X,), OTHER), _feeds((X,)), tmp_path)
    assert kernels >= QDQ
