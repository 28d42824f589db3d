"""Say 'global average pooling' where a model says mean over the spatial axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage, ValueType, value_type
from fxquant.graph.rewriter import Rewriter
from fxquant.ops._emit import argument, axes_of

aten = torch.ops.aten

_POOLS = {1: aten.adaptive_avg_pool1d.default, 2: aten.adaptive_avg_pool2d.default, 3: aten.adaptive_avg_pool3d.default}
_CHANNELS_FIRST = frozenset(
    (
        aten.convolution.default, aten.batch_norm.default, aten.instance_norm.default, aten.group_norm.default,
        aten.max_pool1d.default, aten.avg_pool1d.default, aten.adaptive_avg_pool1d.default,
    )
)  # fmt: skip


@dataclass(frozen=True)
class ExposeGlobalPool(Pass):
    """Replace a mean over all spatial axes by adaptive average pooling to size 1.

    1. mean(x, axes 2 and up, keepdim=True) of rank 4 or 5 -> adaptive_avg_pool(x, 1), under the mean's name.
    2. With keepdim=False, `<name>_pool` and a flattening to [N, C] under the mean's name.
    3. Rank 3 likewise, where the value is known to be [N, C, L]: a convolution, pooling or batch norm made it,
       perhaps with elementwise operations behind. Otherwise it may be [N, tokens, C], whose mean over the last axis
       is part of a norm.

    onnxruntime has an integer kernel for GlobalAveragePool and none for ReduceMean: this saves a float island. Adaptive
    pooling stays as it is. Declines, with the reason, means over other axes and in another dtype. Contract: PRESERVES.
    """

    name: ClassVar[str] = "expose-global-pool"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Visit every mean."""
        for node in list(program.graph.nodes):
            if node.target is not aten.mean.dim:
                continue
            reason = _obstacle(program, node)
            if reason:
                rewriter.miss(node, f"{node.name} is not global pooling: {reason}")
            else:
                _expose(rewriter, node)


def _obstacle(program: Program, node: fx.Node) -> str:
    x = argument(node, "self")
    found = value_type(x)
    rank = 0 if found is None else len(found.shape)
    if found is None or not 3 <= rank <= 5:
        return f"{x.name} has {rank} axes"
    axes, spatial = axes_of(argument(node, "dim"), rank), list(range(2, rank))
    if axes != spatial:
        return f"its axes {axes} of {x.name} are not all spatial ones, {spatial}"
    dtype = argument(node, "dtype")
    if dtype not in (None, found.dtype):
        return f"it computes in {dtype}, {x.name} is {found.dtype}"
    if rank == 3 and not _is_channels_first(program, x):
        return f"{x.name} is not known to be [N, C, L] (no convolution, pooling or batch norm made it)"  # case 3
    return ""


def _is_channels_first(program: Program, value: fx.Node) -> bool:
    """Whether what made a value, through operations that keep its shape, has its channels on axis 1."""
    kind, pending, seen = value_type(value), [value], {value}
    while pending:
        node = pending.pop()
        if node.target in _CHANNELS_FIRST or (
            node.op == "call_module" and isinstance(program.submodule(node), nn.BatchNorm1d)
        ):
            return True
        for source in node.all_input_nodes:
            if source not in seen and value_type(source) == kind:
                seen.add(source)
                pending.append(source)
    return False


def _expose(rewriter: Rewriter, node: fx.Node) -> None:
    x = argument(node, "self")
    found = value_type(x)
    assert found is not None
    axes = len(found.shape) - 2
    if argument(node, "keepdim"):
        rewriter.turn_into_function(node, _POOLS[axes], (x, [1] * axes))  # case 1
        return
    kind = ValueType((*found.shape[:2], *[1] * axes), found.dtype)
    pool = rewriter.call_function(
        _POOLS[axes], (x, [1] * axes), name=f"{node.name}_pool", before=node, like=node, type=kind
    )
    rewriter.turn_into_function(node, aten.flatten.using_ints, (pool, 1))  # case 2
