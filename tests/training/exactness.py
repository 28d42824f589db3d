"""Train a net of the zoo under quantization, then count every code in which it differs from onnxruntime.

The trained program in eval mode, as it stands, is compared: its codes at each quantizer (activations in the `exact` and
the `integer` simulation; weights and biases) and its outputs, with what onnxruntime computes and the file stores; with
them those of the program once `finalize` has rewritten it in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fxquant.graph.batches import placeholder_values
from fxquant.graph.program import Program
from fxquant.numerics.runtime import Array, RuntimeOptions, open_session
from fxquant.parity.certification import Standing
from fxquant.parity.onnx_file import OnnxFile
from fxquant.parity.simulation import find_simulation
from fxquant.sim import QuantSim
from fxquant.spec import SpecOverride
from tests.passes import live
from tests.training.nets import examples, net

BATCH, STEPS, HELD_BACK = 32, 32, 64
TRAINED = 16 * BATCH
ONE_THREAD = RuntimeOptions(threads=1)

# By name: what training does to activations' ranges, and to weights'.
RANGES = {
    "static": ("static", "static"),
    "moving-average": ("moving-average", "static"),
    "lsq": ("lsq", "lsq"),
    "lsq+": ("lsq+", "lsq"),
    "min-max": ("min-max", "min-max"),
    "log2": ("log2", "log2"),
}
# By name: the preset, and whether batch norms are frozen half way.
BATCH_NORMS = {
    "live": ("int8_per_channel_qat", False),
    "frozen half way": ("int8_per_channel_qat", True),
    "folded": ("int8_per_channel", False),
}
BITS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}


@dataclass(frozen=True)
class Recipe:
    """How a net is trained: names of NETS, RANGES, BATCH_NORMS and BITS, the rest as torch has it."""

    net: str
    ranges: str = "static"
    batch_norm: str = "live"
    bits: str = "W8A8"
    optimizer: str = "adam"
    simulate: str = "float"

    def __str__(self) -> str:
        return ", ".join((self.net, self.ranges, self.batch_norm, self.bits, self.optimizer, self.simulate))


@dataclass(frozen=True)
class Trained:
    """What training left.

    Arguments:
        losses: cross entropy of each step's batch; from the freezing of batch norms on, if they were.
        moved: largest change of a weight, as a fraction of the largest magnitude of its tensor.
    """

    sim: QuantSim
    losses: tuple[float, ...]
    moved: float

    @property
    def loss_before(self) -> float:
        """Mean loss of the first quarter of the steps."""
        return sum(self.losses[: len(self.losses) // 4]) / (len(self.losses) // 4)

    @property
    def loss(self) -> float:
        """Mean loss of the last quarter."""
        return sum(self.losses[-(len(self.losses) // 4) :]) / (len(self.losses) // 4)

    @property
    def has_learned(self) -> bool:
        """Whether the loss fell and weights moved."""
        return self.loss < self.loss_before and self.moved > 1e-2


def prepared(recipe: Recipe) -> QuantSim:
    """The recipe's net, calibrated."""
    preset, _ = BATCH_NORMS[recipe.batch_norm]
    activation, weight = RANGES[recipe.ranges]
    weight_bits, activation_bits = BITS[recipe.bits]
    images, _ = examples(recipe.net, TRAINED)
    sim = QuantSim(
        net(recipe.net),
        (images[:2],),
        preset,
        activation=SpecOverride(bits=activation_bits, training=activation),
        weight=SpecOverride(bits=weight_bits, training=weight),
    )
    sim.compute_encodings(list(torch.split(images, 4 * BATCH)), progress=False)
    return sim


def batches(recipe: Recipe, steps: int = STEPS) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Seeded batches of digits in the shape that the net takes."""
    images, labels = examples(recipe.net, TRAINED)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        chosen = torch.randint(0, TRAINED, (BATCH,), generator=generator)
        yield images[chosen], labels[chosen]


def optimizer_of(recipe: Recipe, sim: QuantSim) -> torch.optim.Optimizer:
    """Adam at 0.01, or SGD with momentum at 0.02; a tenth for ranges."""
    groups: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
    for name, parameter in sim.model.named_parameters():
        groups[name.startswith("fake_quants.")].append(parameter)
    rate = 0.01 if recipe.optimizer == "adam" else 0.02
    described = [{"params": groups[False], "lr": rate}, {"params": groups[True], "lr": 0.1 * rate}]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(described)
    return torch.optim.SGD(described, momentum=0.9)


def trained(recipe: Recipe, steps: int = STEPS) -> Trained:
    """Train; the program is in eval mode afterwards, in the `exact` simulation."""
    sim = prepared(recipe)
    before = {name: parameter.detach().clone() for name, parameter in sim.model.named_parameters()}
    optimizer, losses = optimizer_of(recipe, sim), list[float]()
    sim.program.simulate = recipe.simulate
    sim.model.train()
    torch.manual_seed(2)  # of dropout
    for step, (images, labels) in enumerate(batches(recipe, steps)):
        loss = functional.cross_entropy(sim.model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        if step + 1 == steps // 2 and BATCH_NORMS[recipe.batch_norm][1]:
            sim.freeze_batch_norm()
            losses.clear()  # they jump: running statistics lag behind those of the batches
            for group in optimizer.param_groups:
                group["lr"] *= 0.1
    sim.model.eval()
    sim.program.simulate = "exact"
    after = {name: parameter.detach() for name, parameter in sim.model.named_parameters()}
    moved = [_share(before[name], after[name]) for name in before if after[name].ndim > 1]
    return Trained(sim, tuple(losses), max(moved))


def _share(old: torch.Tensor, new: torch.Tensor) -> float:
    return float((new - old).abs().max() / old.abs().max().clamp(min=1e-6))


@dataclass(frozen=True)
class Difference:
    """What was compared, and what differed.

    Arguments:
        compared: how many codes and outputs.
        differing: how many of them differ, by what was compared with what; only what is not 0.
        uncertified: values whose codes are not promised to be onnxruntime's.
        islands: values that onnxruntime computes in float, in an order of its own: `exact` may round otherwise there.
    """

    compared: int
    differing: Mapping[str, int] = field(default_factory=dict)
    uncertified: tuple[str, ...] = ()
    islands: tuple[str, ...] = ()

    @property
    def broken(self) -> int:
        """How many differ though they are promised: all, but for `exact` where there are float islands.

        The `integer` simulation lets onnxruntime compute those, and has no excuse.
        """
        if not self.islands:
            return self.total
        return sum(count for name, count in self.differing.items() if name.startswith("integer: "))

    @property
    def total(self) -> int:
        """How many codes and outputs differ."""
        return sum(self.differing.values())


def compare(sim: QuantSim, images: torch.Tensor, folder: Path) -> Difference:
    """Compare a trained program, as it stands in eval mode, with onnxruntime's run of its export; then finalize it."""
    program = sim.program
    found = {form: codes_of(program, images, form) for form in ("exact", "integer")}
    with torch.no_grad():
        outputs = sim.model(images).numpy()
    path = sim.export(folder)
    expected = runtime_codes(program, path, images)
    report = sim.check_parity(path, [images])
    sim.pipeline.finalize(program)
    found["finalized"] = codes_of(program, images, "exact")
    counts = {f"{form}: {name}": n for form, codes in found.items() for name, n in count(codes, expected).items()}
    real = open_session(path, ONE_THREAD).run({"x": images.numpy()})
    with torch.no_grad():
        again = program.module(images).numpy()
    counts["outputs"] = differing(outputs, next(iter(real.values())))
    counts["finalized outputs"] = differing(outputs, again)
    counts["parity"] = report.codes_differing + len(report.stored)
    compared = sum(codes.size for codes in expected.values()) * len(found) + 2 * outputs.size
    uncertified = tuple(row.value for row in report.rows_that_are(Standing.UNCERTIFIED))
    islands = tuple(row.value for row in report.rows_that_are(Standing.ISLAND))
    return Difference(compared, {name: n for name, n in counts.items() if n}, uncertified, islands)


def codes_of(program: Program, images: torch.Tensor, form: str) -> dict[str, Array]:
    """Codes by quantizer: of activations as `form` computes them, of weights and biases as the modules do."""
    constant = live.codes(program, images)
    inputs = placeholder_values(program, images)
    steps = find_simulation(form, 21).run(program, inputs, {})
    activations = {step.node.name: step.value.numpy() for step in steps if not step.is_output}
    return {name: codes.numpy() for name, codes in constant.items()} | activations


def runtime_codes(program: Program, path: Path, images: torch.Tensor) -> dict[str, Array]:
    """Codes by quantizer, as the file stores them or onnxruntime computes them."""
    file = OnnxFile(path)
    tensors = {name: found[0].codes for name, found in file.quantizers().items()}
    computed = [tensor for tensor in tensors.values() if not file.is_constant(tensor)]
    session = open_session(file.with_outputs(computed), ONE_THREAD, data_folder=file.data_folder)
    found: dict[str, Any] = session.run({"x": images.numpy()})
    stored = {tensor: file.constant(tensor) for tensor in tensors.values() if file.is_constant(tensor)}
    return {name: (found | stored)[tensor].astype(np.int64) for name, tensor in tensors.items()}


def count(codes: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, int]:
    """How many codes differ, by quantizer; both have the same ones. A weight may be stored transposed."""
    assert codes.keys() == expected.keys(), sorted(codes.keys() ^ expected.keys())
    return {name: min(differing(view, expected[name]) for view in _views(codes[name])) for name in codes}


def _views(codes: Array) -> Iterator[Array]:
    yield codes
    yield from (codes.transpose(axes) for axes in permutations(range(codes.ndim)) if codes.ndim == 2)


def differing(one: Array, other: Array) -> int:
    """How many numbers differ; all of them where the shapes do."""
    return int((one != other).sum()) if one.shape == other.shape else max(one.size, other.size)
