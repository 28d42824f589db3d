"""What test_distributed.py lets two processes do, and one process with the whole batches."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import fxquant
from fxquant.graph.manager import PassManager
from fxquant.graph.pipeline import Pipeline, load_pipeline
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.numerics.live_batch_norm import BatchStatisticsNorm, LiveBatchNorm
from fxquant.numerics.peers import Peers
from fxquant.numerics.synchronised_batch_norm import synchronised
from fxquant.sim import QuantSim
from fxquant.spec import SpecOverride
from fxquant.training.distributed import is_synchronised

Grids = dict[str, torch.Tensor]
EXAMPLES, SIDE, CLASSES = 16, 8, 4


class Net(nn.Module):
    """A stem, a residual block and a depthwise convolution with a ReLU6, batch norms live; a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.n1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, eps=1e-3)
        self.b, self.n2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.d, self.n3 = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.n0(self.stem(x)))
        x = torch.relu(self.n2(self.b(torch.relu(self.n1(self.a(x))))) + x)
        x = functional.relu6(self.n3(self.d(x)))
        return torch.as_tensor(self.fc(x.mean((2, 3))))


@dataclass(frozen=True)
class Plan:
    """One training.

    Arguments:
        weight: training of the weights' ranges.
        frozen_after, frozen: after how many steps what stands still.
        together: whether the processes are synchronised.
    """

    training: str = "static"
    weight: str = "static"
    preset: str = "int8_per_channel_qat"
    steps: int = 4
    frozen_after: int | None = None
    frozen: str = "batch norm, encodings"
    together: bool = True
    sync_buffers: bool = True
    simulate: str = "float"
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        differs = [
            one for one in fields(self) if one.name in ("training", "weight") or getattr(self, one.name) != one.default
        ]
        return " ".join(str(getattr(self, one.name)) for one in differs if one.name != "options")

    def in_one_process(self) -> Plan:
        """The same on the whole batches."""
        return replace(self, together=False)


@dataclass(frozen=True)
class Trained:
    """What a training left: state by name, grids by name, losses of the whole batches, logits in `exact`."""

    state: dict[str, torch.Tensor]
    grids: Grids
    losses: list[float]
    logits: torch.Tensor


