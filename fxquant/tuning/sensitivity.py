"""Sensitivity: the damage that one group's quantizers do to the output alone, all others being off.

    damage = mean over the float outputs of   sum (y_hat - y)^2 / sum y^2        (the inverse of the SQNR)

The quantizers of a group are those of what its operations read, of their weights, and of what they give, as an integer
kernel writes codes: a value that cannot take 8 bits weighs on those who read it and on those who make it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxquant.graph.batches import Batch, as_arguments
from fxquant.graph.program import Program
from fxquant.graph.segment import in_eval_mode
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.tuning.groups import FOLLOWERS, Group, definition_of

WORST = 1e6  # stands for damage without a finite number


def outputs_of(program: Program, batches: Sequence[Batch]) -> list[list[torch.Tensor]]:
    """The float outputs of each batch, in float64, in eval mode without gradients."""
    found = []
    for batch in batches:
        args, kwargs = as_arguments(batch)
        with torch.no_grad(), in_eval_mode(program.module):
            leaves = pytree.tree_leaves(program.module(*args, **kwargs))
        floats = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        found.append([leaf.double() for leaf in floats])
    return found


def damage_of(
    program: Program, group: Group, batches: Sequence[Batch], expected: Sequence[Sequence[torch.Tensor]]
) -> float:
    """What the quantizers of one group do to the outputs of a calibrated program; `expected` are the float model's."""
    with _only(program, quantizers_of(program, group)):
        found = outputs_of(program, batches)
    ratios = []
    for leaf in range(len(expected[0])):
        noise = sum(float(((y[leaf] - x[leaf]) ** 2).sum()) for x, y in zip(found, expected, strict=True))
        signal = sum(float((y[leaf] ** 2).sum()) for y in expected)
        ratios.append(noise / signal if signal else float(noise > 0))
    damage = math.fsum(ratios) / len(ratios) if ratios else 0.0
    return min(damage, WORST) if math.isfinite(damage) else WORST


def quantizers_of(program: Program, group: Group) -> list[FakeQuant]:
    """The FakeQuants of what a group's operations read, of their weights and of what they give."""
    found = []
    for node in map(program.node, group.names):
        nodes = [*node.all_input_nodes, *_behind(program, node)]
        found += [quant for quant in map(program.fake_quant, nodes) if quant is not None]
    return list({id(quant): quant for quant in found}.values())


def _behind(program: Program, node: fx.Node) -> Iterator[fx.Node]:
    """The FakeQuants' nodes behind a node, also behind the relus and reshapes that follow it."""
    for user in node.users:
        if program.fake_quant(user) is not None:
            yield user
        elif (definition := definition_of(program, user)) is not None and definition.role_for(user) in FOLLOWERS:
            yield from _behind(program, user)


@contextmanager
def _only(program: Program, wanted: Sequence[FakeQuant]) -> Iterator[None]:
    """All other FakeQuants off inside."""
    kept = {id(module) for module in wanted}
    others = {id(module): module for _, module in program.fake_quant_nodes() if id(module) not in kept}
    before = [(module, module.mode) for module in others.values()]
    for module, _ in before:
        module.mode = Mode.OFF
    try:
        yield
    finally:
        for module, mode in before:
            module.mode = mode
        program.module.settle()
