"""What is promised in these tests is what is promised on a listed platform; self-tests really run."""

from __future__ import annotations

import pytest

from fxquant.simulation import certification


@pytest.fixture(autouse=True)
def listed_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process counts as one of the platforms that kernels are certified on."""
    platform = certification.CERTIFIED_ON["QLinearConv"][0]
    monkeypatch.setattr(certification, "here", lambda: platform)
