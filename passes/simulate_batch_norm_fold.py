"""Keep batch norms live, and let the layers in front of them compute as if they were folded.

before    y = bn(layer(x, W, b))
after     r = bn.ratio(gamma, running_var)                         fxquant/numerics/live_batch_norm.py has the algebra
          y = bn(layer(x, scale_channels(W, r), bn.shift(b, beta, running_mean, r)), r)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.constants import Constants
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Note, NoteKind, Program, Stage, value_type
from fxquant.graph.rewriter import Rewriter
from fxquant.numerics.live_batch_norm import (
    BATCH_NORM_RATIO,
    BATCH_NORM_SHIFT,
    SCALE_CHANNELS,
    LiveBatchNorm,
)

from .channelwise import Affine, fold_behind
from .fold_batch_norm import Folder, layer_before, remove_unused, shared_tensors, source_of
from .layers import Layer
from .norms import (
    BatchNorm,
    affine_of,
    batch_norm_eps,
    batch_norm_owner,
    is_batch_norm,
    is_training,
    move_in_front,
    read_tensors,
    readers_by_tensor,
)

_FOLDED_FORWARD = (
    "no layer in front of this batch norm can simulate its fold, so it is folded into the layer behind it for good: "
    "it does not train, and its running statistics stand still"
)


@dataclass(frozen=True)
class SimulateBatchNormFold(Pass):
    """Compute each layer with the weight and bias that folding the batch norm behind it would give, and keep that live.

    In eval() the batch norm does nothing, and the layer computes what 'fold-live-batch-norm' will leave of both. In
    train() the layer's weight is still the folded one, so that its quantization is that of the deployed weight, and the
    batch norm takes the fold back and normalises by its batch. All parameters stay the model's, under their names; in
    case 5 alone gamma and beta do not.

    1. Behind a convolution of any rank, grouped or transposed, with or without a bias.
    2. Behind a linear of any rank; where its tokens were flattened for the batch norm, that now stands in front of it.
    3. A weight or bias that is tied, read by several layers, or computed from parameters alone: each fold is its own.
    4. A batch norm that freeze-batch-norm made a function: folded with its running statistics in train() too.
    5. A batch norm that no layer precedes is folded into the layer behind it for good, with its running statistics, as
       fold-batch-norm does: its module goes once nothing calls or reads it, and a note says so.

    Declines, with the reason: the layer has other users; its weight is an activation; the batch norm keeps no running
    statistics, or some that are not finite; its module is also called where it cannot be folded; the folded weight
    overflows its dtype. Contract: PRESERVES (what eval() computes; in float, and but for case 5, what train() computes
    too).

    Arguments:
        forward: whether case 5 is allowed.
    """

    forward: bool = True

    name: ClassVar[str] = "simulate-batch-norm-fold"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Fold forward what has no layer in front of it, then simulate the rest."""
        norms = [node for node in program.graph.nodes if is_batch_norm(program, node)]
        found = _layers(program, norms)
        left = [norm for norm in norms if isinstance(found[norm], str)]
        owners = {norm: batch_norm_owner(program, norm) for norm in left}
        reasons = {norm: self._fold_forward(program, rewriter, norm) for norm in reversed(left)}
        for norm in left:
            if reasons[norm] is not None:
                rewriter.miss(norm, f"{norm.name} not simulated: {found[norm]}; {reasons[norm]}")
        layers = {norm: layer for norm, layer in found.items() if isinstance(layer, Layer)}
        simulation = _Simulation(program, rewriter)
        for norm in sorted(layers, key=lambda norm: layers[norm].node):
            again = layer_before(norm)  # folding forward may have given it a bias
            assert isinstance(again, Layer)
            simulation.add(norm, again)
        folded = [norm for norm in left if reasons[norm] is None]
        for norm in folded:
            rewriter.note(Note(NoteKind.TRAINING, norm.meta.get("module_path") or norm.name, _FOLDED_FORWARD))
        remove_unused(program, rewriter, {id(owners[norm]) for norm in folded})

    def _fold_forward(self, program: Program, rewriter: Rewriter, norm: fx.Node) -> str | None:
        """Case 5; the reason if it cannot be done."""
        affine = affine_of(program, norm)
        if isinstance(affine, str):
            return affine
        if not self.forward:
            return "folding forward is off"
        if is_training(program, norm):
            return "it is in training mode"
        return Folder(program, rewriter, shared_tensors(program)).fold_forward(norm, affine)


def _layers(program: Program, norms: list[fx.Node]) -> dict[fx.Node, Layer | str]:
    """The layer that is to simulate each batch norm's fold, or why there is none."""
    constants = Constants(program)
    found = {norm: _layer(program, norm, constants) for norm in norms}
    for norm in norms:
        if norm.op == "call_module":
            calls = [other for other in norms if other.op == "call_module" and _is_same(program, other, norm)]
            lost = [call.name for call in calls if isinstance(found[call], str)]
            if lost and not isinstance(found[norm], str):
                found[norm] = f"its module is also called at {', '.join(lost)}, where it cannot be folded"
    return found


def _is_same(program: Program, one: fx.Node, other: fx.Node) -> bool:
    return program.submodule(one) is program.submodule(other)


