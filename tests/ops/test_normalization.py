"""Normalization against torch, at the opsets where its form differs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxquant.errors import ExportError
from fxquant.graph.module import ProgramModule
from fxquant.graph.program import Program, ValueType
from fxquant.lowering.lower import lower
from fxquant.ops.base import Role
from fxquant.ops.table import TABLE
from tests.ops.harness import assert_emits_like_torch, compare

aten = torch.ops.aten
OPSETS = pytest.mark.parametrize("opset", [13, 17, 21])


class Affine(nn.Module):
    """`function(x, weight, bias)` with random parameters; either may be None."""

    def __init__(self, function: Any, weight: tuple[int, ...] | None, bias: tuple[int, ...] | None) -> None:
        super().__init__()
        self.function = function
        self.weight = None if weight is None else nn.Parameter(torch.randn(weight))
        self.bias = None if bias is None else nn.Parameter(torch.randn(bias))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, self.weight, self.bias)


def program_of(module: nn.Module, x: torch.Tensor) -> Program:
    """A program that calls `module` on its one input; axis 0 is the batch."""
    root, graph = nn.Module(), fx.Graph()
    root.add_module("layer", module)
    source = graph.placeholder("x")
    called = graph.call_module("layer", (source,))
    for node in (source, called):
        node.meta["type"] = ValueType(("s0", *x.shape[1:]), x.dtype)
    graph.output(called)
    return Program(ProgramModule(root.eval(), graph))


def _trained(norm: nn.Module, x: torch.Tensor) -> nn.Module:
    norm.train()(x * 3 + 1)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm.eval()


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4, eps=1e-3), (3, 4)),
        (nn.BatchNorm1d(4), (3, 4, 5)),
        (nn.BatchNorm2d(4, affine=False), (3, 4, 5, 5)),
        (nn.BatchNorm3d(4), (3, 4, 2, 3, 3)),
    ],
)
@OPSETS
def test_batch_norm_module_is_torchs(norm: nn.Module, shape: tuple[int, ...], opset: int) -> None:
    x = torch.randn(shape)
    trained = _trained(norm, x)
    model = lower(program_of(trained, x), opset)
    assert "BatchNormalization" in [node.op_type for node in model.graph]
    compare(trained, model, [x], atol=1e-5, rtol=1e-5)
    compare(trained, model, [x[:1]], atol=1e-5, rtol=1e-5)


def test_batch_norm_without_statistics_is_refused() -> None:
    norm, x = nn.BatchNorm1d(4, track_running_stats=False), torch.randn(3, 4)
    with pytest.raises(ExportError, match="its batch's own statistics"):
        lower(program_of(norm, x))


def test_batch_norm_function_is_torchs() -> None:
    x = torch.randn(2, 4, 3, 3)
    assert_emits_like_torch(_trained(nn.BatchNorm2d(4), x), (x,), only="BatchNormalization", atol=1e-5)
    assert_emits_like_torch(_trained(nn.BatchNorm2d(4, affine=False), x), (x,), atol=1e-5)


@pytest.mark.parametrize("module", [nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.5)])
def test_dropout_module_is_the_identity(module: nn.Module) -> None:
    x = torch.randn(2, 3, 4, 4)
    program = program_of(module, x)
    compare(nn.Identity(), lower(program), [x], atol=0, rtol=0)
    node = program.node("layer")
    definition = TABLE.find(node, program.submodule(node))
    assert definition is not None and definition.role_for(node) is Role.GRID_PRESERVING


@OPSETS
@pytest.mark.parametrize(("weight", "bias", "axes"), [(True, True, 1), (True, False, 2), (False, False, 1)])
def test_layer_norm_is_torchs(opset: int, weight: bool, bias: bool, axes: int) -> None:
    shape = (5, 6)[-axes:]
    function = lambda x, w, b: aten.layer_norm.default(x, list(shape), w, b, 1e-3)  # noqa: E731
    module = Affine(function, shape if weight else None, shape if bias else None)
    model = assert_emits_like_torch(module, (torch.randn(2, 4, 5, 6) * 2 + 1,), opset=opset, atol=1e-5)
    assert ("LayerNormalization" in [node.op_type for node in model.graph]) == (opset >= 17)


@pytest.mark.parametrize(("shape", "opset"), [((2, 6, 5), 13), ((2, 6, 4, 3), 17), ((2, 6), 21), ((2, 6, 2, 2, 2), 21)])
def test_group_norm_is_torchs(opset: int, shape: tuple[int, ...]) -> None:
    function = lambda x, w, b: aten.group_norm.default(x, 3, w, b, 1e-3)  # noqa: E731
    assert_emits_like_torch(Affine(function, (6,), (6,)), (torch.randn(shape) * 2,), opset=opset, atol=1e-5)
    assert_emits_like_torch(Affine(function, None, None), (torch.randn(shape) * 2,), opset=opset, atol=1e-5)


def test_instance_norm_is_torchs() -> None:
    x = torch.randn(2, 4, 5, 5) * 3
    assert_emits_like_torch(nn.InstanceNorm2d(4, affine=True), (x,), only="InstanceNormalization", atol=1e-5)
    assert_emits_like_torch(nn.InstanceNorm2d(4), (x,), atol=1e-5)
    norm = _trained(nn.InstanceNorm2d(4, affine=True, track_running_stats=True), x)
    assert_emits_like_torch(norm, (x,), atol=1e-5, only="BatchNormalization")


@OPSETS
@pytest.mark.parametrize("eps", [None, 1e-2])
def test_rms_norm_is_torchs(opset: int, eps: float | None) -> None:
    function = lambda x, w, b: aten.rms_norm.default(x, [6], w, eps)  # noqa: E731
    x = torch.randn(2, 5, 6)
    assert_emits_like_torch(Affine(function, (6,), None), (x,), opset=opset, atol=1e-5)
    assert_emits_like_torch(Affine(function, None, None), (x,), opset=opset, atol=1e-5)


@pytest.mark.parametrize("order", [0, 1, 2, 3, 2.5, math.inf, -math.inf])
@pytest.mark.parametrize(("dim", "opset"), [([-1], 13), ([1, 2], 21), (None, 17)])
def test_vector_norm_is_torchs(opset: int, order: float, dim: list[int] | None) -> None:
    x = torch.randn(2, 3, 4).round(decimals=1)

    def norms(x: torch.Tensor) -> Any:
        return [aten.linalg_vector_norm.default(x, order, dim, keepdim) for keepdim in (True, False)]

    assert_emits_like_torch(norms, (x,), opset=opset, batches=(3,))


def test_vector_norm_is_torchs_when_it_computes_in_another_dtype() -> None:
    function = lambda x: aten.linalg_vector_norm.default(x, 2, [1], dtype=torch.float64)  # noqa: E731
    assert_emits_like_torch(function, (torch.randn(2, 3),), batches=(3,))
