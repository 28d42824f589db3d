"""What the tests of AutoQuant share: nets, scripted scores, and a catalogue with passes that fail and that resume."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fxquant import passes
from fxquant.demo.digits import Digits, load_digits, train
from fxquant.errors import PassError
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.pipeline import Pipeline, load_pipeline
from fxquant.graph.program import Program, Stage
from fxquant.graph.rewriter import Rewriter
from fxquant.spec import SpecOverride
from fxquant.tuning.auto_quant_steps import AddedPass, Step

CATALOGUE = "tests.tuning.auto_quant_nets:CATALOG"
KILL = "FXQUANT_TEST_KILL"  # "evaluate 3": the third evaluation kills the process; "layers 2": the second layer does


class Net(nn.Module):
    """conv - bn - relu - conv - bn - relu - mean - classifier; images (N, 1, 8, 8) to 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return torch.as_tensor(self.fc(x.mean((2, 3))))


def plain_net() -> Net:
    """A net that was never trained."""
    torch.manual_seed(0)
    return Net().eval()


def images() -> list[torch.Tensor]:
    """Two batches of noise."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 1, 8, 8, generator=generator) for _ in range(2)]


@cache
def digits() -> Digits:
    """scikit-learn's digits."""
    return load_digits(0)


@cache
def _trained() -> Net:
    torch.manual_seed(0)
    net = Net()
    train(net, digits(), epochs=12, seed=0)
    return net


def rescaled_net(octaves: float = 6.0) -> Net:
    """A trained net that computes what it did, its channels behind conv1 scaled by 2^U(-octaves, octaves)."""
    net = copy.deepcopy(_trained())
    factors = 2 ** (octaves * (2 * torch.rand(8, generator=torch.Generator().manual_seed(2)) - 1))
    with torch.no_grad():
        net.bn1.weight.mul_(factors)
        net.bn1.bias.mul_(factors)
        net.conv2.weight.div_(factors.view(1, -1, 1, 1))
    return net


def accuracy(model: Callable[..., Any]) -> float:
    """The share of the digits held back that a model knows."""
    found = torch.cat([model(batch).argmax(1) for batch in torch.split(digits().test_images, 120)])
    return float((found == digits().test_labels).float().mean())


class Scripted:
    """An evaluate that runs the model once, and gives the next of the scores; `calls` counts."""

    def __init__(self, *scores: float) -> None:
        self.scores = scores
        self.calls = 0

    def __call__(self, model: Callable[..., Any]) -> float:
        model(images()[0])
        self.calls += 1
        return self.scores[self.calls - 1]


def shift_classifier(rewriter: Rewriter, amount: float) -> None:
    """Add to the classifier's bias."""
    with rewriter.editing("fc", "nudged") as module, torch.no_grad():
        module.get_parameter("bias").add_(amount)


@dataclass(frozen=True)
class NudgeBias(Pass):
    """Add `amount` to the classifier's bias."""

    amount: float = 0.0

    name: ClassVar[str] = "nudge-bias"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED, Stage.CALIBRATED)
    contract: ClassVar[Contract] = Contract.CHANGES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        if self.amount:
            shift_classifier(rewriter, self.amount)


@dataclass(frozen=True)
class FailAlways(Pass):
    """Fail, or change nothing."""

    fails: bool = True

    name: ClassVar[str] = "fail-always"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CALIBRATED,)
    contract: ClassVar[Contract] = Contract.CHANGES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        if self.fails:
            raise PassError("fail-always", got="what it always gets")


@dataclass(frozen=True)
class NudgeInLayers(Pass):
    """Do three layers of work, kept in the run's folder; each adds 0.5 to a bias at the end."""

    name: ClassVar[str] = "nudge-in-layers"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CALIBRATED,)
    contract: ClassVar[Contract] = Contract.CHANGES

    @property
    def needs_data(self) -> bool:
        """It has a folder only with data."""
        return True

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        folder = rewriter.data.folder
        assert folder is not None
        folder.mkdir(parents=True, exist_ok=True)
        for layer in range(3):
            if not (folder / f"layer{layer}").exists():
                count("layers", folder.parent.parent)
                (folder / f"layer{layer}").touch()
        shift_classifier(rewriter, 0.5 * len(list(folder.glob("layer*"))))


CATALOG: dict[str, type[Pass]] = {
    **passes.CATALOG,
    **{kind.name: kind for kind in (NudgeBias, FailAlways, NudgeInLayers)},
}


def count(what: str, folder: Path) -> int:
    """Write down that something happened; kills the process if it is said to."""
    with (folder / f"{what}.txt").open("a") as file:
        file.write(".\n")
    number = len((folder / f"{what}.txt").read_text().splitlines())
    if os.environ.get(KILL) == f"{what} {number}":
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def pipeline(name: str = "int8_per_tensor") -> Pipeline:
    """A packaged pipeline whose passes come from the catalogue here."""
    found = load_pipeline(name)
    found.catalogue = CATALOGUE
    return found


def nudge(name: str, amount: float = 1.0) -> Step:
    """A step that shifts the classifier's bias, so that the program differs."""
    return Step(name, optimize=(AddedPass("nudge-bias", {"amount": amount}),))


def estimator(name: str) -> Step:
    """A step that chooses the activations' estimator."""
    return Step(name, activation=SpecOverride(estimator=name))
