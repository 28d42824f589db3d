"""Two small classifiers for training on few cores: inverted residuals as in MobileNetV2, residual blocks as in ResNet.

An image of 28 by 28 pixels costs 1.4 and 2.6 million multiply-adds; any size from 16 by 16 works. All convolutions are
without a bias, and behind each stands a batch norm. `stem` is the first layer and `classifier` the last, in both.

Sources: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, figure 4 and table 2; He et
al., "Deep Residual Learning for Image Recognition", 2016, figures 2 and 3 (projection shortcuts where shapes change).
"""

from collections.abc import Callable

from torch import Tensor, nn

CLASSES = 10
STEM, CLASSIFIER = "stem", "classifier"


class SmallMobileNet(nn.Module):
    """Six inverted residuals between two convolutions, ReLU6; 34 thousand parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = _convolution(channels, 16, 3, stride=2, activation=nn.ReLU6)
        self.blocks = nn.Sequential(
            InvertedResidual(16, 16, expansion=3, stride=1),
            InvertedResidual(16, 24, expansion=4, stride=2),
            InvertedResidual(24, 24, expansion=4, stride=1),
            InvertedResidual(24, 32, expansion=4, stride=2),
            InvertedResidual(32, 32, expansion=4, stride=1),
        )
        self.head = _convolution(32, 128, 1, activation=nn.ReLU6)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(128, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, channels, H, W)."""
        logits: Tensor = self.classifier(self.pool(self.head(self.blocks(self.stem(images)))).flatten(1))
        return logits


class SmallResNet(nn.Module):
    """Three residual blocks of two convolutions each, ReLU; 78 thousand parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = _convolution(channels, 16, 3, stride=2, activation=nn.ReLU)
        self.blocks = nn.Sequential(Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, channels, H, W)."""
        logits: Tensor = self.classifier(self.pool(self.blocks(self.stem(images))).flatten(1))
        return logits


class InvertedResidual(nn.Module):
    """Widen by 1x1, convolve depthwise, narrow by 1x1 without an activation; the input is added where shapes agree."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        self.adds_input = stride == 1 and inputs == outputs
        hidden = inputs * expansion
        self.layers = nn.Sequential(
            _convolution(inputs, hidden, 1, activation=nn.ReLU6),
            _convolution(hidden, hidden, 3, stride=stride, groups=hidden, activation=nn.ReLU6),
            _convolution(hidden, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride), rounded up."""
        y: Tensor = self.layers(x)
        return x + y if self.adds_input else y


class Residual(nn.Module):
    """Two 3x3 convolutions, to which the input (or its 1x1 projection) is added before the last ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _convolution(inputs, outputs, 3, stride=stride, activation=nn.ReLU), _convolution(outputs, outputs, 3)
        )
        keeps_shape = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if keeps_shape else _convolution(inputs, outputs, 1, stride=stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride), rounded up."""
        y: Tensor = self.relu(self.layers(x) + self.shortcut(x))
        return y


NETWORKS: dict[str, Callable[[int], nn.Module]] = {"mobilenet": SmallMobileNet, "resnet": SmallResNet}


def _convolution(
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: Callable[[], nn.Module] | None = None,
) -> nn.Sequential:
    """Convolution with "same" padding, batch norm, and the activation if there is one."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([activation()] if activation else []))