def _layer(program: Program, norm: fx.Node, constants: Constants) -> Layer | str:
    affine, layer = affine_of(program, norm), layer_before(norm)
    if isinstance(affine, str) or isinstance(layer, str):
        return affine if isinstance(affine, str) else str(layer)
    if value_type(source_of(norm)) != value_type(norm):
        return f"it turns {value_type(source_of(norm))} into {value_type(norm)}"
    for operand in filter(None, (layer.weight, layer.bias)):
        if not constants.is_constant(operand):
            return f"{layer.node.name}'s {operand.name} is no parameter, nor computed from parameters alone"
    weight, bias = constants.tensor(layer.weight), None if layer.bias is None else constants.tensor(layer.bias)
    folded = fold_behind(weight, bias, Affine(affine.scale.cpu(), affine.shift.cpu()), layer.layout)
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in folded)
    return layer if finite else f"the folded weight of {layer.node.name} would not be finite in {weight.dtype}"


@dataclass
class _Simulation:
    """Rewrites batch norms, in the order of the layers in front of them."""

    program: Program
    rewriter: Rewriter
    ratios: dict[int, fx.Node] = field(default_factory=dict)  # by id of a live module: its r

    def __post_init__(self) -> None:
        self.readers = readers_by_tensor(self.program)

    def add(self, norm: fx.Node, layer: Layer) -> None:
        """Simulate one fold."""
        tensors = self._tensors(norm, layer)
        live = self._live_module(norm)
        ratio = self._ratio(norm, layer, live, tensors)
        self._fold(norm, layer, live, tensors, ratio)
        source = source_of(norm)
        if live is None or source is not layer.node:  # cases 4 and 2
            self.rewriter.replace_uses(norm, source)
        if live is None:
            self.rewriter.erase(norm)
        else:
            self._put_behind(norm, layer, ratio)

    def _tensors(self, norm: fx.Node, layer: Layer) -> list[fx.Node | None]:
        """The nodes of gamma, beta, mean and variance."""
        if norm.op == "call_module":
            owner = batch_norm_owner(self.program, norm)
            return read_tensors(self.rewriter, norm, owner, self.readers, before=layer.node)
        tensors = [arg if isinstance(arg, fx.Node) else None for arg in norm.args[1:5]]
        move_in_front(self.rewriter, tensors, layer.node)
        return tensors

    def _live_module(self, norm: fx.Node) -> LiveBatchNorm | None:
        """The module that a batch norm is from now on; None in case 4."""
        if norm.op != "call_module":
            return None
        module = self.program.submodule(norm)
        assert isinstance(module, BatchNorm)
        if not isinstance(module, LiveBatchNorm):
            module = LiveBatchNorm.of(module)
            self.rewriter.replace_module(str(norm.target), module)
        return module

    def _ratio(self, norm: fx.Node, layer: Layer, live: LiveBatchNorm | None, tensors: list[fx.Node | None]) -> fx.Node:
        if id(live) in self.ratios:
            return self.ratios[id(live)]
        gamma, _, _, var = tensors
        assert var is not None
        name = f"{norm.name}_ratio"
        if live is None:
            arguments = (gamma, var, batch_norm_eps(self.program, norm))
            return self.rewriter.call_function(BATCH_NORM_RATIO, arguments, name=name, before=layer.node, like=var)
        path = f"{norm.target}.ratio"
        made = self.rewriter.call_module(path, (gamma, var), name=name, before=layer.node, like=var)
        self.ratios[id(live)] = made
        return made

    def _fold(
        self,
        norm: fx.Node,
        layer: Layer,
        live: LiveBatchNorm | None,
        tensors: list[fx.Node | None],
        ratio: fx.Node,
    ) -> None:
        """Let the layer compute with the folded weight and bias."""
        _, beta, mean, _ = tensors
        axis = 1 if layer.layout.transposed else 0
        before = layer.node
        weight = self.rewriter.call_function(
            SCALE_CHANNELS,
            (layer.weight, ratio, axis, layer.layout.groups),
            name=f"{layer.weight.name}_folded",
            before=before,
            like=layer.weight,
        )
        name = f"{before.name}_bias_folded" if layer.bias is None else f"{layer.bias.name}_folded"
        shifted = (layer.bias, beta, mean, ratio)
        if live is None:
            bias = self.rewriter.call_function(BATCH_NORM_SHIFT, shifted, name=name, before=before, like=ratio)
        else:
            path = f"{norm.target}.shift"
            bias = self.rewriter.call_module(path, shifted, name=name, before=before, like=ratio)
        self.rewriter.set_arg(layer.node, 1, weight)
        self.rewriter.set_arg(layer.node, 2, bias)

    def _put_behind(self, norm: fx.Node, layer: Layer, ratio: fx.Node) -> None:
        """The live batch norm right behind its layer, on all that the layer computes."""
        is_linear = layer.node.target is torch.ops.aten.linear.default
        self.rewriter.set_args(norm, (layer.node, ratio, *([True] if is_linear else [])))
        self.rewriter.replace_uses(layer.node, norm, where=lambda user: user is not norm)
        if layer.node.next is not norm:
            self.rewriter.move(norm, before=layer.node.next)
        self.rewriter.set_type(norm, value_type(layer.node))
