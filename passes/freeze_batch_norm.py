"""Make batch norms use their running statistics in train() too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxquant.calibration import settle
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage
from fxquant.graph.rewriter import Rewriter
from fxquant.numerics.live_batch_norm import (
    BATCH_NORM_RATIO,
    BATCH_NORM_SHIFT,
    BatchNormRatio,
    BatchNormShift,
    LiveBatchNorm,
)

from .norms import BatchNorm, read_tensors, readers_by_tensor


@dataclass(frozen=True)
class FreezeBatchNorm(Pass):
    """Call aten.batch_norm with training=False in place of each batch norm module, on the same tensors.

    What is frozen shows in the graph and survives copies, saving and train(), because it is the graph: there is no
    flag. gamma and beta still train; the statistics and num_batches_tracked stand still. The module stays as the
    holder of its tensors, so the state_dict keeps its keys. fold-batch-norm takes the frozen form as it takes the live
    one.

    1. A batch norm with running statistics, with or without gamma and beta, in training mode or not.
    2. A module called twice: each call becomes a function of the same tensors.
    3. A live batch norm (simulate-batch-norm-fold): its call goes, and the layer in front computes with the folded
       weight and bias in train() as it does in eval().

    Declines a batch norm that keeps no running statistics. Contract: PRESERVES (what eval() computes, and from now on
    train()).
    """

    name: ClassVar[str] = "freeze-batch-norm"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED, Stage.ASSIGNED, Stage.INSERTED, Stage.CALIBRATED)
    contract: ClassVar[Contract] = Contract.PRESERVES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Visit every call of a batch norm module."""
        readers, folds = readers_by_tensor(program), 0
        for node in list(program.graph.nodes):
            module: Any = program.submodule(node) if node.op == "call_module" else None
            if isinstance(module, (BatchNormRatio, BatchNormShift)):  # case 3
                _freeze_fold(rewriter, node, module)
                folds += 1
            elif isinstance(module, LiveBatchNorm):
                rewriter.replace_uses(node, node.all_input_nodes[0])
                rewriter.erase(node)
            if isinstance(module, LiveBatchNorm) or not isinstance(module, BatchNorm):
                continue
            if module.running_mean is None:
                rewriter.miss(node, f"{node.name} not frozen: it keeps no running statistics")
                continue
            operands = read_tensors(rewriter, node, module, readers, before=node)
            momentum = 0.0 if module.momentum is None else module.momentum  # not used, as training=False
            rest = (False, momentum, module.eps, torch.backends.cudnn.enabled)
            rewriter.turn_into_function(node, torch.ops.aten.batch_norm.default, (node.args[0], *operands, *rest))
        if folds and program.stage is Stage.CALIBRATED:  # train() is to compute with the grids of eval() too
            for path in settle(program):
                rewriter.record(path, "grid computed from the folded weight")


def _freeze_fold(rewriter: Rewriter, node: fx.Node, module: BatchNormRatio | BatchNormShift) -> None:
    if isinstance(module, BatchNormRatio):
        rewriter.turn_into_function(node, BATCH_NORM_RATIO, (*node.args, module.eps))
    else:
        rewriter.turn_into_function(node, BATCH_NORM_SHIFT, node.args)
