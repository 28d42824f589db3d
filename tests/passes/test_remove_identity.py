"""remove-identity: fires, declines with the reason, keeps the outputs, twice is once, golden diff."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fxquant.passes import RemoveIdentity
from tests.helpers import Builder, assert_rewrites, run_pass
from tests.passes.harness import Chain, captured, difference, output, reasons

aten = torch.ops.aten
IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
Function = Callable[[torch.Tensor], torch.Tensor]


class Around(nn.Module):
    """A function between two exponentials, so that the program does not begin or end with it."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(self.function(torch.exp(x)))


IDENTITIES: dict[str, Function] = {
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "detach": lambda x: x.detach(),
    "cast": lambda x: x.to(torch.float32),
    "add 0": lambda x: x + 0,
    "subtract 0.0": lambda x: x - 0.0,
    "multiply by 1": lambda x: 1 * x,
    "divide by 1": lambda x: x / 1,
    "power 1": lambda x: x**1,
    "reshape": lambda x: x.reshape(x.shape[0], 4, 6, 6),
    "view": lambda x: x.view(x.shape),
    "flatten of one axis": lambda x: x.flatten(2, 2),
    "squeeze of an axis of 4": lambda x: x.squeeze(1),
    "expand": lambda x: x.expand(x.shape[0], 4, -1, 6),
    "repeat": lambda x: x.repeat(1, 1, 1, 1),
    "slice": lambda x: x[:, 0:4],
    "permute": lambda x: x.permute(0, 1, -2, -1),
    "transpose": lambda x: x.transpose(1, -3),
    "cat": lambda x: torch.cat([x], 1),
    "pad": lambda x: F.pad(x, (0, 0, 0, 0)),
    "reflection pad": lambda x: F.pad(x, (0, 0, 0, 0), mode="reflect"),
    "maximum pooling": lambda x: F.max_pool2d(x, 1),
    "average pooling": lambda x: F.avg_pool2d(x, 1, 1),
    "adaptive pooling": lambda x: F.adaptive_avg_pool2d(x, 6),
    "clamp without bounds": lambda x: x.clamp(-float("inf"), float("inf")),
    "hardtanh without bounds": lambda x: F.hardtanh(x, -float("inf"), float("inf")),
    "several": lambda x: ((x + 0) * 1).clone().reshape(x.shape),
}

BEHIND: dict[str, tuple[Function, str]] = {
    "relu of relu": (lambda x: torch.relu(torch.relu(x)), "relu"),
    "relu of relu6": (lambda x: torch.relu(F.relu6(x)), "hardtanh"),
    "relu6 of relu6": (lambda x: F.relu6(F.relu6(x)), "hardtanh"),
    "relu of sigmoid": (lambda x: torch.relu(torch.sigmoid(x)), "sigmoid"),
    "clamp of softmax": (lambda x: torch.softmax(x, 1).clamp(0, 1), "softmax"),
}

KEPT: dict[str, Function] = {
    "add 1": lambda x: x + 1,
    "multiply by -1": lambda x: x * -1,
    "swap": lambda x: x.transpose(2, 3),
    "slice": lambda x: x[:, 1:],
    "every other": lambda x: x[:, ::2],
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "pad": lambda x: F.pad(x, (1, 0)),
    "cat": lambda x: torch.cat([x, x], 1),
    "pooling with stride": lambda x: F.max_pool2d(x, 1, 2),
    "pooling": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "pooling with a divisor": lambda x: F.avg_pool2d(x, 1, 1, divisor_override=2),
    "relu": lambda x: torch.relu(x),
    "relu6 of relu": lambda x: F.relu6(torch.relu(x)),
    "clamp of sigmoid": lambda x: torch.sigmoid(x).clamp(0.1, 1),
}


@pytest.mark.parametrize("case", IDENTITIES)
def test_identity_is_removed(case: str) -> None:
    model = Around(IDENTITIES[case])
    before, program = output(model, IMAGE), captured(model, IMAGE)
    entry = run_pass(RemoveIdentity(), program)
    assert [node.name for node in program.graph.nodes] == ["x", "exp", "exp_1", "output"]
    assert reasons(entry) == [] and difference(program, before, IMAGE) == 0.0


@pytest.mark.parametrize("case", BEHIND)
def test_clip_of_what_is_within_its_bounds_is_removed(case: str) -> None:
    function, left = BEHIND[case]
    model = Around(function)
    before, program = output(model, IMAGE), captured(model, IMAGE)
    run_pass(RemoveIdentity(), program)
    assert [node.name for node in program.graph.nodes] == ["x", "exp", left, "exp_1", "output"]
    assert difference(program, before, IMAGE) == 0.0


@pytest.mark.parametrize("case", KEPT)
def test_what_computes_something_is_kept(case: str) -> None:
    program = captured(Around(KEPT[case]), IMAGE)
    entry = run_pass(RemoveIdentity(), program)
    assert entry.edits == () and reasons(entry) == []


