"""freeze-batch-norm: fires, declines with the reason, keeps the outputs, twice is once, golden diff."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxquant.graph.program import Program, Stage
from fxquant.passes import FreezeBatchNorm
from tests.helpers import assert_rewrites, residual_program, run_pass
from tests.passes.harness import Chain, captured, difference, output, randomize, reasons

IMAGE = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))
SIGNAL = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(2))
VOLUME = torch.randn(2, 4, 3, 4, 5, generator=torch.Generator().manual_seed(3))
FROZEN: dict[str, tuple[nn.Module, torch.Tensor]] = {
    "2d": (nn.BatchNorm2d(4, eps=1e-3, momentum=0.03), IMAGE),
    "1d": (nn.BatchNorm1d(4), SIGNAL),
    "3d": (nn.BatchNorm3d(4), VOLUME),
    "affine=False": (nn.BatchNorm2d(4, affine=False), IMAGE),
    "momentum=None": (nn.BatchNorm2d(4, momentum=None), IMAGE),
}


def state(program: Program) -> dict[str, torch.Tensor]:
    """A copy of the program's state."""
    return {key: tensor.clone() for key, tensor in program.module.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two states have the same keys and values."""
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("case", FROZEN)
def test_batch_norm_uses_its_running_statistics_in_train_mode(case: str) -> None:
    norm, x = FROZEN[case]
    model = randomize(Chain(norm=norm, relu=nn.ReLU()))
    expected, program = output(model, x), captured(model, x)
    before = state(program)
    program.module.train()
    assert difference(program, expected, x) > 0.01  # it is live until it is frozen
    program.module.load_state_dict(before)
    entry = run_pass(FreezeBatchNorm(), program)
    assert reasons(entry) == []
    for _ in range(2):
        assert difference(program, expected, x) == 0.0  # in train mode
    assert same(state(program), before)
    program.module.eval()
    assert difference(program, expected, x) == 0.0


def test_gamma_and_beta_still_train_and_statistics_do_not() -> None:
    program = captured(randomize(Chain(conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4))), IMAGE)
    run_pass(FreezeBatchNorm(), program)
    program.module.train()
    before = state(program)
    optimizer = torch.optim.SGD(program.module.parameters(), lr=0.1)
    program.module(IMAGE).square().sum().backward()
    optimizer.step()
    after = state(program)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"conv.weight", "conv.bias", "norm.weight", "norm.bias"}


def test_frozen_state_survives_copy_pickle_and_state_dict() -> None:
    model = randomize(Chain(norm=nn.BatchNorm2d(4), relu=nn.ReLU()))
    expected, program = output(model, IMAGE), captured(model, IMAGE)
    keys = list(state(program))
    run_pass(FreezeBatchNorm(), program)
    for twin in (copy.deepcopy(program.module), pickle.loads(pickle.dumps(program.module)), program.copy().module):
        twin.load_state_dict(program.module.state_dict())
        twin.train()
        assert torch.equal(twin(IMAGE), expected) and torch.equal(twin(IMAGE), expected)
        assert list(twin.state_dict()) == keys


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.norm(torch.relu(self.norm(x))))


def test_module_called_twice_is_frozen_at_both_calls_with_one_node_for_each_tensor() -> None:
    model = randomize(Shared())
    expected, program = output(model, IMAGE), captured(model, IMAGE)
    run_pass(FreezeBatchNorm(), program)
    program.module.train()
    assert difference(program, expected, IMAGE) == 0.0
    assert len([node for node in program.graph.nodes if node.op == "get_attr"]) == 4


class ReadsItsGamma(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.norm(x) * self.norm.weight.square().sum())


def test_tensor_that_is_read_further_down_too_keeps_one_node() -> None:
    model = randomize(ReadsItsGamma())
    expected, program = output(model, IMAGE), captured(model, IMAGE)
    run_pass(FreezeBatchNorm(), program)
    assert [node.name for node in program.graph.nodes if node.target == "norm.weight"] == ["norm_weight"]
    assert difference(program, expected, IMAGE) == 0.0


def test_batch_norm_without_statistics_is_declined_with_the_reason() -> None:
    program = captured(Chain(norm=nn.BatchNorm2d(4, track_running_stats=False)), IMAGE)
    entry = run_pass(FreezeBatchNorm(), program)
    assert reasons(entry) == ["norm not frozen: it keeps no running statistics"] and entry.edits == ()


@pytest.mark.parametrize("stage", [Stage.CAPTURED, Stage.ASSIGNED, Stage.INSERTED, Stage.CALIBRATED])
def test_stage_stays_as_it_is(stage: Stage) -> None:
    program = residual_program()
    program.stage = stage
    run_pass(FreezeBatchNorm(), program)
    assert program.stage is stage


def test_freezing_twice_is_freezing_once() -> None:
    model = Chain(first=nn.BatchNorm2d(4), second=nn.BatchNorm2d(4, track_running_stats=False))
    program = captured(randomize(model), IMAGE)
    first, second = run_pass(FreezeBatchNorm(), program), run_pass(FreezeBatchNorm(), program)
    assert first.edits and second.edits == () and reasons(first) == reasons(second)


def test_golden_diff() -> None:
    program = captured(Chain(norm=nn.BatchNorm2d(4, eps=0.5, momentum=0.25)), IMAGE)
    expected = """
        - norm = BatchNorm2d[norm](x, eps=0.5, momentum=0.25) : float32[s0, 4, 6, 5]  @norm
        + norm_weight = get norm.weight : float32[4]
        + norm_bias = get norm.bias : float32[4]
        + norm_running_mean = get norm.running_mean : float32[4]
        + norm_running_var = get norm.running_var : float32[4]
        + norm = aten.batch_norm(x, norm_weight, norm_bias, norm_running_mean, norm_running_var, training=False, \
momentum=0.25, eps=0.5, cudnn_enabled=True) : float32[s0, 4, 6, 5]  @norm
    """
    assert_rewrites(run_pass(FreezeBatchNorm(), program), expected, edits=9)


@settings(max_examples=10)
@given(st.lists(st.sampled_from(["bn", "bn", "conv", "relu"]), min_size=1, max_size=5), st.integers(0, 1000))
def test_random_chains_keep_their_outputs_bit_for_bit(kinds: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    makers: dict[str, Any] = {"bn": lambda: nn.BatchNorm2d(4), "conv": lambda: nn.Conv2d(4, 4, 1), "relu": nn.ReLU}
    model = randomize(nn.Sequential(*(makers[kind]() for kind in kinds)), seed)
    expected, program = output(model, IMAGE), captured(model, IMAGE)
    run_pass(FreezeBatchNorm(), program)
    program.module.train()
    assert difference(program, expected, IMAGE) == 0.0
