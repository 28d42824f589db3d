"""Networks of the parity benchmark for what the published ones lack: concats, average pools, gates and attention.

Topologies after the papers named at each class, in their usual depth and at 96 pixels; there are no published weights
of these sizes, so `models.randomise` gives them some.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

SIDE = 96  # pixels
CLASSES = 100


class DenseLayer(nn.Module):
    """BN-ReLU-1x1 and BN-ReLU-3x3; its output is put behind its input (Huang et al., 2016, arXiv:1608.06993)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, inputs + growth, H, W)."""
        out = self.conv1(torch.relu(self.norm1(x)))
        out = self.conv2(torch.relu(self.norm2(out)))
        return torch.cat([x, out], 1)


class Transition(nn.Module):
    """BN-ReLU-1x1 to half the channels, then a 2x2 average pool."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, inputs // 2, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, inputs/2, H/2, W/2)."""
        out: Tensor = self.pool(self.conv(torch.relu(self.norm(x))))
        return out


class DenseNet(nn.Module):
    """Three dense blocks of 4, 6 and 4 layers that grow by 16; (N, 3, 96, 96) -> (N, classes)."""

    def __init__(self, classes: int = CLASSES, growth: int = 16) -> None:
        super().__init__()
        channels = 2 * growth
        self.stem = nn.Conv2d(3, channels, 7, 2, padding=3, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels)
        layers: list[nn.Module] = []
        for index, depth in enumerate((4, 6, 4)):
            if index:
                layers.append(Transition(channels))
                channels //= 2
            for _ in range(depth):
                layers.append(DenseLayer(channels, growth))
                channels += growth
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, 96, 96)."""
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = self.blocks(functional.max_pool2d(x, 3, 2, 1))
        x = functional.adaptive_avg_pool2d(torch.relu(self.norm(x)), 1)
        logits: Tensor = self.classifier(x.flatten(1))
        return logits


def conv_bn_relu(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class PoolBlock(nn.Module):
    """A 3x3 average pool with a 1x1 convolution beside a 1x1 and two 3x3, concatenated (Inception's block A)."""

    def __init__(self, inputs: int, outputs: int, is_pad_counted: bool) -> None:
        super().__init__()
        width = outputs // 3
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=is_pad_counted)
        self.pooled = conv_bn_relu(inputs, outputs - 2 * width, 1)
        self.point = conv_bn_relu(inputs, width, 1)
        self.wide = nn.Sequential(conv_bn_relu(inputs, width, 3), conv_bn_relu(width, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H, W)."""
        return torch.cat([self.pooled(self.pool(x)), self.point(x), self.wide(x)], 1)


class PoolNet(nn.Module):
    """Six blocks with 3x3 average pools, with and without the padding counted; (N, 3, 96, 96) -> (N, classes)."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn_relu(3, 24, 3), nn.AvgPool2d(3, 2, 1)]
        channels = 24
        for index, outputs in enumerate((48, 48, 96, 96, 192, 192)):
            layers.append(PoolBlock(channels, outputs, is_pad_counted=index % 2 == 0))
            if index % 2:
                layers.append(nn.AvgPool2d(3, 2, 1, ceil_mode=index == 3, count_include_pad=False))
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, 96, 96)."""
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.features(x)), 1))
        return logits


class SqueezeExcite(nn.Module):
    """Channels times a gate in [0, 1] computed from their means (Hu et al., 2017, arXiv:1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = -(-channels // 32) * 8
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape; the gate is (N, C, 1, 1)."""
        gate = torch.relu(self.reduce(functional.adaptive_avg_pool2d(x, 1)))
        return x * functional.hardsigmoid(self.expand(gate))


@dataclass(frozen=True)
class GatedShape:
    """One row of MobileNetV3-Small's table."""

    kernel: int
    hidden: int
    channels: int
    is_gated: bool
    is_hard_swish: bool
    stride: int


MOBILENET_V3_SMALL = (
    GatedShape(3, 16, 16, True, False, 2),
    GatedShape(3, 72, 24, False, False, 2),
    GatedShape(3, 88, 24, False, False, 1),
    GatedShape(5, 96, 40, True, True, 2),
    GatedShape(5, 240, 40, True, True, 1),
    GatedShape(5, 240, 40, True, True, 1),
    GatedShape(5, 120, 48, True, True, 1),
    GatedShape(5, 144, 48, True, True, 1),
    GatedShape(5, 288, 96, True, True, 2),
    GatedShape(5, 576, 96, True, True, 1),
    GatedShape(5, 576, 96, True, True, 1),
)


class GatedResidual(nn.Module):
    """Expand, depthwise, gate, project, with a residual where shapes allow (Howard et al., 2019, arXiv:1905.02244)."""

    def __init__(self, inputs: int, shape: GatedShape) -> None:
        super().__init__()
        hidden, padding = shape.hidden, shape.kernel // 2
        activation = nn.Hardswish if shape.is_hard_swish else nn.ReLU
        layers: list[nn.Module] = []
        if hidden != inputs:
            layers += [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), activation()]
        layers.append(nn.Conv2d(hidden, hidden, shape.kernel, shape.stride, padding, groups=hidden, bias=False))
        layers += [nn.BatchNorm2d(hidden), activation()]
        layers += [SqueezeExcite(hidden)] if shape.is_gated else []
        layers += [nn.Conv2d(hidden, shape.channels, 1, bias=False), nn.BatchNorm2d(shape.channels)]
        self.layers = nn.Sequential(*layers)
        self.is_residual = shape.stride == 1 and inputs == shape.channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, channels, ceil(H/stride), ceil(W/stride))."""
        out: Tensor = self.layers(x)
        return x + out if self.is_residual else out


class SqueezeExciteNet(nn.Module):
    """MobileNetV3-Small: gates, hard-swish and hard-sigmoid; (N, 3, 96, 96) -> (N, classes)."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        channels = 16
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels)]
        layers.append(nn.Hardswish())
        for shape in MOBILENET_V3_SMALL:
            layers.append(GatedResidual(channels, shape))
            channels = shape.channels
        layers += [nn.Conv2d(channels, 576, 1, bias=False), nn.BatchNorm2d(576), nn.Hardswish()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(576, 1024), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(1024, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, 96, 96)."""
        x = functional.adaptive_avg_pool2d(self.features(x), 1)
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


class EncoderBlock(nn.Module):
    """Attention and a GELU layer pair, each behind a LayerNorm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project = nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map (N, T, width) to the same shape; `mask` (T, T) is True where a token (row) may look at another."""
        normed = self.norm1(x)
        q, k, v = (self._split(layer(normed)) for layer in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.narrow(functional.gelu(self.widen(self.norm2(x))))
        return out

    def _split(self, x: Tensor) -> Tensor:
        tokens, width = x.shape[1:]
        return x.reshape(-1, tokens, self.heads, width // self.heads).transpose(1, 2)


class Encoder(nn.Module):
    """Four transformer blocks over 12 x 12 patches (Dosovitskiy et al., 2020, arXiv:2010.11929).

    A token looks at those at most `reach` positions away, as in local attention: the mask is neither empty nor causal.
    """

    mask: Tensor
    position: Tensor

    def __init__(self, classes: int = CLASSES, width: int = 128, depth: int = 4, reach: int = 40) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        tokens = torch.arange((SIDE // 8) ** 2)
        self.register_buffer("mask", (tokens[:, None] - tokens).abs() <= reach)
        self.register_buffer("position", waves(len(tokens), width))
        self.blocks = nn.ModuleList(EncoderBlock(width, heads=4) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, 96, 96)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, self.mask)
        logits: Tensor = self.classifier(self.norm(x).mean(1))
        return logits


def waves(tokens: int, width: int) -> Tensor:
    """Sines and cosines of each position, (tokens, width): Vaswani et al., 2017, arXiv:1706.03762, section 3.5."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(tokens)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)


MIXED_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "densenet": DenseNet,
    "pool_net": PoolNet,
    "squeeze_excite": SqueezeExciteNet,
    "encoder": Encoder,
}
