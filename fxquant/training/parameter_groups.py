"""Parameter groups for optimizers: weights, norms and biases, and learned ranges."""

from __future__ import annotations

import sys
from numbers import Real
from typing import Any

import torch
from torch import nn

from fxquant.errors import ConfigError
from fxquant.graph.program import Program
from fxquant.numerics.trained_ranges import TrainedRange

WEIGHTS, NORMS_AND_BIASES, RANGES = "weights", "norms and biases", "ranges"


def parameter_groups(
    program: Program | nn.Module,
    learning_rate: float,
    range_learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The trainable parameters, each once, as groups for any torch optimizer; the key "name" says which is which.

        "weights"             two dimensions or more: decayed
        "norms and biases"    one dimension or none: not decayed
        "ranges"              what range learning made parameters of: not decayed, with a learning rate of their own

    A group that would be empty is left out; so is what has requires_grad=False. Decay would pull ranges to zero.

    Arguments:
        program: a program, its module, or what wraps it (DistributedDataParallel, torch.compile).
        learning_rate: of weights, norms and biases.
        range_learning_rate: of ranges; None for the same.
        weight_decay: of weights.

    Raises ConfigError for a rate or decay that is negative or not finite, and if nothing is trainable.
    """
    rates = (learning_rate, learning_rate if range_learning_rate is None else range_learning_rate, weight_decay)
    for name, number in zip(("learning_rate", "range_learning_rate", "weight_decay"), rates, strict=True):
        _require_rate(name, number)
    groups = {
        WEIGHTS: {"lr": rates[0], "weight_decay": rates[2]},
        NORMS_AND_BIASES: {"lr": rates[0], "weight_decay": 0.0},
        RANGES: {"lr": rates[1], "weight_decay": 0.0},
    }
    members = _members(program.module if isinstance(program, Program) else program)
    found: list[dict[str, Any]] = [
        {"name": name, "params": members[name], **options} for name, options in groups.items() if members[name]
    ]
    if not found:
        remedy = "Training needs parameters with requires_grad=True."
        raise ConfigError("parameter_groups", expected="at least one trainable parameter", got="none", remedy=remedy)
    return found


def _require_rate(name: str, number: Any) -> None:
    is_number = isinstance(number, (Real, torch.Tensor)) and not isinstance(number, bool)
    if is_number and 0 <= number <= sys.float_info.max:
        return
    raise ConfigError(
        f"parameter_groups: {name}",
        expected="a number that is not negative",
        got=repr(number),
        remedy=f"Write a number: {name}=1e-4, say.",
    )


def _members(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters by the name of their group, in the module's order; a tied one has one place."""
    ranges = {id(one) for part in module.modules() if isinstance(part, TrainedRange) for one in part.parameters()}
    members: dict[str, list[nn.Parameter]] = {WEIGHTS: [], NORMS_AND_BIASES: [], RANGES: []}
    for parameter in module.parameters():  # a tied one is there once
        if parameter.requires_grad:
            kind = RANGES if id(parameter) in ranges else WEIGHTS if parameter.ndim > 1 else NORMS_AND_BIASES
            members[kind].append(parameter)
    return members
