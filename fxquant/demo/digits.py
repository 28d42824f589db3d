"""scikit-learn's 1,797 handwritten digits (8x8), split in two; and a short training loop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fxquant.errors import FxquantError
from fxquant.progress import track

HELD_BACK = 360
BATCH = 32


@dataclass(frozen=True)
class Digits:
    """Images of shape (N, 1, 8, 8), float32 in [0, 1], and labels of shape (N,), int64."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_digits(seed: int) -> Digits:
    """The digits, shuffled by `seed`, the last 360 held back."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as err:
        raise FxquantError("demo: scikit-learn is missing", remedy="Install it: pip install 'fxquant[demo]'.") from err
    bunch = load()
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    images = torch.tensor(bunch.images[order] / 16.0, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(bunch.target[order], dtype=torch.int64)
    return Digits(images[:-HELD_BACK], labels[:-HELD_BACK], images[-HELD_BACK:], labels[-HELD_BACK:])


def batches_of(samples: torch.Tensor) -> list[torch.Tensor]:
    """Samples along axis 0, in batches of 32; the last may be smaller."""
    return [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]


def train(net: nn.Module, digits: Digits, *, epochs: int, seed: int) -> None:
    """Train in place: SGD with momentum 0.9, learning rate 0.1 on a cosine to 0, batches of 32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for images of 8x8, and the same result on every machine
    try:
        _train(net, digits, epochs, seed)
    finally:
        torch.set_num_threads(threads)
    net.eval()


def _train(net: nn.Module, digits: Digits, epochs: int, seed: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for _ in track(range(epochs), "training", total=epochs):
        order = torch.randperm(len(digits.train_labels), generator=generator)
        for batch in batches_of(order):
            loss = nn.functional.cross_entropy(net(digits.train_images[batch]), digits.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped
            optimizer.step()
        scheduler.step()
