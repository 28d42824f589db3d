"""Batch norms as passes see them: a module of its own, or aten.batch_norm as freeze-batch-norm leaves it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxquant.graph.program import Program

from .channelwise import Affine, batch_norm_affine

BatchNorm = nn.modules.batchnorm._BatchNorm
_MEAN, _TRAINING, _EPS = 3, 5, 7  # argument positions of aten.batch_norm


def is_batch_norm(program: Program, node: fx.Node) -> bool:
    """Whether a node normalises with a batch norm that has tensors of its own."""
    if node.op == "call_module":
        return isinstance(program.submodule(node), BatchNorm)
    target = torch.ops.aten.batch_norm.default
    return node.op == "call_function" and node.target is target and isinstance(node.args[_MEAN], fx.Node)


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


def affine_of(program: Program, norm: fx.Node) -> Affine | str:
    """What a batch norm does to each channel; else why that is not known."""
    operands = norm.args[1:5] if norm.op == "call_function" else ()
    computed = [node.name for node in operands if isinstance(node, fx.Node) and node.op != "get_attr"]
    if computed:
        return f"its tensors are computed ({', '.join(computed)})"
    if norm.op == "call_function":
        tensors = [program.tensor(node) if isinstance(node, fx.Node) else None for node in operands]
        eps: Any = norm.args[_EPS]
    else:
        module: Any = program.submodule(norm)
        tensors, eps = [module.weight, module.bias, module.running_mean, module.running_var], module.eps
    gamma, beta, mean, var = tensors
    if mean is None or var is None:
        return "it keeps no running statistics"
    affine = batch_norm_affine(gamma, beta, mean, var, eps)
    finite = bool(torch.isfinite(affine.scale).all() and torch.isfinite(affine.shift).all())
    return affine if finite else "its statistics or parameters are not finite"
