"""Freezing batch norms and encodings half way through training."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from fxquant.graph.manager import PassManager
from fxquant.graph.pipeline import Pipeline, load_pipeline
from fxquant.graph.program import Stage
from fxquant.numerics.fake_quant import Mode
from fxquant.sim import QuantSim
from tests.training.exactness import Recipe, batches, compare, optimizer_of, prepared
from tests.training.nets import examples, net

Freeze = Callable[[QuantSim], None]
FREEZES: dict[str, Freeze] = {"batch norm": QuantSim.freeze_batch_norm, "encodings": QuantSim.freeze_encodings}
RECIPES = (Recipe("residual", "lsq+"), Recipe("nested", "moving-average"), Recipe("tiny variance", "static", "live"))


def train(sim: QuantSim, optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int = 2) -> None:
    """A few steps, in training mode at the end."""
    sim.model.train()
    for images, labels in batches(recipe, steps):
        optimizer.zero_grad()
        functional.cross_entropy(sim.model(images), labels).backward()
        optimizer.step()


def tensors(sim: QuantSim) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in sim.model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that are not what they were."""
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("order", list(permutations(FREEZES)), ids=" then ".join)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_training_goes_on_with_the_same_parameters_when_frozen_half_way(
    recipe: Recipe, order: tuple[str, ...], tmp_path: Path
) -> None:
    sim = prepared(recipe)
    optimizer = optimizer_of(recipe, sim)
    parameters = {name: id(parameter) for name, parameter in sim.model.named_parameters()}
    for name in order:
        train(sim, optimizer, recipe)
        FREEZES[name](sim)
        assert sim.model.training and sim.program.stage is Stage.CALIBRATED
    assert {name: id(parameter) for name, parameter in sim.model.named_parameters()} == parameters
    before = tensors(sim)
    train(sim, optimizer, recipe)
    moved = changed(before, tensors(sim))
    assert {name for name, _ in net(recipe.net).named_parameters()} <= moved
    assert not [name for name in moved if "running" in name or "tracked" in name]
    assert not [name for name in moved if name.endswith((".scale", ".zero_point")) and ".range." not in name]
    assert all(module.mode is Mode.FROZEN for _, module in sim.program.fake_quant_nodes())
    sim.model.eval()
    sim.program.simulate = "exact"
    images, _ = examples(recipe.net, 16)
    assert compare(sim, images, tmp_path).total == 0


@pytest.mark.parametrize("name", FREEZES)
def test_freezing_twice_is_once_when_nothing_ran_between(name: str) -> None:
    sim = prepared(RECIPES[0])
    train(sim, optimizer_of(RECIPES[0], sim), RECIPES[0])
    FREEZES[name](sim)
    graph, before, modes = str(sim.program), tensors(sim), [m.mode for _, m in sim.program.fake_quant_nodes()]
    FREEZES[name](sim)
    assert str(sim.program) == graph and not changed(before, tensors(sim))
    assert [module.mode for _, module in sim.program.fake_quant_nodes()] == modes


def test_freezing_again_holds_what_was_trained_since_when_ranges_are_frozen() -> None:
    sim = prepared(RECIPES[0])
    optimizer = optimizer_of(RECIPES[0], sim)
    sim.freeze_encodings()
    before = tensors(sim)
    train(sim, optimizer, RECIPES[0])
    sim.freeze_encodings()
    assert not [name for name in changed(before, tensors(sim)) if name.startswith("fake_quants.")]


@pytest.mark.parametrize("simulate", ["float", "exact"])
@pytest.mark.parametrize("name", ["residual", "zero-init residual", "all gammas 0", "tiny variance", "transposed"])
@pytest.mark.parametrize("ranges", ["static", "lsq+"])
def test_train_and_eval_compute_the_same_when_batch_norms_are_frozen(name: str, ranges: str, simulate: str) -> None:
    recipe = Recipe(name, ranges)
    sim = prepared(recipe)
    optimizer = optimizer_of(recipe, sim)
    train(sim, optimizer, recipe)
    sim.freeze_batch_norm()
    images, _ = examples(name, 16)
    assert_same_in_both_modes(sim, images, simulate)
    train(sim, optimizer, recipe)
    sim.model.eval()
    assert_same_in_both_modes(sim, images, simulate)


def assert_same_in_both_modes(sim: QuantSim, images: torch.Tensor, simulate: str) -> None:
    """Bit for bit; the program is left in training mode, in the float simulation."""
    sim.program.simulate = simulate
    with torch.no_grad():
        found = sim.model(images)
        assert torch.equal(sim.model.eval()(images), found)
        assert torch.equal(sim.model.train()(images), found)
    sim.program.simulate = "float"


def test_train_and_eval_differ_when_batch_norms_are_live() -> None:
    sim = prepared(RECIPES[0])
    images, _ = examples("residual", 16)
    with torch.no_grad():
        assert not torch.equal(sim.model.train()(images), sim.model.eval()(images))


@pytest.mark.parametrize("name", ["residual", "shared conv, two norms", "two norms on one conv"])
def test_program_is_exact_when_batch_norms_were_frozen_before_calibration(name: str, tmp_path: Path) -> None:
    images, _ = examples(name, 64)
    sim = QuantSim(net(name), (images[:2],), "int8_per_channel_qat")
    assert sim.program.stage is Stage.INSERTED
    sim.freeze_batch_norm()
    sim.compute_encodings([images], progress=False)
    before = tensors(sim)
    train(sim, optimizer_of(Recipe(name), sim), Recipe(name))
    assert not [tensor for tensor in changed(before, tensors(sim)) if "running" in tensor]
    sim.model.eval()
    sim.program.simulate = "exact"
    assert compare(sim, images[:16], tmp_path).total == 0


@pytest.mark.parametrize("position", ["first", "last"])
def test_pipeline_freezes_when_the_pass_stands_in_it(position: str, tmp_path: Path) -> None:
    live = load_pipeline("int8_per_channel_qat")
    freeze = live.make_pass("freeze-batch-norm")
    passes = (freeze, *live.prepare_passes) if position == "first" else (*live.prepare_passes, freeze)
    images, _ = examples("residual", 64)
    frozen = QuantSim(net("residual"), (images[:2],), Pipeline(PassManager(passes), live.finalize_passes))
    by_hand = QuantSim(net("residual"), (images[:2],), live)
    by_hand.freeze_batch_norm()
    for sim in (frozen, by_hand):
        sim.compute_encodings([images], progress=False)
        train(sim, optimizer_of(Recipe("residual"), sim), Recipe("residual"))
    learned, wanted = (tensors(sim) for sim in (frozen, by_hand))
    assert not changed({name: learned[name] for name in net("residual").state_dict()}, wanted)
    frozen.model.eval()
    frozen.program.simulate = "exact"
    assert compare(frozen, images[:16], tmp_path).total == 0
