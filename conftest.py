"""Says in one sentence what to do when fxquant is not installed for the tests."""

from __future__ import annotations

import importlib.util

import pytest


def _has_passes() -> bool:
    try:
        return importlib.util.find_spec("fxquant.passes") is not None
    except ModuleNotFoundError:
        return False


if not _has_passes():
    pytest.exit(
        "fxquant is not installed in editable mode here; run: pip install -c constraints.txt -e '.[test]'", returncode=4
    )
