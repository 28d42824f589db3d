"""Which kernels onnxruntime runs for layers that went through the whole pipeline, with a symbolic batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxquant
from fxquant.lowering.lower import lower
from fxquant.numerics.runtime import Level, RuntimeOptions, optimised_graph

GENERATOR = torch.Generator().manual_seed(0)
IMAGE, SIGNAL, TOKENS = (torch.randn(shape, generator=GENERATOR) for shape in ((2, 8, 10, 10), (2, 8, 12), (2, 9, 32)))


class Attention(nn.Module):
    """Two heads of 16, one layer each for q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).view(-1, 9, 2, 16).transpose(1, 2) for layer in self.layers)
        return F.scaled_dot_product_attention(q, k, v)


class Product(nn.Module):
    """x w with a parameter w."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 16, generator=GENERATOR))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, self.w)


class Mean(nn.Module):
    """Global mean behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mean(self.conv(x), (2, 3))


def _behind(pool: nn.Module, axes: int = 2) -> nn.Module:
    return nn.Sequential((nn.Conv1d, nn.Conv2d)[axes - 1](8, 8, 1), pool)


CASES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, dict[str, int]]] = {
    "convolution": (lambda: nn.Conv2d(8, 16, 3, padding=1), IMAGE, {"QLinearConv": 1}),
    "convolution 1d": (lambda: nn.Conv1d(8, 16, 3, dilation=2), SIGNAL, {"QLinearConv": 1}),
    "linear": (lambda: nn.Linear(32, 16), TOKENS[:, 0], {"QGemm": 1}),
    "linear of rank 3": (lambda: nn.Linear(32, 16), TOKENS, {"QGemm": 1, "Reshape": 2}),
    "linear of rank 3 with relu": (
        lambda: nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)),
        TOKENS,
        {"QGemm": 2, "Reshape": 4},
    ),
    "linear of rank 3 without bias": (lambda: nn.Linear(32, 16, bias=False), TOKENS, {"QLinearMatMul": 1}),
    "product": (Product, TOKENS, {"QLinearMatMul": 1}),
    "max pool": (lambda: _behind(nn.MaxPool2d(3, 2, 1, ceil_mode=True)), IMAGE, {"QLinearConv": 1, "MaxPool": 1}),
    "average pool": (lambda: _behind(nn.AvgPool2d(3, 2, 1)), IMAGE, {"QLinearConv": 1, "QLinearAveragePool": 1}),
    "average pool with ceiling": (
        lambda: _behind(nn.AvgPool2d(3, 2, ceil_mode=True)),
        IMAGE,
        {"QLinearConv": 1, "QLinearAveragePool": 1},
    ),
    "global pool 1d": (
        lambda: _behind(nn.AdaptiveAvgPool1d(1), axes=1),
        SIGNAL,
        {"QLinearConv": 1, "QLinearGlobalAveragePool": 1},
    ),
    "mean": (Mean, IMAGE, {"QLinearConv": 1, "QLinearGlobalAveragePool": 1, "Flatten": 1}),
    "attention": (
        Attention,
        TOKENS,
        {"QGemm": 3, "QLinearMatMul": 2, "QLinearSoftmax": 1, "Reshape": 9, "Transpose": 3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_layer_runs_in_integer_kernels(case: str) -> None:
    make, x, expected = CASES[case]
    torch.manual_seed(0)
    program = fxquant.capture(make().eval(), x)
    pipeline = fxquant.load_pipeline("int8_per_channel")
    pipeline.prepare(program)
    fxquant.calibrate(program, [x], progress=False)
    pipeline.finalize(program)
    assert _kernels(program) == {"QuantizeLinear": 1, "DequantizeLinear": 1, **expected}


def _kernels(program: fxquant.Program) -> dict[str, int]:
    data = ir.serde.serialize_model(lower(program)).SerializeToString()
    return dict(Counter(node.op_type for node in optimised_graph(data, RuntimeOptions(Level.EXTENDED)).graph.node))
