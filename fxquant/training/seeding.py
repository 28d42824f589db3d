"""Random numbers as a function of (seed, epoch): a resumed epoch draws what it would have drawn."""

from __future__ import annotations

import random

import numpy as np
import torch

from fxquant.errors import ConfigError
from fxquant.schedule import plain_integer, shown


def plain_seed(seed: object, thing: str = "train_qat") -> int:
    """A run's seed as a plain int; raises ConfigError for what is none, or no file of ours can hold."""
    found = plain_integer(seed)
    if found is None or not 0 <= found < 2**64:
        raise ConfigError(f"{thing}: seed", expected="an integer from 0 to 2^64 - 1", got=shown(seed))
    return found


def seed_epoch(seed: int, epoch: int, loader: object = None) -> None:
    """Seed every generator that an epoch may draw from: torch's (CUDA's too), numpy's, Python's.

    Arguments:
        seed: of the run, 0 or more.
        epoch: from 0.
        loader: a DataLoader, whose own generator and its samplers' are seeded as well; a sampler that has
            `set_epoch` (DistributedSampler) is told the epoch. What has none of these is left alone.
    """
    number = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)
    for owner in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        generator, set_epoch = getattr(owner, "generator", None), getattr(owner, "set_epoch", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(number)
        if callable(set_epoch):
            set_epoch(epoch)
