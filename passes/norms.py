"""Batch norms as passes see them: a module of its own, or aten.batch_norm as freeze-batch-norm leaves it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from fxquant.graph.program import Program
from fxquant.graph.rewriter import Rewriter
from fxquant.graph.statistics import ChannelStatistics
from fxquant.numerics.live_batch_norm import LiveBatchNorm

from .channelwise import Affine, batch_norm_affine

BatchNorm = nn.modules.batchnorm._BatchNorm
_MEAN, _TRAINING, _EPS = 3, 5, 7  # argument positions of aten.batch_norm


def is_batch_norm(program: Program, node: fx.Node) -> bool:
    """Whether a node normalises with a batch norm that has tensors of its own, and is no live one."""
    if node.op == "call_module":
        module = program.submodule(node)
        return isinstance(module, BatchNorm) and not isinstance(module, LiveBatchNorm)
    target = torch.ops.aten.batch_norm.default
    return node.op == "call_function" and node.target is target and isinstance(node.args[_MEAN], fx.Node)


def is_live_batch_norm(program: Program, node: fx.Node) -> bool:
    """Whether a node calls a batch norm whose fold the layer in front of it simulates."""
    return node.op == "call_module" and isinstance(program.submodule(node), LiveBatchNorm)


def in_front_of_live(program: Program, value: fx.Node) -> fx.Node:
    """The layer whose output a live batch norm passes on; of another value, itself."""
    layer = value.args[0] if is_live_batch_norm(program, value) else value
    assert isinstance(layer, fx.Node)
    return layer


def batch_norm_owner(program: Program, norm: fx.Node) -> nn.Module:
    """The module that holds a batch norm's tensors."""
    if norm.op == "call_module":
        return program.submodule(norm)
    mean = norm.args[_MEAN]
    assert isinstance(mean, fx.Node)
    path = str(mean.target).rpartition(".")[0] if mean.op == "get_attr" else ""
    return program.module.get_submodule(path)


def is_training(program: Program, norm: fx.Node) -> bool:
    """Whether a batch norm with running statistics uses its batch's own instead."""
    if norm.op == "call_function":
        return bool(norm.args[_TRAINING])
    module: Any = program.submodule(norm)
    return module.running_mean is not None and bool(module.training)


def batch_norm_eps(program: Program, norm: fx.Node) -> float:
    """What a batch norm adds to the variance."""
    eps: Any = norm.args[_EPS] if norm.op == "call_function" else batch_norm_owner(program, norm).eps
    return float(eps)


def affine_of(program: Program, norm: fx.Node) -> Affine | str:
    """What a batch norm does to each channel; else why that is not known."""
    operands = norm.args[1:5] if norm.op == "call_function" else ()
    computed = [node.name for node in operands if isinstance(node, fx.Node) and node.op != "get_attr"]
    if computed:
        return f"its tensors are computed ({', '.join(computed)})"
    if norm.op == "call_function":
        tensors = [program.tensor(node) if isinstance(node, fx.Node) else None for node in operands]
    else:
        module: Any = program.submodule(norm)
        tensors = [module.weight, module.bias, module.running_mean, module.running_var]
    gamma, beta, mean, var = tensors
    if mean is None or var is None:
        return "it keeps no running statistics"
    affine = batch_norm_affine(gamma, beta, mean, var, batch_norm_eps(program, norm))
    finite = bool(torch.isfinite(affine.scale).all() and torch.isfinite(affine.shift).all())
    return affine if finite else "its statistics or parameters are not finite"


def output_statistics(program: Program, norm: fx.Node, affine: Affine) -> ChannelStatistics:
    """Mean and deviation of what a batch norm gives, which maps each channel by `affine`, on batches like those that
    its running statistics average: beta, and |gamma| sqrt(var / (var + eps)).
    """
    if norm.op == "call_function":
        mean, var = (program.tensor(node) for node in norm.args[3:5] if isinstance(node, fx.Node))
    else:
        module: Any = program.submodule(norm)
        mean, var = module.running_mean, module.running_var
    shift = affine.scale * mean.detach().double() + affine.shift
    return ChannelStatistics.of(shift, affine.scale.abs() * var.detach().double().sqrt())


def readers_by_tensor(program: Program) -> dict[int, fx.Node]:
    """The nodes that read parameters and buffers, by the id of the tensor."""
    return {id(program.tensor(node)): node for node in program.graph.nodes if node.op == "get_attr"}


def read_tensors(
    rewriter: Rewriter, norm: fx.Node, module: nn.Module, readers: dict[int, fx.Node], *, before: fx.Node
) -> list[fx.Node | None]:
    """The nodes that read gamma, beta, mean and variance of the batch norm that `norm` calls, all of them in front of
    `before`.

    There is one for each tensor, as everywhere in a program: `readers` are those that are there, and gets the new ones.
    """
    operands: list[fx.Node | None] = []
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(module, name)
        if tensor is not None and id(tensor) not in readers:
            path = f"{norm.target}.{name}"
            readers[id(tensor)] = rewriter.get_attr(path, name=path.replace(".", "_"), before=before, like=norm)
        operands.append(None if tensor is None else readers[id(tensor)])
    move_in_front(rewriter, operands, before)
    return operands


def move_in_front(rewriter: Rewriter, readers: Iterable[fx.Node | None], before: fx.Node) -> None:
    """Move those readers that stand behind `before` in front of it: another node, further down, asked first."""
    for reader in readers:
        if reader is not None and before < reader:
            rewriter.move(reader, before=before)
