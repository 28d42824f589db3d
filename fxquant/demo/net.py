"""The demo's network: convolution-BN-ReLU6, depthwise, residual addition, concatenation and pooling, for 8x8 digits."""

from __future__ import annotations

import torch
from torch import nn


class ConvBlock(nn.Sequential):
    """Convolution, batch norm, ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(inplace=True),
        )


class Residual(nn.Module):
    """x + project(depthwise(expand(x))), as in MobileNetV2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 2 * channels
        self.expand = ConvBlock(channels, hidden, kernel=1)
        self.depthwise = ConvBlock(hidden, hidden, groups=hidden)
        self.project = nn.Sequential(nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images of shape (N, channels, H, W) to the same shape."""
        projected: torch.Tensor = self.project(self.depthwise(self.expand(x)))
        return x + projected


class DigitsNet(nn.Module):
    """Classifies images of shape (N, 1, 8, 8), values in [0, 1], into 10 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBlock(1, 32)
        self.residual = Residual(32)
        self.left = ConvBlock(32, 32, kernel=1)
        self.right = ConvBlock(32, 32)
        self.pool = nn.MaxPool2d(2)
        self.head = ConvBlock(64, 128)
        self.classifier = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (N, 10)."""
        x = self.residual(self.stem(x))
        x = self.pool(torch.cat([self.left(x), self.right(x)], dim=1))
        x = nn.functional.adaptive_avg_pool2d(self.head(x), 1).flatten(1)
        logits: torch.Tensor = self.classifier(x)
        return logits
