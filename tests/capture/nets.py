"""Small models, each with one thing that capture has to get right."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


class ConvNet(nn.Module):
    """Conv, BN with unusual hyperparameters, in-place ReLU, residual add, dropout, pooling, linear."""

    def __init__(self, p: float = 0.25, momentum: float | None = 0.03) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8, eps=1e-3, momentum=momentum)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(p)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(x))
        y += x
        y = F.max_pool2d(F.relu6(y), 2)
        return self.fc(self.drop(y.mean((2, 3))))


class Shared(nn.Module):
    """One module called three times, and again under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.twin = self.body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.body(x)) + self.body(x) + self.twin(x)


class TiedLanguageModel(nn.Module):
    """Embedding and head share one parameter; so do two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(torch.tanh(self.a(self.embed(ids)))))


class InPlace(nn.Module):
    """Writes to an input, to views, through splits, and to a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x -= 1
        self.calls += 1
        y = x.clone()
        y[:, 1:, 0] *= 2
        y[:, 0] = 3
        left, right = y.chunk(2, 1)
        right.add_(left)
        z = y.permute(0, 2, 1)
        z.clamp_(min=-1.0).mul_(2)
        z.unsqueeze_(1)
        flat = y.view(y.shape[0], -1)
        flat[:, 0].zero_()
        return z.squeeze(1).sum(1) + y.flatten(1).sum(1, keepdim=True) + self.calls + x[:, :, 0]


@dataclass
class Result:
    """A dataclass output; registered with torch.export below."""

    logits: torch.Tensor
    features: torch.Tensor


torch.export.register_dataclass(Result, serialized_type_name="fxquant.tests.Result")
Pair = namedtuple("Pair", "first second")


class Structured(nn.Module):
    """Keyword inputs; a dict, a named tuple or a dataclass as output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor, flag: bool = False) -> object:
        features = x * scale
        logits = self.fc(features)
        if self.kind == "dict":
            return {"logits": logits, "all": [features, (logits,)]}
        return Pair(logits, features) if self.kind == "namedtuple" else Result(logits, features)


class Attention(nn.Module):
    """A stock encoder layer, which has a fast path in eval mode, with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.layer(x, src_key_padding_mask=mask)


class BatchNormAct(nn.BatchNorm2d):
    """A batch norm with an activation in its forward (timm's BatchNormAct2d does this)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.2)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(y)


class StandardizedConv(nn.Conv2d):
    """Weights normalised by batch_norm with training=True in every mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=1)


class FunctionalNorm(nn.Module):
    """F.batch_norm with the caller's own statistics: an eval capture freezes it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(3))
        self.register_buffer("var", torch.rand(3) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.batch_norm(x, self.mean, self.var, training=self.training)
        return F.dropout(F.dropout2d(x, 0.3, self.training), 0.4, self.training)
