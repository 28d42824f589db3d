"""reestimate_batch_norm: averages over batches, with the quantizers on, and nothing else changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

import fxquant
from fxquant.errors import CalibrationError
from fxquant.numerics.live_batch_norm import LiveBatchNorm
from fxquant.sim import QuantSim
from tests.passes.harness import captured
from tests.training.exactness import Recipe, compare, prepared
from tests.training.nets import examples, net
from tests.training.test_snapshot import bits, state_of

STATISTICS = ("running_mean", "running_var")


def batches(name: str, count: int = 4) -> list[torch.Tensor]:
    """Batches of 32 digits."""
    return list(examples(name, 32 * count)[0].split(32))


def live(sim: QuantSim) -> dict[str, LiveBatchNorm]:
    """The live batch norms by path."""
    return {name: module for name, module in sim.model.named_modules() if isinstance(module, LiveBatchNorm)}


def by_hand(sim: QuantSim, path: str, data: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Averages of what a batch norm reads, per channel: of means, and of unbiased variances."""
    seen: list[torch.Tensor] = []
    twin = sim.program.copy()
    twin.module.eval()
    twin.module.training = True
    for module in twin.module.modules():
        if isinstance(module, LiveBatchNorm):
            module.train().momentum = 0.0
    hook = twin.module.get_submodule(path).register_forward_pre_hook(
        lambda _, args: seen.append((args[0] / args[1].view(-1, *[1] * (args[0].ndim - 2))).double())
    )
    with torch.no_grad():
        for batch in data:
            twin.module(batch)
    hook.remove()
    axes = [0, *range(2, seen[0].ndim)]
    means, variances = ([f(one) for one in seen] for f in (lambda z: z.mean(axes), lambda z: z.var(axes, correction=1)))
    return torch.stack(means).mean(0), torch.stack(variances).mean(0)


@pytest.mark.parametrize("name", ["residual", "linear", "shared conv, one norm"])
def test_statistics_are_averages_over_the_batches(name: str) -> None:
    sim = prepared(Recipe(name))
    expected = {path: by_hand(sim, path, batches(name)) for path in live(sim)}
    found = fxquant.reestimate_batch_norm(sim.program, batches(name), progress=False)
    assert found.batches == 4 and found.before.keys() == expected.keys()
    for path, norm in live(sim).items():
        for statistic, wanted in zip(STATISTICS, expected[path], strict=True):
            assert torch.allclose(norm.get_buffer(statistic).double(), wanted, rtol=1e-4, atol=1e-6), (path, statistic)


