"""Seeded inputs for the tests of operations, and the role that the default table gives the call in a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxquant.ops.base import Role
from fxquant.ops.table import TABLE
from tests.ops.harness import _batched, _Call, capture_for_test


def floats(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal float32 numbers, twice as wide as the unit."""
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def positive(*shape: int, seed: int = 0) -> torch.Tensor:
    """float32 numbers above 0.1."""
    return floats(*shape, seed=seed).abs() + 0.1


def integers(*shape: int, seed: int = 0, low: int = -9, high: int = 10) -> torch.Tensor:
    """int64 numbers of at least `low` and below `high`."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def bools(*shape: int, seed: int = 0) -> torch.Tensor:
    """Booleans."""
    return integers(*shape, seed=seed) > 0


def node_of(function: Callable[..., Any], inputs: Sequence[Any]) -> fx.Node:
    """The last call in the captured graph of `function`, with a symbolic batch."""
    program = capture_for_test(_Call(function), inputs, _batched(inputs, True))
    calls: list[fx.Node] = [node for node in program.graph.nodes if node.op == "call_function"]
    return calls[-1]


def role_of(function: Callable[..., Any], inputs: Sequence[Any]) -> Role:
    """The role of the last call in `function`."""
    node = node_of(function, inputs)
    definition = TABLE.find(node)
    assert definition is not None, f"{node.target} is not in the table"
    return definition.role_for(node)
