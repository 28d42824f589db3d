"""What the tests of the command line write for it: a file with a model, and images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(x.mean((2, 3)))

def make_net():
    torch.manual_seed(0)
    return Net()
"""


def write_model_file(folder: Path, more: str = "", name: str = "model.py") -> None:
    """A file with `make_net` and what is in `more`."""
    (folder / name).write_text(f"{MODEL}{more}")


def write_images(path: Path, count: int = 12) -> np.ndarray:
    """Noise for the model, as a .npy file; also returned."""
    data = np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype(np.float32)
    np.save(path, data)
    return data