def test_batch_norms_that_stay_modules_are_estimated_too_when_nothing_is_quantized() -> None:
    model, data = net("residual"), batches("residual")
    program = captured(net("residual"), data[0])
    fxquant.reestimate_batch_norm(program, data, progress=False)
    seen: list[torch.Tensor] = []
    model.get_submodule("bn").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in data:
            model(batch)
    means = torch.stack([one.mean((0, 2, 3)) for one in seen]).mean(0)
    assert torch.allclose(program.module.get_buffer("bn.running_mean"), means, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("recipe", [Recipe("linear", "moving-average"), Recipe("nested", "lsq+")], ids=str)
def test_nothing_else_changes(recipe: Recipe, training: bool) -> None:
    sim = prepared(recipe)
    sim.model.train(training)
    optimizer = torch.optim.SGD(sim.model.parameters(), lr=0.1)
    momenta = {path: norm.momentum for path, norm in live(sim).items()}
    before = state_of(sim, optimizer)
    found = fxquant.reestimate_batch_norm(sim.program, batches(recipe.net), progress=False)
    after = state_of(sim, optimizer)
    tensors = {name for name in before["tensors"] if before["tensors"][name] != after["tensors"][name]}
    statistics = {f"{path}.{name}" for path in live(sim) for name in STATISTICS}
    followers = tuple(f"{node.target}." for node, module in sim.program.fake_quant_nodes() if module.follows)
    assert statistics <= tensors
    assert all(name in statistics or name.startswith(followers) for name in tensors)
    assert [key for key in before if key != "tensors" and before[key] != after[key]] == []
    assert {path: norm.momentum for path, norm in live(sim).items()} == momenta
    assert not any(norm._forward_hooks for norm in live(sim).values())
    found.undo()
    again = state_of(sim, optimizer)["tensors"]
    assert all(again[name] == before["tensors"][name] for name in statistics)


@pytest.mark.parametrize("ranges", ["static", "lsq+"])
def test_program_is_exact_and_its_loss_falls_when_statistics_had_been_spoiled(ranges: str, tmp_path: Path) -> None:
    sim = prepared(Recipe("residual", ranges))
    images, labels = examples("residual", 256)

    def loss() -> float:
        with torch.no_grad():
            return functional.cross_entropy(sim.model.eval()(images), labels).item()

    right = loss()
    for norm in live(sim).values():
        norm.get_buffer("running_mean").add_(1.0)
        norm.get_buffer("running_var").mul_(9.0)
    spoiled = loss()
    fxquant.reestimate_batch_norm(sim.program, batches("residual", 8), progress=False)
    assert loss() < 0.5 * (right + spoiled) < spoiled
    sim.program.simulate = "exact"
    assert compare(sim, images[:16], tmp_path).total == 0


def test_at_most_so_many_batches_are_read() -> None:
    sim, source = prepared(Recipe("linear")), iter(batches("linear"))
    assert fxquant.reestimate_batch_norm(sim.program, source, max_batches=3, progress=False).batches == 3
    assert len(list(source)) == 1


def test_weight_grids_follow_at_once_and_go_back_with_undo() -> None:
    sim = prepared(Recipe("residual"))
    sim.model.eval()

    def grids() -> list[torch.Tensor]:
        return [module.scale.clone() for _, module in sim.program.fake_quant_nodes() if module.follows]

    def settled() -> list[torch.Tensor]:
        sim.model.settle()
        return grids()

    before = grids()
    found = fxquant.reestimate_batch_norm(sim.program, [3.0 * one for one in batches("residual")], progress=False)
    after = grids()
    assert all(map(torch.equal, after, settled())) and not all(map(torch.equal, after, before))
    found.undo()
    assert all(map(torch.equal, grids(), before))


@pytest.mark.parametrize("count", [0, -1])
def test_fewer_than_one_batch_is_refused(count: int) -> None:
    sim = prepared(Recipe("linear"))
    with pytest.raises(CalibrationError, match=f"max_batches; expected 1 or more; got {count}"):
        fxquant.reestimate_batch_norm(sim.program, batches("linear"), max_batches=count, progress=False)


def refused(sim: QuantSim, data: list[torch.Tensor], message: str) -> None:
    """It raises, and all is as before."""
    optimizer = torch.optim.SGD(sim.model.parameters(), lr=0.1)
    before = state_of(sim, optimizer)
    with pytest.raises(CalibrationError, match=message):
        fxquant.reestimate_batch_norm(sim.program, data, progress=False)
    assert state_of(sim, optimizer) == before


def test_programs_without_live_batch_norms_are_refused_by_name() -> None:
    frozen, folded = prepared(Recipe("residual")), prepared(Recipe("residual", batch_norm="folded"))
    frozen.freeze_batch_norm()
    refused(frozen, batches("residual"), "none that is live: bn, an1, an2.*Call it before batch norms are frozen")
    refused(folded, batches("residual"), "or they were folded.*_qat preset")


def test_programs_that_observe_are_refused() -> None:
    images = batches("residual")[0]
    sim = QuantSim(net("residual"), (images[:2],), "int8_per_channel_qat")
    refused(sim, [images], "expected a grid for every value.*Calibrate")


def test_bad_batches_are_refused_by_number() -> None:
    sim = prepared(Recipe("linear"))
    sim.model.train()
    good = batches("linear")[0]
    refused(sim, [], "at least one batch")
    refused(sim, [good, good.repeat(1, 2, 1, 1)], "batch 1")
    refused(sim, [good, good[:1]], "batch 1.*more than 1 value per channel")


def test_statistics_that_are_not_finite_are_refused_by_name() -> None:
    program = captured(net("residual"), batches("residual")[0])
    before = bits(program.module.get_buffer("bn.running_mean"))
    with pytest.raises(CalibrationError, match="statistics of 'bn' are not finite in batch 1"):
        good = batches("residual")[0]
        fxquant.reestimate_batch_norm(program, [good, good * float("inf")], progress=False)
    assert bits(program.module.get_buffer("bn.running_mean")) == before
