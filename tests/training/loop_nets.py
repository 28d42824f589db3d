"""What the tests of training loops share: a small net with dropout, its data, and simulations of it."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from fxquant.schedule import Schedule
from fxquant.sim import QuantSim
from fxquant.spec import SpecOverride

BATCHES, SIZE = 3, 8
# Everything that a schedule does happens between the second epoch and the fourth.
SHORT = Schedule(epochs=4, learning_rate=1e-2, divide_every=2, freeze_batch_norm_after=2, freeze_encodings_after=3)
Sample = tuple[torch.Tensor, torch.Tensor]


class Net(nn.Module):
    """conv - bn - relu6 - dropout, then a classifier; images of (N, 2, 6, 6) to 3 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.drop, self.fc = nn.Dropout(0.3), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(F.relu6(self.bn(self.conv(x))))
        found: torch.Tensor = self.fc(x.mean((2, 3)))
        return found


def samples(seed: int = 0) -> list[Sample]:
    """Batches of noise and labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(SIZE, 2, 6, 6, generator=generator), torch.randint(0, 3, (SIZE,), generator=generator))
        for _ in range(BATCHES)
    ]


def shuffled(epoch: int) -> list[Sample]:
    """The batches of an epoch, in an order of its own, moved by numbers of the global generator."""
    noise = torch.randn(())
    batches = samples()
    return [(x + 0.1 * noise, y) for x, y in batches[epoch % BATCHES :] + batches[: epoch % BATCHES]]


def loss(model: nn.Module, batch: Sample) -> torch.Tensor:
    """Cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def calibrated(training: str = "static", seed: int = 0) -> QuantSim:
    """A simulation of the net, batch norm live, whose activations' ranges are trained as said."""
    twin = copy.copy(_calibrated(training, seed))
    twin.program = twin.program.copy()
    return twin


@cache
def _calibrated(training: str, seed: int) -> QuantSim:
    torch.manual_seed(seed)
    change, x = SpecOverride(training=training), samples()[0][0]
    sim = QuantSim(Net().eval(), (x,), "int8_per_channel_qat", activation=change, schedule=SHORT)
    sim.compute_encodings([x for x, _ in samples()], progress=False)
    return sim


def state(sim: QuantSim) -> dict[str, torch.Tensor]:
    """All parameters and buffers, copied."""
    return {name: tensor.detach().clone() for name, tensor in sim.model.state_dict().items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not the same bit for bit; both must have the same, and some."""
    assert one.keys() == other.keys() and one
    return [name for name in one if not torch.equal(_bits(one[name]), _bits(other[name]))]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor
