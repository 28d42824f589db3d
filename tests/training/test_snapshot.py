"""What looks at a program while it trains changes nothing: not a bit of training's, at whatever moment it looks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils import _pytree as pytree

import fxquant
from fxquant.graph.program import Stage
from fxquant.sim import QuantSim
from tests.training.exactness import Recipe, batches, codes_of, count, optimizer_of, prepared
from tests.training.nets import examples

Look = Callable[[QuantSim, Path], object]
SLOW = ("snapshot", "export", "check_parity", "export_onnx")
STEPS = 2
RARELY = 5  # how many moments lie between two looks that take long; a step has 6
# Dropout, moving ranges and learned ones; biases that raise weights' scales; frozen ranges; folded batch norms.
RECIPES = (
    Recipe("inverted residual", "lsq+"),
    Recipe("linear", "moving-average"),
    Recipe("tiny variance", "static"),
    Recipe("all gammas 0", "lsq", "folded", "W4A4", simulate="exact"),
)


def export(sim: QuantSim, folder: Path) -> None:
    """Write a copy's files."""
    sim.export(folder)


def compare(sim: QuantSim, folder: Path) -> None:
    """Export, and compare a copy with it."""
    images, _ = examples("residual", 4)
    shape = next(node for node in sim.program.graph.nodes if node.op == "placeholder").meta["type"].shape
    sim.check_parity(sim.export(folder), [images.reshape(4, *shape[1:])])


def export_program(sim: QuantSim, folder: Path) -> None:
    """Write a snapshot by hand, and run it."""
    twin = sim.snapshot()
    fxquant.export_onnx(twin, folder / "snapshot.onnx")
    shape = next(node for node in twin.graph.nodes if node.op == "placeholder").meta["type"].shape
    twin.module(torch.ones(2, *shape[1:]))


LOOKS: dict[str, Look] = {
    "snapshot": lambda sim, folder: sim.snapshot(),
    "export": export,
    "check_parity": compare,
    "export_onnx": export_program,
    "coverage": lambda sim, folder: str(sim.program.coverage()),
    "print": lambda sim, folder: str(sim.program) + repr(sim.model),
    "fingerprint": lambda sim, folder: sim.program.fingerprint(),
    "save": lambda sim, folder: sim.program.save(folder / "program.fxq"),
}


def state_of(sim: QuantSim, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that training depends on, as bytes and plain values."""
    modules = dict(sim.model.named_modules())
    return {
        "tensors": {name: bits(tensor) for name, tensor in sim.model.state_dict().items()},
        "gradients": {name: bits(parameter.grad) for name, parameter in sim.model.named_parameters()},
        "identities": {name: id(parameter) for name, parameter in sim.model.named_parameters()},
        "optimizer": pytree.tree_map_only(torch.Tensor, bits, optimizer.state_dict()),
        "flags": {name: module.training for name, module in modules.items()},
        "modes": [module.mode for _, module in sim.program.fake_quant_nodes()],
        "estimators": {name: module.extra_repr() for name, module in modules.items()},
        "rest": (sim.program.stage, sim.program.simulate, sim.program.notes, str(sim.program.graph)),
        "random": (bits(torch.get_rng_state()), random.getstate(), np.random.get_state()[1].tolist()),  # type: ignore[index]
    }


def bits(tensor: torch.Tensor | None) -> tuple[object, ...] | None:
    """A tensor as something that == compares bit for bit."""
    if tensor is None:
        return None
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), tensor.requires_grad, raw


def run(recipe: Recipe, look: Look | None, folder: Path, every: int = 1) -> tuple[dict[str, Any], list[float]]:
    """Train with two micro-batches a step, and look at each `every`th moment; returns the last state, and losses."""
    sim, losses, moments = prepared(recipe), list[float](), itertools.count()
    optimizer = optimizer_of(recipe, sim)
    sim.program.simulate = recipe.simulate
    torch.manual_seed(2)

    def moment() -> None:
        if look is not None and next(moments) % every == 0:
            before = state_of(sim, optimizer)
            look(sim, folder)
            after = state_of(sim, optimizer)
            assert [key for key in before if before[key] != after[key]] == []

    moment()  # in eval mode, right after calibration
    sim.model.train()
    for images, labels in batches(recipe, STEPS):
        moment()
        for part, wanted in zip(images.split(16), labels.split(16), strict=True):
            found = sim.model(part)
            moment()  # between forward and backward
            loss = functional.cross_entropy(found, wanted)
            loss.backward()
            losses.append(loss.item())
            moment()  # gradients half accumulated, then complete
        optimizer.step()
        moment()  # weights have moved; grids have not followed yet
        optimizer.zero_grad()
    final = state_of(sim, optimizer)
    del final["identities"]
    return final, losses


@cache
def undisturbed(recipe: Recipe) -> tuple[dict[str, Any], list[float]]:
    """The same run, alone."""
    return run(recipe, None, Path())


@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize("recipe", RECIPES[:1], ids=str)
def test_training_goes_on_bit_for_bit_when_looked_at(recipe: Recipe, name: str, tmp_path: Path) -> None:
    every = RARELY if name in SLOW else 1
    assert run(recipe, LOOKS[name], tmp_path, every) == undisturbed(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize("recipe", RECIPES[1:], ids=str)
def test_training_of_other_nets_goes_on_bit_for_bit_when_looked_at(recipe: Recipe, name: str, tmp_path: Path) -> None:
    assert run(recipe, LOOKS[name], tmp_path) == undisturbed(recipe)


@pytest.mark.parametrize("recipe", [*RECIPES[2:], Recipe("all gammas 0", "lsq")], ids=str)
def test_training_goes_on_bit_for_bit_when_evaluated_in_place_at_the_start_of_a_step(recipe: Recipe) -> None:
    def train(evaluates: bool) -> dict[str, Any]:
        sim = prepared(recipe)
        optimizer = optimizer_of(recipe, sim)
        torch.manual_seed(2)
        for images, labels in batches(recipe, STEPS):
            if evaluates:
                sim.model.eval()(images)
            optimizer.zero_grad()
            functional.cross_entropy(sim.model.train()(images), labels).backward()
            optimizer.step()
        return {name: bits(parameter) for name, parameter in sim.model.named_parameters()}

    assert train(True) == train(False)


def test_states_differ_when_a_look_disturbs() -> None:
    def disturbing(sim: QuantSim, folder: Path) -> None:
        quantizer = next(module for _, module in sim.program.fake_quant_nodes())
        quantizer.scale_floor += 1e-9

    with pytest.raises(AssertionError, match="tensors"):
        run(RECIPES[0], disturbing, Path())


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_snapshot_is_what_the_program_in_eval_mode_computes_when_taken_in_training(recipe: Recipe) -> None:
    sim = prepared(recipe)
    optimizer = optimizer_of(recipe, sim)
    sim.model.train()
    for images, labels in batches(recipe, STEPS):
        optimizer.zero_grad()
        functional.cross_entropy(sim.model(images), labels).backward()
        optimizer.step()
    twin = sim.snapshot()
    assert twin.stage is Stage.FINALIZED and not twin.module.training and sim.model.training
    assert not any(module.training for module in twin.module.modules())
    own = {id(tensor) for tensor in (*sim.model.parameters(), *sim.model.buffers())}
    assert own.isdisjoint(id(tensor) for tensor in (*twin.module.parameters(), *twin.module.buffers()))
    images, _ = examples(recipe.net, 8)
    sim.model.eval()
    differences = count(codes_of(sim.program, images, "exact"), codes_of(twin, images, "exact"))
    assert differences and not any(differences.values())
