"""Fold batch norms into the convolutions and linears next to them (channelwise.py has the algebra)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from fxquant.errors import PassError
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage, describe, value_type
from fxquant.graph.rewriter import Rewriter

from .channelwise import Affine, fold_before, fold_behind
from .layers import RESHAPES, Layer, as_layer, layer_ahead, user_list
from .norms import BatchNorm, affine_of, batch_norm_owner, is_batch_norm, is_training, output_statistics

_SHAPE_READERS = (torch.ops.aten.reshape_as.default, torch.ops.aten.view_as.default, torch.ops.aten.expand_as.default)


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold each batch norm into the layer before it, else into the layer behind it.

    1. Behind a convolution of any rank, grouped or transposed, with or without a bias.
    2. Behind a linear of rank 2, or of any rank whose tokens were flattened to [rows, features] for the batch norm.
    3. Before a convolution that does not pad (or any, where the batch norm does not shift), or a linear of rank 2.
       Poolings and a flattening may stand between: they commute with a * x + d (max pooling where a >= 0).
    4. Alike for affine=False, and for a batch norm that freeze-batch-norm made a function.

    A layer without a bias gets one beside its weight. What the batch norm of cases 1 and 2 says of its output, mean and
    deviation, stays with the layer (fxquant.graph.statistics); its module goes once nothing calls or reads it.
    Declines, with the reason: the layer has other users; its weight or bias is used twice, tied or computed; the batch
    norm keeps no running statistics, or some that are not finite; both its neighbours are something else; the folded
    weight overflows its dtype. Refuses a batch norm in training mode. Contract: PRESERVES.

    Arguments:
        forward: whether case 3 is allowed.
    """

    forward: bool = True

    name: ClassVar[str] = "fold-batch-norm"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Fold backward in graph order, then the rest forward in reverse order: so chains fold whole."""
        norms = [node for node in program.graph.nodes if is_batch_norm(program, node)]
        for node in norms:
            _require_eval(program, node)
        folder = Folder(program, rewriter, shared_tensors(program))
        owners = {id(batch_norm_owner(program, node)) for node in norms}
        maps = {node: affine_of(program, node) for node in norms}
        reasons = {node: found for node, found in maps.items() if isinstance(found, str)}
        known = [(node, found) for node, found in maps.items() if not isinstance(found, str)]
        left = [(node, affine, why) for node, affine in known if (why := folder.fold_backward(node, affine))]
        for node, affine, why in reversed(left):
            ahead = folder.fold_forward(node, affine) if self.forward else "folding forward is off"
            if ahead is not None:
                reasons[node] = f"{why}; {ahead}"
        for node in norms:
            if node in reasons:
                rewriter.miss(node, f"{node.name} not folded: {reasons[node]}")
        remove_unused(program, rewriter, owners)


@dataclass(frozen=True)
class Folder:
    """Folds batch norms of one program, each into one of its neighbours."""

    program: Program
    rewriter: Rewriter
    shared: dict[int, str]  # id of a tensor that others see too -> how

    def fold_backward(self, norm: fx.Node, affine: Affine) -> str | None:
        """Cases 1 and 2; the reason if it cannot be done."""
        layer = layer_before(norm)
        if isinstance(layer, str):
            return layer
        known = output_statistics(self.program, norm, affine)
        reason = self._fold(norm, layer, affine, forward=False)
        if reason is None:
            self.rewriter.set_statistics(layer.node, known)
        return reason

    def fold_forward(self, norm: fx.Node, affine: Affine) -> str | None:
        """Case 3; the reason if it cannot be done."""
        found = layer_ahead(norm, affine)
        return found if isinstance(found, str) else self._fold(norm, *found, forward=True)

    def _fold(self, norm: fx.Node, layer: Layer, affine: Affine, forward: bool) -> str | None:
        if value_type(source_of(norm)) != value_type(norm):
            return f"it turns {value_type(source_of(norm))} into {value_type(norm)}"
        for operand in (layer.weight, layer.bias):
            reason = None if operand is None else why_fixed(self.program, layer, operand, self.shared)
            if reason is not None:
                return reason
        weight = self.program.tensor(layer.weight)
        bias = None if layer.bias is None else self.program.tensor(layer.bias)
        new_weight, new_bias = (fold_before if forward else fold_behind)(weight, bias, affine, layer.layout)
        if not bool(torch.isfinite(new_weight).all() and torch.isfinite(new_bias).all()):
            return f"the folded weight of {layer.node.name} would not be finite in {weight.dtype}"
        self.rewriter.set_tensor(str(layer.weight.target), new_weight)
        if layer.bias is not None:
            self.rewriter.set_tensor(str(layer.bias.target), new_bias)
        elif not forward or bool(new_bias.any()):
            add_bias(self.program, self.rewriter, layer, new_bias)
        self._bypass(norm, source_of(norm))
        return None

    def _bypass(self, norm: fx.Node, source: fx.Node) -> None:
        tensors = [arg for arg in norm.args[1:] if isinstance(arg, fx.Node)]
        self.rewriter.replace_uses(norm, source)
        self.rewriter.erase(norm)
        self.rewriter.erase_dead(*tensors)


def why_fixed(program: Program, layer: Layer, operand: fx.Node, shared: dict[int, str]) -> str | None:
    """Why a weight or bias may not be changed for this layer alone; `shared`: as of `shared_tensors`."""
    if operand.op != "get_attr":
        return f"{layer.node.name}'s weight or bias is computed, by {operand.name}"
    if len(operand.users) != 1:
        return user_list(operand)
    return shared.get(id(program.tensor(operand)))


def add_bias(program: Program, rewriter: Rewriter, layer: Layer, bias: torch.Tensor) -> None:
    """Give a layer that has no bias one, beside its weight."""
    path = free_path(program, str(layer.weight.target))
    trains = program.tensor(layer.weight).requires_grad
    rewriter.add_tensor(path, bias, parameter=True, requires_grad=trains)
    node = rewriter.get_attr(path, name=path.replace(".", "_"), before=layer.weight.next, like=layer.weight)
    rewriter.set_arg(layer.node, 2, node)


def layer_before(norm: fx.Node) -> Layer | str:
    """The layer whose output a batch norm alone reads, if they fit (cases 1 and 2); else what is in the way."""
    source = source_of(norm)
    made = _before_flattening(source)
    layer = as_layer(made)
    if layer is None:
        return f"{source.name} before it is no convolution or linear"
    for value in (made, source):
        if sum(1 for user in value.users if not _reads_shape_alone(user, value)) != 1:
            return user_list(value)
    if not layer.has_channels_on_axis_1(source):
        return f"{source.name} does not have its channels on axis 1 of {value_type(source)}"
    return layer


def source_of(norm: fx.Node) -> fx.Node:
    """What a batch norm normalises."""
    assert isinstance(norm.args[0], fx.Node)
    return norm.args[0]


def _before_flattening(value: fx.Node) -> fx.Node:
    """Case 2: the linear's output of which `value` is all rows, its last axis kept; else `value` itself."""
    source = value.args[0] if value.target in RESHAPES else None
    if not isinstance(source, fx.Node) or source.target is not torch.ops.aten.linear.default:
        return value
    before, behind = value_type(source), value_type(value)
    keeps_rows = before is not None and behind is not None and before.shape[-1:] == behind.shape[1:]
    return source if keeps_rows else value


