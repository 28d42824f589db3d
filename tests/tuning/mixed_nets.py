"""What the tests of mixed precision share: small nets, one of them with a value that 8 bits cannot hold, and scores."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant.demo.digits import Digits, batches_of, load_digits, train
from fxquant.tuning.target import Drop

KILL = "FXQUANT_TEST_KILL_AFTER"  # evaluations after which the process is killed
RELATIVE = Drop(0.01, relative=True)


class Wild(nn.Module):
    """conv1 ... conv4 and a classifier; conv4 has a shortcut. Images (N, 1, 8, 8) to 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.conv3, self.conv4 = nn.Conv2d(12, 12, 3, 2, 1), nn.Conv2d(12, 12, 3, padding=1)
        self.fc = nn.Linear(12 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        x = torch.relu(self.conv3(x))
        x = torch.relu(self.conv4(x) + x)
        return torch.as_tensor(self.fc(x.flatten(1)))


class Pooled(nn.Module):
    """stem, left + right, pooling, wide, wild; the sum and the pooling multiply nothing. Images (N, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.wide, self.wild = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = nn.functional.avg_pool2d(self.left(x) + self.right(x), 2)
        return torch.as_tensor(self.wild(torch.relu(self.wide(x))))


def pooled_net(octaves: int = 7) -> Pooled:
    """A net that was never trained, one of whose channels between wide and wild is 2^octaves times as large."""
    torch.manual_seed(0)
    net = Pooled()
    _widen(net.wide, net.wild, 2.0**octaves)
    return net.eval()


def _widen(layer: nn.Conv2d, reader: nn.Conv2d, factor: float) -> None:
    """Make a layer's first channel so many times as large, and what reads it through a relu as much less."""
    with torch.no_grad():
        assert layer.bias is not None
        layer.weight[0] *= factor
        layer.bias[0] *= factor
        reader.weight[:, 0] /= factor


@cache
def digits() -> Digits:
    """scikit-learn's digits."""
    return load_digits(0)


@cache
def _trained() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = Wild()
    train(net, digits(), epochs=3, seed=0)
    return net.state_dict()


def wild_net(octaves: int = 7) -> Wild:
    """A trained net, one of whose channels between conv2 and conv3 is 2^octaves times as large; the same function."""
    net = Wild()
    net.load_state_dict(_trained())
    _widen(net.conv2, net.conv3, 2.0**octaves)
    return net.eval()


def batches() -> list[torch.Tensor]:
    """For calibration."""
    return batches_of(digits().train_images[:128])


def example() -> torch.Tensor:
    """One image."""
    return digits().train_images[:1]


def accuracy(model: Callable[..., Any]) -> float:
    """Top-1 on the digits held back."""
    return float((model(digits().test_images).argmax(1) == digits().test_labels).float().mean())


class Counting:
    """A score that counts how often it was asked for, and kills the process where the environment says so."""

    def __init__(self, score: Callable[[Callable[..., Any]], float] = accuracy) -> None:
        self.score = score
        self.calls = 0

    def __call__(self, model: Callable[..., Any]) -> float:
        if self.calls == int(os.environ.get(KILL, -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls += 1
        return self.score(model)


def search_in(folder: Path) -> None:
    """A whole search into `folder`, in a process of its own."""
    from fxquant import tune_precision

    torch.set_num_threads(1)
    tune_precision(wild_net(), example(), batches(), Counting(), target=RELATIVE, folder=folder, progress=False)


if __name__ == "__main__":
    search_in(Path(sys.argv[1]))
