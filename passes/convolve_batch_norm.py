"""Turn batch norms that nothing could absorb into convolutions of one tap: a * x + d for each channel."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage, value_type
from fxquant.graph.rewriter import Rewriter

from .channelwise import Affine
from .norms import affine_of, is_batch_norm, is_training
from .values import makes_codes


@dataclass(frozen=True)
class ConvolveBatchNorm(Pass):
    """Replace a batch norm of rank 3 to 5, whose input comes from an integer kernel, by a depthwise 1 x 1 convolution.

    The batch norms behind a concatenation (DenseNet) and on a branch of their own (RepVGG's identity) have no layer to
    fold into. onnxruntime has no integer kernel for them; as convolutions they run on codes, and take the relu behind
    them along. With a weight scale for each channel the one weight of a channel is exact; with one scale for all it
    would not be, so this belongs in front of 'select-per-channel'. The convolution's weight and bias stand where the
    batch norm's stood.

    Declines, with the reason: a batch norm in training mode, called twice or made a function; one without running
    statistics; input from a float operation; other ranks. Contract: PRESERVES.
    """

    name: ClassVar[str] = "convolve-batch-norm"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Visit every batch norm."""
        norms = [node for node in program.graph.nodes if is_batch_norm(program, node)]
        uses = Counter(id(program.submodule(node)) for node in norms if node.op == "call_module")
        uses.update(id(module) for _, module in program.module.named_modules(remove_duplicate=False))
        for node in norms:
            affine = _affine_or_obstacle(program, node)
            if isinstance(affine, Affine) and uses[id(program.submodule(node))] > 2:  # one call and one name
                affine = "its module is called twice, or has two names"
            if isinstance(affine, str):
                rewriter.miss(node, f"{node.name} stays a batch norm: {affine}")
            else:
                _convolve(program, rewriter, node, affine)


def _affine_or_obstacle(program: Program, node: fx.Node) -> Affine | str:
    x = _source(node)
    found = value_type(x)
    if node.op != "call_module":
        return "it is a function"
    if is_training(program, node):
        return "it is in training mode"
    if found is None or not 3 <= len(found.shape) <= 5:
        return f"{x.name} has {0 if found is None else len(found.shape)} axes"
    if not makes_codes(program, x):
        return f"{x.name} before it has no integer kernel"
    return affine_of(program, node)


def _convolve(program: Program, rewriter: Rewriter, node: fx.Node, affine: Affine) -> None:
    path, module = str(node.target), program.submodule(node)
    found = value_type(node)
    assert found is not None
    axes = len(found.shape) - 2
    trains = any(parameter.requires_grad for parameter in module.parameters())
    values = {"weight": affine.scale.view(-1, *[1] * (axes + 1)), "bias": affine.shift}
    rewriter.remove_module(path)
    rewriter.add_module(path, nn.Module())
    operands = []
    for part, value in values.items():
        place = f"{path}.{part}"
        rewriter.add_tensor(place, value.to(found.dtype), parameter=True, requires_grad=trains)
        operands.append(rewriter.get_attr(place, name=place.replace(".", "_"), before=node, like=node))
    ones, zeros = [1] * axes, [0] * axes
    geometry = (ones, zeros, ones, False, zeros, affine.scale.numel())
    rewriter.turn_into_function(node, torch.ops.aten.convolution.default, (_source(node), *operands, *geometry))


def _source(node: fx.Node) -> fx.Node:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return x
