"""The five nets of the placement tests, with inputs; and what a file made of them: on, codes (passed on) or off."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from fxquant.capture import capture
from fxquant.graph.float_reasons import FOLLOWS
from fxquant.graph.pipeline import load_pipeline
from fxquant.graph.program import Program

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
TOKENS = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(3))


class ConvBnRelu(nn.Module):
    """conv - batch norm - relu - max pool - global average - flatten - linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.pool, self.gap, self.fc = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gap(self.pool(self.relu(self.bn(self.conv(x)))))
        found: torch.Tensor = self.fc(x.flatten(1))
        return found


class Residual(nn.Module):
    """relu(conv2(relu(conv1(x))) + relu(conv1(x))), transposed convolution and sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu1, self.relu2, self.up = nn.ReLU(), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu1(self.conv1(x))
        return torch.sigmoid(self.up(self.relu2(self.conv2(x) + x)))


class Depthwise(nn.Module):
    """Two depthwise-separable halves with ReLU6; the result is doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.act1 = nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.ReLU6()
        self.pointwise, self.act2 = nn.Conv2d(3, 8, 1), nn.ReLU6()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act2(self.pointwise(self.act1(self.depthwise(x))))
        return x * 2.0


class Concat(nn.Module):
    """Two branches of which one is pooled, joined, split in halves that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.pool = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.MaxPool2d(3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([self.left(x), self.pool(self.right(x))], 1)
        one, two = joined.split(4, 1)
        return one * two


class Encoder(nn.Module):
    """Token and position embeddings, one head of attention with two products, layer norm, a GELU network."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 8), nn.Parameter(torch.randn(1, 6, 8))
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.wide, self.narrow = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        x = self.norm(x + torch.softmax(scores, -1) @ self.value(x))
        found: torch.Tensor = self.narrow(F.gelu(self.wide(x)))
        return found


NETS: dict[str, tuple[type[nn.Module], torch.Tensor]] = {
    "conv_bn_relu": (ConvBnRelu, IMAGE),
    "residual": (Residual, IMAGE),
    "depthwise": (Depthwise, IMAGE),
    "concat": (Concat, IMAGE),
    "encoder": (Encoder, TOKENS),
}


def prepared(net: str, config: str) -> Program:
    """A net of NETS under a pipeline or placement file, ready for calibration."""
    program = _captured(net).copy()
    load_pipeline(config).prepare(program)
    return program


@cache
def _captured(net: str) -> Program:
    kind, example = NETS[net]
    torch.manual_seed(0)
    return capture(kind().eval(), example)


def on_off(program: Program) -> dict[str, str]:
    """Each value and parameter that has a FakeQuant: "on" (its own) or "codes" (its source's); the others are off."""
    found = {}
    for node, _ in program.fake_quant_nodes():
        source = node.all_input_nodes[0]
        found[source.name] = "codes" if source.meta.get("rule") == FOLLOWS else "on"
    return found
