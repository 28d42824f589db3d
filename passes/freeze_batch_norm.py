"""Make batch norms use their running statistics in train() too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage
from fxquant.graph.rewriter import Rewriter

from .norms import BatchNorm


@dataclass(frozen=True)
class FreezeBatchNorm(Pass):
    """Call aten.batch_norm with training=False in place of each batch norm module, on the same tensors.

    What is frozen shows in the graph and survives copies, saving and train(), because it is the graph: there is no
    flag. gamma and beta still train; the statistics and num_batches_tracked stand still. The module stays as the
    holder of its tensors, so the state_dict keeps its keys. fold-batch-norm takes the frozen form as it takes the live
    one.

    1. A batch norm with running statistics, with or without gamma and beta, in training mode or not.
    2. A module called twice: each call becomes a function of the same tensors.

    Declines a batch norm that keeps no running statistics. Contract: PRESERVES (what eval() computes, and from now on
    train()).
    """

    name: ClassVar[str] = "freeze-batch-norm"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED, Stage.ASSIGNED, Stage.INSERTED, Stage.CALIBRATED)
    contract: ClassVar[Contract] = Contract.PRESERVES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Visit every call of a batch norm module."""
        order = {node: place for place, node in enumerate(program.graph.nodes)}
        readers = {id(program.tensor(node)): node for node in order if node.op == "get_attr"}
        for node in order:
            module: Any = program.submodule(node) if node.op == "call_module" else None
            if not isinstance(module, BatchNorm):
                continue
            if module.running_mean is None:
                rewriter.miss(node, f"{node.name} not frozen: it keeps no running statistics")
                continue
            operands = _read(rewriter, node, module, readers)
            for reader in operands:
                if reader is not None and order.get(reader, -1) > order[node]:
                    rewriter.move(reader, before=node)  # another node, further down, was the first to read it
                    order[reader] = order[node]
            momentum = 0.0 if module.momentum is None else module.momentum  # not used, as training=False
            rest = (False, momentum, module.eps, torch.backends.cudnn.enabled)
            rewriter.turn_into_function(node, torch.ops.aten.batch_norm.default, (node.args[0], *operands, *rest))


def _read(rewriter: Rewriter, norm: fx.Node, module: BatchNorm, readers: dict[int, fx.Node]) -> list[fx.Node | None]:
    """The nodes that read gamma, beta, mean and variance: one for each tensor, as everywhere in a program."""
    operands: list[fx.Node | None] = []
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(module, name)
        if tensor is not None and id(tensor) not in readers:
            path = f"{norm.target}.{name}"
            readers[id(tensor)] = rewriter.get_attr(path, name=path.replace(".", "_"), before=norm, like=norm)
        operands.append(None if tensor is None else readers[id(tensor)])
    return operands
