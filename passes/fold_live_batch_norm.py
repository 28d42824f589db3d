"""Compute the folds that live batch norms simulate, once and for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.constants import Constants
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage
from fxquant.graph.rewriter import Rewriter
from fxquant.numerics.live_batch_norm import BATCH_NORM_SHIFT, SCALE_CHANNELS, BatchNormShift

from .fold_batch_norm import free_path, remove_unused, shared_tensors
from .fold_constants import replace_by_buffer
from .norms import is_live_batch_norm


@dataclass(frozen=True)
class FoldLiveBatchNorm(Pass):
    """Put the folded weights and biases where simulate-batch-norm-fold computes them, and drop the live batch norms.

    1. A weight or bias of one layer alone takes the folded values itself.
    2. A layer without a bias gets one beside its weight.
    3. A weight or bias that is tied, read elsewhere or computed stays, and the layer gets a buffer of its own.
    4. Alike for batch norms that were frozen.

    The values are those that eval() computed, by the same operators: no code changes. A batch norm's module goes once
    nothing reads it. Contract: PRESERVES.
    """

    name: ClassVar[str] = "fold-live-batch-norm"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED, Stage.ASSIGNED, Stage.INSERTED, Stage.CALIBRATED)
    contract: ClassVar[Contract] = Contract.PRESERVES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Compute every fold before the first one is stored: layers may share what they are computed from."""
        constants, shared = Constants(program), shared_tensors(program)
        folds = {node: constants.tensor(node) for node in program.graph.nodes if _is_fold(program, node)}
        owners = {id(_owner(program, node)) for node in folds if node.target is not SCALE_CHANNELS}
        inputs = [node for node in program.graph.nodes if constants.is_constant(node)]
        for node in list(program.graph.nodes):
            if is_live_batch_norm(program, node):
                assert isinstance(node.args[0], fx.Node)
                rewriter.replace_uses(node, node.args[0])
                rewriter.erase(node)
        for node, value in folds.items():
            _store(program, rewriter, node, value, shared)
        rewriter.erase_dead(*reversed(inputs))
        remove_unused(program, rewriter, owners)


def _is_fold(program: Program, node: fx.Node) -> bool:
    is_shift = node.op == "call_module" and isinstance(program.submodule(node), BatchNormShift)
    return is_shift or node.target in (SCALE_CHANNELS, BATCH_NORM_SHIFT)


def _owner(program: Program, node: fx.Node) -> torch.nn.Module:
    """The module that holds the tensors of the batch norm whose folded bias `node` is."""
    mean = node.args[2]
    assert isinstance(mean, fx.Node)
    return program.module.get_submodule(str(mean.target).rpartition(".")[0])


def _store(program: Program, rewriter: Rewriter, fold: fx.Node, value: torch.Tensor, shared: dict[int, str]) -> None:
    operand = fold.args[0]
    if isinstance(operand, fx.Node):
        if operand.op == "get_attr" and list(operand.users) == [fold] and id(program.tensor(operand)) not in shared:
            rewriter.set_tensor(str(operand.target), value.to(program.tensor(operand).device))  # case 1
            rewriter.replace_uses(fold, operand)
        else:
            replace_by_buffer(rewriter, fold, value)  # case 3
        return
    weight = _weight_beside(program, fold)  # case 2
    like = program.tensor(weight)
    path = free_path(program, str(weight.target))
    rewriter.add_tensor(path, value.to(like.device), parameter=True, requires_grad=like.requires_grad)
    rewriter.replace_uses(fold, rewriter.get_attr(path, name=path.replace(".", "_"), before=fold, like=fold))


def _weight_beside(program: Program, shift: fx.Node) -> fx.Node:
    """The weight, stored by now, of the one layer that adds the folded bias `shift`."""
    (reader,) = shift.users
    weight = reader.args[2 if program.bias_fake_quant(reader) is not None else 1]
    while isinstance(weight, fx.Node) and weight.op != "get_attr":
        weight = weight.args[0]
    assert isinstance(weight, fx.Node)
    return weight
