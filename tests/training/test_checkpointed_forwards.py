"""Gradient checkpointing of several forwards before one backward: each is recomputed from what it used itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxquant.errors import FxquantError
from tests.training.residual import FOLDED, LIVE, batches, simulated

WAYS = [(LIVE, None), (LIVE, "lsq+"), (LIVE, "min-max"), (FOLDED, "lsq")]


def views(count: int) -> list[torch.Tensor]:
    """Batches whose variances differ."""
    return [batch * (1 + 2 * index) for index, batch in enumerate(batches(count))]


def gradients(module: nn.Module, inputs: list[torch.Tensor], reentrant: bool | None) -> dict[str, torch.Tensor]:
    """Of a loss over all outputs, forwards checkpointed unless `reentrant` is None."""
    module.zero_grad()
    outputs = [
        module(x) if reentrant is None else checkpoint(module, x.clone().requires_grad_(), use_reentrant=reentrant)
        for x in inputs
    ]
    loss: torch.Tensor = torch.stack([(1.0 + index) * out.square().mean() for index, out in enumerate(outputs)]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: one.grad.clone() for name, one in module.named_parameters() if one.grad is not None}


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative, of the parameters that have a gradient beyond rounding; sums are added in another order."""
    assert found.keys() == expected.keys() and expected
    size = max(float(grad.norm()) for grad in expected.values())
    return max(
        float((grad - found[name]).norm()) / (float(grad.norm()) + 1e-4 * size) for name, grad in expected.items()
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("preset", "training"), WAYS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_gradients_are_those_without_checkpointing(
    preset: str, training: str | None, reentrant: bool, count: int
) -> None:
    module = simulated(preset, training).model.train()
    twin = copy.deepcopy(module)
    for _ in range(2):
        expected = gradients(module, views(count), None)
        assert largest_error(gradients(twin, views(count), reentrant), expected) < 1e-5
        for (name, one), other in zip(module.named_buffers(), twin.buffers(), strict=True):
            assert "running" not in name or torch.equal(one, other)  # grids are of the weight as last seen


def test_forwards_without_checkpointing_or_gradient_in_between_do_no_harm() -> None:
    module = simulated(LIVE, "lsq").model.train()
    twin = copy.deepcopy(module)
    found = []
    for one, checkpointed in ((module, False), (twin, True)):
        first, second, third = views(3)
        out = checkpoint(one, first, use_reentrant=False) if checkpointed else one(first)
        with torch.no_grad():
            one(second)
        loss = out.square().mean() + one(third).square().mean()
        loss.backward()
        found.append({name: tensor.grad for name, tensor in one.named_parameters() if tensor.grad is not None})
    assert largest_error(found[1], found[0]) < 1e-5


def test_forward_with_moving_averages_is_recomputed_if_it_is_the_latest() -> None:
    module = simulated(LIVE, "moving-average(0.01)").model.train()
    twin = copy.deepcopy(module)
    for view in views(2):
        assert largest_error(gradients(twin, [view], False), gradients(module, [view], None)) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_moving_averages_that_moved_on_are_refused_and_frozen_ones_are_not(reentrant: bool) -> None:
    sim = simulated(LIVE, "moving-average(0.01)")
    module = sim.model.train()
    with pytest.raises(FxquantError, match="a moving average is recomputed; expected the latest .*freeze_encodings"):
        gradients(module, views(2), reentrant)
    sim.freeze_encodings()
    twin = copy.deepcopy(sim.model)
    expected = gradients(sim.model, views(2), None)
    assert largest_error(gradients(twin, views(2), reentrant), expected) < 1e-5


def test_forward_that_is_kept_no_more_is_refused() -> None:
    module = simulated(LIVE).model.train()
    first = checkpoint(module, batches()[0], use_reentrant=False)
    for _ in range(64):
        module(batches()[1])
    with pytest.raises(FxquantError, match="expected one of the latest 64 .*Call backward for fewer forwards at once"):
        first.sum().backward()
