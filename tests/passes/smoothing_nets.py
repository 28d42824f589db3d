"""Nets like transformers, with outliers in some channels, for the tests of smooth-quant."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

import fxquant
from fxquant.graph.program import Program

WIDTH, TOKENS = 8, 5


class TakenApart(nn.Module):
    """An RMS norm as Llama-like models write it: its weight is multiplied as a constant."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * scaled


def norm_of(kind: str) -> nn.Module:
    """A norm over the last axis by name: layer, plain (a layer norm without parameters), rms, or apart."""
    if kind == "layer":
        return nn.LayerNorm(WIDTH)
    if kind == "plain":
        return nn.LayerNorm(WIDTH, elementwise_affine=False)
    return nn.RMSNorm(WIDTH) if kind == "rms" else TakenApart(WIDTH)


class Block(nn.Module):
    """Attention with separate q, k and v, and two linears with an activation between, each beside a residual.

    Arguments:
        norm: see norm_of.
        is_pre: whether norms stand in front of what they norm (GPT), or behind the sum (BERT).
        activation: relu or gelu.
    """

    def __init__(self, norm: str = "layer", is_pre: bool = True, activation: str = "relu") -> None:
        super().__init__()
        self.is_pre, self.activation = is_pre, activation
        self.norm1, self.norm2 = norm_of(norm), norm_of(norm)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.project = nn.Linear(WIDTH, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        weights = torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1)
        found: torch.Tensor = self.project((weights @ v).transpose(1, 2).flatten(2))
        return found

    def _feed(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.widen(x)
        found: torch.Tensor = self.narrow(torch.relu(wide) if self.activation == "relu" else F.gelu(wide))
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_pre:
            x = x + self._attend(self.norm1(x))
            return x + self._feed(self.norm2(x))
        x = self.norm1(x + self._attend(x))
        found: torch.Tensor = self.norm2(x + self._feed(x))
        return found


def with_outliers(model: nn.Module, seed: int = 0, factor: float = 30.0) -> nn.Module:
    """Seeded parameters; one channel of every norm that has a weight is `factor` times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 1) ** 0.5)
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
                parameter[seed % len(parameter)] *= factor
    return model.eval()


def tokens(seed: int = 0) -> torch.Tensor:
    """A batch of three sequences."""
    return torch.randn(3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def block(norm: str = "layer", is_pre: bool = True, activation: str = "relu", seed: int = 0) -> Program:
    """The program of a Block with outliers; captured once for all seeds."""
    program = _captured(norm, is_pre, activation).copy()
    with_outliers(program.module, seed)
    return program


@cache
def _captured(norm: str, is_pre: bool, activation: str) -> Program:
    return fxquant.capture(Block(norm, is_pre, activation).eval(), tokens())
