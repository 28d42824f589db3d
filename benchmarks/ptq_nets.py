"""The nets of the post-training table with their data: real weights, ReLU in place of ReLU6, and rescaled channels.

MobileNetV2 and EfficientNet-Lite0 have published weights and are judged on 119 labelled photos; the ResNet is trained
here, once, on Fashion-MNIST and judged on its 10,000 test images. A variant with "relu" has ReLU for every ReLU6, and
the same weights; one with "rescaled" computes what the net before it computes, with other channels
(benchmarks/rescaled.py). Where ReLU6 stays, channels can be rescaled at few places.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import assets, photos
from benchmarks.labelled_images import Dataset, fashion_mnist
from benchmarks.networks import NETWORKS
from benchmarks.qat_accuracy import FLOAT_EPOCHS
from benchmarks.qat_accuracy_runs import Method, Recipe, Run, Setting, Store, TrainingPlan
from benchmarks.qat_accuracy_training import execute
from benchmarks.qat_networks import NETWORKS as SMALL_NETWORKS
from benchmarks.rescaled import rescale, with_relu
from fxquant.errors import FxquantError

MOBILENET, EFFICIENTNET, RESNET = "mobilenet_v2", "efficientnet_lite0", "resnet"
OCTAVES, RESNET_OCTAVES = 4.0, 6.0  # the ResNet has three links; it takes more to make it fail
TOLERANCE = 1e-4
SEED = 0
SMALL_IMAGES_PER_PHOTO = 8  # a small net's layer has fewer pixels to learn from
PHOTO_BATCH, SMALL_BATCH = 16, 250


class NotPreserved(FxquantError):
    """Rescaling changed what a float net computes."""


@dataclass(frozen=True)
class Samples:
    """Images that calibrate, others that are judged with their accepted classes, and the batch that both come in."""

    calibration: Tensor
    judged: Tensor
    labels: tuple[tuple[int, ...], ...]
    batch: int

    @property
    def resolution(self) -> float:
        """Points of top-1 that one image is worth."""
        return 100 / len(self.labels)

    def batches(self) -> list[Tensor]:
        """The calibration images in batches."""
        return list(torch.split(self.calibration, self.batch))


@dataclass(frozen=True)
class Net:
    """A row group of the table: a base net, and what was done to it."""

    name: str
    base: str
    is_relu: bool = False
    is_rescaled: bool = False

    @property
    def replaces_relu6(self) -> bool:
        """Whether AIMET's rows make ReLU of all ReLU6: it costs MobileNetV2 one photo, EfficientNet-Lite0 24 of 119."""
        return self.base != EFFICIENTNET

    @property
    def octaves(self) -> float:
        """How far channels are rescaled, up or down."""
        return RESNET_OCTAVES if self.base == RESNET else OCTAVES

    @property
    def origin(self) -> str:
        """The net of the table that computes the same function: itself, unless it is rescaled."""
        return self.name.removesuffix("_rescaled") if self.is_rescaled else self.name

    def load(self) -> nn.Module:
        """The float net, in eval mode. Raises AssetAbsent without its weights, NotPreserved if rescaling failed."""
        net = trained_resnet() if self.base == RESNET else NETWORKS[self.base].load(SEED)
        net = (with_relu(net) if self.is_relu else net).eval()
        return rescaled(net, self.example(), self.octaves) if self.is_rescaled else net

    def example(self) -> Tensor:
        """Two images of noise of the right shape."""
        shape = (2, 1, 28, 28) if self.base == RESNET else (2, 3, 224, 224)
        return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))

    def samples(self, calibration: int) -> Samples:
        """Its data, with `calibration` photos, or more small images. Raises AssetAbsent."""
        return small_samples(calibration) if self.base == RESNET else photo_samples(self.base, calibration)


NETS = {
    net.name: net
    for net in (
        *(
            Net(base + "_relu" * is_relu + "_rescaled" * is_rescaled, base, is_relu, is_rescaled)
            for base in (MOBILENET, EFFICIENTNET)
            for is_relu in (False, True)
            for is_rescaled in (False, True)
        ),
        Net(RESNET, RESNET),
        Net(f"{RESNET}_rescaled", RESNET, is_rescaled=True),
    )
}


def rescaled(net: nn.Module, images: Tensor, octaves: float) -> nn.Module:
    """The net, rescaled in place; NotPreserved if its output on `images` moves by more than 1e-4 of the largest."""
    with torch.no_grad():
        before = net(images)
        found = rescale(net, octaves, SEED)
        moved = float((net(images) - before).abs().max() / before.abs().max())
    if not found or not moved <= TOLERANCE:
        got = f"{moved:.1e} after {len(found)} rescalings"
        raise NotPreserved("a rescaled net", expected=f"outputs within {TOLERANCE:g} of what they were", got=got)
    return net


def photo_samples(base: str, calibration: int) -> Samples:
    """Photos as the net wants them; none of those that calibrate is judged."""
    preprocessing, judged = NETWORKS[base].preprocessing, photos.labelled()
    return Samples(
        photos.load(photos.calibration(calibration), preprocessing),
        photos.load(judged, preprocessing),
        tuple(photo.labels for photo in judged),
        PHOTO_BATCH,
    )


def small_samples(calibration: int, source: Callable[[], Dataset] = fashion_mnist) -> Samples:
    """The first training images, and all test images."""
    data = source()
    return Samples(
        data.prepared(data.train.pixels[: SMALL_IMAGES_PER_PHOTO * calibration]),
        data.prepared(data.test.pixels),
        tuple((int(label),) for label in data.test.labels),
        SMALL_BATCH,
    )


def cache() -> Path:
    """Where the trained net and finished rows are kept."""
    return assets.cache_folder() / "ptq"


def trained_resnet(source: Callable[[], Dataset] = fashion_mnist, recipe: Recipe | None = None) -> nn.Module:
    """The small ResNet, trained on the first call and read from the cache afterwards."""
    plan = TrainingPlan(FLOAT_EPOCHS, learning_rate=0.1, warmup=0.2)
    recipe = recipe or Recipe("fashion-mnist", plan, plan)
    store, run = Store(cache()), Run(RESNET, SEED, Setting(Method.FLOAT))
    store.claim(recipe)
    data = source()
    execute(run, recipe, data, store)
    net = SMALL_NETWORKS[RESNET](data.channels)
    net.load_state_dict(torch.load(store.weights(run), weights_only=True))
    return net.eval()
