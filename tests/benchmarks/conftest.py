"""The benchmarks are scripts of the checkout, not of the installed package: tests import them from the root."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)