def batches(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Whole batches: images with patterns by class, and labels."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(CLASSES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7))
    found = []
    for _ in range(count):
        labels = torch.randint(CLASSES, (EXAMPLES,), generator=generator)
        found.append((patterns[labels] + torch.randn(EXAMPLES, 3, SIDE, SIDE, generator=generator), labels))
    return found


def shard(whole: torch.Tensor) -> torch.Tensor:
    """Every other example where there are two processes."""
    return whole[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else whole


def simulation(plan: Plan) -> QuantSim:
    """A net that is the same everywhere, prepared, and synchronised if the plan says so."""
    torch.manual_seed(0)
    net = Net().train()
    images = [images for images, _ in batches(2, seed=3)]
    overrides = SpecOverride(training=plan.training), SpecOverride(training=plan.weight)
    preset = _unfolded() if plan.preset == "unfolded" else plan.preset
    sim = QuantSim(net, images[0], preset, activation=overrides[0], weight=overrides[1])
    sim.model.train()
    if plan.together:
        fxquant.synchronise(sim.program, **plan.options)
    return sim


def _unfolded() -> Pipeline:
    """A pipeline that leaves batch norms what they are."""
    found = load_pipeline("int8_per_channel_qat")
    kept = [item for item in found.prepare_passes if "batch-norm" not in item.name]
    return Pipeline(PassManager(kept), found.finalize_passes)


def train(plan: Plan) -> Trained:
    """Calibrate and train on this process's shards."""
    sim = simulation(plan)
    sim.compute_encodings([shard(images) for images, _ in batches(2, seed=3)])
    sim.program.simulate = plan.simulate
    model: nn.Module = sim.model
    if dist.is_initialized():
        model = DistributedDataParallel(sim.model, forward_sync_buffers=plan.sync_buffers)
    ranges = [tensor for name, tensor in model.named_parameters() if ".range." in name]
    others = [tensor for name, tensor in model.named_parameters() if ".range." not in name]
    optimizer = torch.optim.SGD([{"params": others}, {"params": ranges, "lr": 1e-4}], lr=0.01, momentum=0.9)
    losses = []
    for step, (images, labels) in enumerate(batches(plan.steps, seed=5)):
        if step == plan.frozen_after:
            _freeze(sim, plan.frozen)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(shard(images)), shard(labels))
        loss.backward()
        optimizer.step()
        losses.append(float(mean_of_all(loss.detach())))
    return trained(sim.program, losses)


def _freeze(sim: QuantSim, what: str) -> None:
    if "batch norm" in what:
        sim.freeze_batch_norm()
    if "encodings" in what:
        sim.freeze_encodings()


def error_of_training(plan: Plan) -> str:
    """What `train` raises."""
    try:
        train(plan)
    except RuntimeError as err:
        return str(err)
    return "no error"


def peers_in_groups_of_one() -> tuple[list[Peers], bool]:
    """What synchronising in a group of this process alone, after one in a group of all, leaves: peers, the hook."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    sim = simulation(Plan(together=False))
    fxquant.synchronise(sim.program)
    assert is_synchronised(sim.program)
    fxquant.synchronise(sim.program, groups[dist.get_rank()])
    left = [peers for module in sim.model.modules() if (peers := getattr(module, "peers", None)) is not None]
    return left, is_synchronised(sim.program)


def peers_of_norms_when_synchronised_again() -> list[bool]:
    """Whether batch norms have peers after `synchronise`, and after another one with batch_norm=False."""
    sim = simulation(Plan(together=False))
    found = []
    for batch_norm in (True, False):
        fxquant.synchronise(sim.program, batch_norm=batch_norm)
        norms = [module for module in sim.model.modules() if isinstance(module, BatchStatisticsNorm)]
        found.append(any(norm.peers is not None for norm in norms))
    return found


def mean_of_all(value: torch.Tensor) -> torch.Tensor:
    """The mean over the processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def trained(program: Program, losses: list[float]) -> Trained:
    """What there is to compare."""
    program.module.eval()
    program.simulate = "exact"
    with torch.no_grad():
        logits = program.module(batches(1, seed=9)[0][0])
    program.simulate = "float"
    state = {name: tensor.detach().clone() for name, tensor in program.module.state_dict().items()}
    return Trained(state, grids(program), losses, logits)


def grids(program: Program) -> Grids:
    """Scale and zero point of each value (float64), by the path of its quantizer."""
    found = {}
    for path, module in program.module.named_modules():
        if isinstance(module, FakeQuant):
            found[path] = torch.stack([module.scale.detach().double(), module.zero_point.double()])
    return found


def calibrate(estimator: str, through: bool, counts: tuple[int, ...] = (3, 3), together: bool = True) -> Grids:
    """The grids after calibration; process r has its shards of the first counts[r] whole batches.

    In one process: of what the two would have had.
    """
    torch.manual_seed(0)
    activation = SpecOverride(estimator=estimator)
    sim = QuantSim(Net(), batches(1, seed=3)[0][0], "int8_per_channel", activation=activation)
    if together:
        fxquant.synchronise(sim.program)
    whole = [images for images, _ in batches(max(counts), seed=3)]
    if dist.is_initialized():
        mine = [shard(images) for images in whole[: counts[dist.get_rank()]]]
    else:
        mine = [_of_those_with_a_batch(images, index, counts) for index, images in enumerate(whole)]
    sim.compute_encodings(mine, through_quantizers=through)
    return grids(sim.program)


def _of_those_with_a_batch(images: torch.Tensor, index: int, counts: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([images[rank :: len(counts)] for rank, count in enumerate(counts) if index < count])


def fail_to_calibrate(batches_of: tuple[str, ...]) -> str:
    """The error of a calibration in which process r is given batches of the kind batches_of[r]."""
    sim = simulation(Plan())
    images = [shard(images) for images, _ in batches(2, seed=3)]
    kind = batches_of[dist.get_rank()]
    if kind == "nan":
        images[1][0, 0, 0, 0] = torch.nan
    if kind == "misfit":
        images[1] = images[1][:, 0]
    if kind == "none":
        images = []
    try:
        sim.compute_encodings(_raising(images) if kind == "raising" else images)
    except (fxquant.FxquantError, OSError) as err:
        return f"{type(err).__name__}: {err}"
    return "no error"


def _raising(images: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    yield images[0]
    raise OSError("the disk is gone")


def refused(what: str) -> str:
    """The error of `synchronise` on programs that differ in `what` between the processes."""
    torch.manual_seed(dist.get_rank() if what == "weights" else 0)
    preset = "int8_per_tensor" if what == "specs" and dist.get_rank() else "int8_per_channel"
    sim = QuantSim(Net(), batches(1, seed=3)[0][0], preset)
    try:
        fxquant.synchronise(sim.program)
    except fxquant.FxquantError as err:
        return str(err)
    return "no error"


def alone_in_first(plan: Plan) -> bool:
    """Whether the first process can evaluate, take a snapshot, copy and save by itself."""
    sim = simulation(plan)
    sim.compute_encodings([shard(images) for images, _ in batches(2, seed=3)])
    if dist.get_rank():
        return True
    images = batches(1, seed=3)[0][0]
    with torch.no_grad():
        logits = sim.model.eval()(images)
    twin = pickle.loads(pickle.dumps(sim.program.copy().module))  # has no peers
    twin.train()(images).sum().backward()
    sim.snapshot()
    return bool(torch.isfinite(logits).all())


def norms(kind: str, together: bool = True) -> tuple[torch.Tensor, ...]:
    """Output, gradients (averaged over processes as DistributedDataParallel does) and statistics of one batch norm.

    Arguments:
        kind: "live", "plain" or "plain-1d", or either with "-empty": the second process has no example then.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (6, 3) if "1d" in kind else (6, 3, 4, 5)
    whole, weights = (torch.randn(shape, generator=generator) * 3 + 2 for _ in range(2))
    plain: type[nn.modules.batchnorm._BatchNorm] = nn.BatchNorm1d if "1d" in kind else nn.BatchNorm2d
    norm = plain(3, eps=1e-3, momentum=0.3)
    nn.init.uniform_(norm.weight, -1, 1, generator=generator)
    nn.init.uniform_(norm.bias, -1, 1, generator=generator)
    norm = LiveBatchNorm.of(norm) if kind.startswith("live") else norm
    x = (whole if "empty" in kind and not dist.get_rank() else whole[:0] if "empty" in kind else shard(whole)).clone()
    x.requires_grad_()
    own = weights if len(x) == len(whole) else weights[:0] if not len(x) else shard(weights)
    if together:
        norm = synchronised(norm, Peers())
    ratio = torch.tensor([0.5, -2.0, 1.0])
    out = norm(x, ratio) if kind.startswith("live") else norm(x)
    (out * own).sum().backward()  # the sum over processes is one process's loss
    assert x.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
    for grad in (norm.weight.grad, norm.bias.grad):
        if dist.is_initialized():
            dist.all_reduce(grad)
    return out.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var
