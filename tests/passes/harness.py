"""What the tests of the folding and freezing passes share: capture, batch norms worth folding, reasons, outputs."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from fxquant.capture import capture
from fxquant.graph.program import Program
from fxquant.graph.trace import PassEntry
from tests.helpers import relative_difference

Model = TypeVar("Model", bound=nn.Module)
ROUNDING = 1e-5  # largest difference that float32 rounding explains, as a fraction of the output's largest magnitude


class Chain(nn.Module):
    """Named modules one after the other, with an input called x."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.children():
            x = part(x)
        return x


def captured(model: nn.Module, *inputs: torch.Tensor) -> Program:
    """The program of a model in eval mode."""
    return capture(model.eval(), inputs)


def reasons(entry: PassEntry) -> list[str]:
    """Why the pass left nodes alone."""
    return [miss.reason for miss in entry.misses]


def difference(program: Program, expected: torch.Tensor, *inputs: torch.Tensor) -> float:
    """Largest difference of the program's output from `expected`, as a fraction of the largest magnitude there."""
    with torch.no_grad():
        return relative_difference(expected, program.module(*inputs))


def output(model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """What the model computes in eval mode."""
    with torch.no_grad():
        found = model.eval()(*inputs)
    assert isinstance(found, torch.Tensor)
    return found


def randomize(model: Model, seed: int = 0) -> Model:
    """Give every batch norm statistics and parameters far from 0 and 1, of both signs, one gamma of them 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) * 3 + 0.05)
            if module.affine:
                with torch.no_grad():
                    module.weight.copy_(torch.randn(module.num_features, generator=generator) * 2)
                    module.bias.copy_(torch.randn(module.num_features, generator=generator))
                    module.weight[0] = 0.0
    return model


def batch_norm_nodes(program: Program) -> list[str]:
    """Names of the nodes that still normalise, by module or by function."""
    return [node.name for node in program.graph.nodes if _is_norm(program, node)]


def _is_norm(program: Program, node: Any) -> bool:
    if node.op == "call_module":
        return isinstance(program.submodule(node), nn.modules.batchnorm._BatchNorm)
    return node.target is torch.ops.aten.batch_norm.default