@pytest.mark.parametrize(
    "target", [aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default]
)
def test_copy_that_a_pass_left_behind_is_removed(target: object) -> None:
    build = Builder()
    x = build.input("x", 4, 6, 6)
    build.output(build.relu("relu", build.call("copy", target, x)))
    program = build.program()
    run_pass(RemoveIdentity(), program)
    assert [node.name for node in program.graph.nodes] == ["x", "relu", "output"]


def test_slice_over_a_symbolic_size_is_removed_with_the_size_that_it_read() -> None:
    model = Around(lambda x: x.reshape(x.shape[0], x.shape[1], 6, 6))
    program = captured(model, IMAGE)
    run_pass(RemoveIdentity(), program)
    assert not [node for node in program.graph.nodes if "sym_size" in str(node.target)]


class AsIntegers(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 2


class TimesOne(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0


def test_result_of_another_dtype_is_declined_with_the_reason() -> None:
    integers = torch.arange(8).reshape(2, 4)
    program = captured(Chain(cast=AsIntegers(), one=TimesOne()), integers)
    entry = run_pass(RemoveIdentity(), program)
    assert reasons(entry) == ["one not removed: it makes float32[s0, 4] of int64[s0, 4]"]


def test_dropout_is_removed_when_it_drops_nothing_and_declined_with_the_reason_otherwise() -> None:
    model = Chain(first=nn.Dropout(0.0), relu=nn.ReLU(), second=nn.Dropout2d(0.25))
    program = captured(model, IMAGE)
    entry = run_pass(RemoveIdentity(), program)
    assert [node.name for node in program.graph.nodes] == ["x", "relu", "second", "output"]
    assert reasons(entry) == ["second not removed: it drops 0.25 of its values in training"]
    assert sorted(dict(program.module.named_children())) == ["second"]
    run_pass(RemoveIdentity(dropout=True), program)
    assert [node.name for node in program.graph.nodes] == ["x", "relu", "output"]


class DropsTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.drop(torch.exp(self.drop(x))))


def test_dropout_called_twice_is_removed_whole() -> None:
    program = captured(DropsTwice(), IMAGE)
    run_pass(RemoveIdentity(), program)
    assert [node.name for node in program.graph.nodes] == ["x", "exp", "relu", "output"]
    assert not dict(program.module.named_children())


class NamedTwice(nn.Module):
    """One block under two names, as CoaT's parallel blocks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = DropsTwice()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.first(x))
        return found


def test_dropout_of_a_block_with_two_names_is_removed_whole() -> None:
    model = NamedTwice()
    expected, program = output(model, IMAGE), captured(model, IMAGE)
    run_pass(RemoveIdentity(), program)
    assert [node.op for node in program.graph.nodes if node.op == "call_module"] == []
    assert not [path for path, _ in program.module.named_modules(remove_duplicate=False) if path.endswith("drop")]
    assert difference(program, expected, IMAGE) == 0.0


def test_removing_twice_is_removing_once() -> None:
    program = captured(Chain(a=Around(IDENTITIES["several"]), b=nn.Dropout(0.5)), IMAGE)
    first, second = run_pass(RemoveIdentity(), program), run_pass(RemoveIdentity(), program)
    assert first.edits and second.edits == ()
    assert reasons(first) == reasons(second) == ["b not removed: it drops 0.5 of its values in training"]


def test_golden_diff() -> None:
    program = captured(Around(lambda x: torch.relu(torch.relu(x * 1))), IMAGE)
    expected = """
        - mul = aten.mul(exp, other=1) : float32[s0, 4, 6, 6]
        - relu = aten.relu(mul) : float32[s0, 4, 6, 6]
        - relu_1 = aten.relu(relu) : float32[s0, 4, 6, 6]
        - exp_1 = aten.exp(relu_1) : float32[s0, 4, 6, 6]
        + relu = aten.relu(exp) : float32[s0, 4, 6, 6]
        + exp_1 = aten.exp(relu) : float32[s0, 4, 6, 6]
    """
    assert_rewrites(run_pass(RemoveIdentity(), program), expected, edits=4)


@settings(max_examples=10)
@given(st.lists(st.sampled_from([*IDENTITIES, *BEHIND, *KEPT]), min_size=1, max_size=4))
def test_random_chains_keep_their_outputs_bit_for_bit(cases: list[str]) -> None:
    # Every function sees an image: what changes the shape ends the chain.
    functions = [IDENTITIES.get(case) or (BEHIND[case][0] if case in BEHIND else KEPT[case]) for case in cases]

    def chain(x: torch.Tensor) -> torch.Tensor:
        for function in functions:
            if x.shape[1:] == IMAGE.shape[1:]:
                x = function(x)
        return x

    model = Around(chain)
    before, program = output(model, IMAGE), captured(model, IMAGE)
    run_pass(RemoveIdentity(), program)
    assert difference(program, before, IMAGE) == 0.0
    assert run_pass(RemoveIdentity(), program).edits == ()