def _reads_shape_alone(user: fx.Node, value: fx.Node) -> bool:
    return user.target in _SHAPE_READERS and user.args[0] is not value


def _require_eval(program: Program, norm: fx.Node) -> None:
    if norm.op == "call_module" and is_training(program, norm):
        raise PassError(
            f"fold-batch-norm: node '{norm.name}'",
            place=describe(norm),
            expected="a batch norm in eval mode",
            got="one in training mode",
            remedy="Run 'freeze-batch-norm' first, or call program.module.eval().",
        )


def shared_tensors(program: Program) -> dict[int, str]:
    """Tensors that two modules hold, or two nodes read, by id."""
    paths: dict[int, list[str]] = {}
    for prefix, owner in program.module.named_modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                paths.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
    shared = {key: f"{' and '.join(found)} are one tensor" for key, found in paths.items() if len(found) > 1}
    reads = Counter(id(program.tensor(node)) for node in program.graph.nodes if node.op == "get_attr")
    return shared | {key: f"{paths[key][0]} is read at {count} nodes" for key, count in reads.items() if count > 1}


def free_path(program: Program, weight_path: str) -> str:
    """Where a new bias goes: beside its weight, as `bias` if that is free."""
    owner_path, _, weight = weight_path.rpartition(".")
    owner: nn.Module = program.module.get_submodule(owner_path)
    stem = f"{weight.removesuffix('weight')}bias" if weight.endswith("weight") else f"{weight}_bias"
    free, number = stem, 0
    while getattr(owner, free, None) is not None:
        number += 1
        free = f"{stem}_{number}"
    return f"{owner_path}.{free}" if owner_path else free


def remove_unused(program: Program, rewriter: Rewriter, owners: set[int]) -> None:
    """Remove those batch norm modules, under all their names, that the graph neither calls nor reads from any more."""
    module = program.module
    called = {id(program.submodule(node)) for node in program.graph.nodes if node.op == "call_module"}
    read = {str(node.target).rpartition(".")[0] for node in program.graph.nodes if node.op == "get_attr"}
    unused = owners - called - {id(module.get_submodule(path)) for path in read}
    for prefix, parent in list(module.named_modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in unused and isinstance(child, BatchNorm):
                rewriter.remove_module(f"{prefix}.{name}" if prefix else name)
