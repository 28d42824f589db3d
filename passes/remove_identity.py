"""Remove operations whose result is their input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage, value_type
from fxquant.graph.rewriter import Rewriter
from fxquant.ops._arguments import bind
from fxquant.ops.activation import activation_bounds

aten = torch.ops.aten
_ADAPTIVE_POOLS = (aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)
Bound = dict[str, Any]  # a node's arguments by name
_INFINITY = float("inf")


@dataclass(frozen=True)
class RemoveIdentity(Pass):
    """Remove operations that compute nothing. Each must leave shape and dtype as they are.

    1. clone, contiguous, alias, detach; a cast to the dtype that the value has.
    2. x + 0, x - 0, x * 1, x / 1, x ** 1 with a Python number.
    3. reshape, view, flatten, squeeze, expand, repeat and slice to the shape that the value has; permute and
       transpose to the order it has; cat of one tensor.
    4. A pad by nothing; a pooling with kernel and stride 1, or adaptive to the size that the value has.
    5. A relu or clip of a value that lies within its bounds already: behind another relu or clip, a sigmoid or a
       softmax.
    6. Dropout with p = 0; with `dropout`, any: it is the identity in eval mode, and QAT then trains without it.

    Declines, with the reason, what would change shape or dtype (an integer times 1.0), a cast that names a device, and
    Dropout with p > 0. Contract: PRESERVES.

    Arguments:
        dropout: whether to remove Dropout with p > 0 too.
    """

    dropout: bool = False

    name: ClassVar[str] = "remove-identity"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Visit every call, in graph order: what a removal exposes comes later."""
        called = [program.submodule(node) for node in program.graph.nodes if node.op == "call_module"]
        calls = Counter(map(id, called))  # not by path: a block may have two names
        for node in list(program.graph.nodes):
            if node.op == "call_module":
                self._visit_dropout(program, rewriter, node, calls)
            elif node.op == "call_function" and node.target in _RULES and _RULES[node.target](node, bind(node)):
                reason = _why_not(node)
                if reason is None:
                    _remove(rewriter, node)
                else:
                    rewriter.miss(node, f"{node.name} not removed: {reason}")

    def _visit_dropout(self, program: Program, rewriter: Rewriter, node: fx.Node, calls: Counter[int]) -> None:
        module = program.submodule(node)
        if not isinstance(module, nn.modules.dropout._DropoutNd):
            return
        if module.p > 0 and not self.dropout:
            rewriter.miss(node, f"{node.name} not removed: it drops {module.p:.3g} of its values in training")
            return
        path = str(node.target)
        _remove(rewriter, node)
        calls[id(module)] -= 1
        if not calls[id(module)]:
            rewriter.remove_module(path)


def _remove(rewriter: Rewriter, node: fx.Node) -> None:
    inputs = node.all_input_nodes
    rewriter.replace_uses(node, inputs[0])
    rewriter.erase(node)
    while inputs:  # sizes and numbers that only this node read
        source = inputs.pop()
        if not source.users and source.op in ("call_function", "get_attr"):
            inputs.extend(source.all_input_nodes)
            rewriter.erase(source)


def _why_not(node: fx.Node) -> str | None:
    before, after = value_type(node.all_input_nodes[0]), value_type(node)
    if before is None or before != after:
        return f"it makes {after} of {before}"
    if bind(node).get("device") is not None:
        return f"it names the device {bind(node)['device']}"
    return None


def _always(node: fx.Node, given: Bound) -> bool:
    return True


def _keeps_type(node: fx.Node, given: Bound) -> bool:
    """For operations that, where they keep shape and dtype, keep the values too."""
    return value_type(node) is not None and value_type(node) == value_type(node.all_input_nodes[0])


def _keeps_all(node: fx.Node, given: Bound) -> bool:
    return given["step"] == 1 and _keeps_type(node, given)


def _neutral(number: int) -> Callable[[fx.Node, Bound], bool]:
    def rule(node: fx.Node, given: Bound) -> bool:
        operand = given.get("other", given.get("exponent"))
        return isinstance(operand, (int, float)) and operand == number and isinstance(node.args[0], fx.Node)

    return rule


def _keeps_order(node: fx.Node, given: Bound) -> bool:
    found = value_type(node)
    rank = 0 if found is None else len(found.shape)
    if "dims" in given:
        return found is not None and [axis % max(rank, 1) for axis in given["dims"]] == list(range(rank))
    return found is not None and (rank == 0 or given["dim0"] % rank == given["dim1"] % rank)


def _pads_nothing(node: fx.Node, given: Bound) -> bool:
    return all(isinstance(amount, int) and amount == 0 for amount in given["pad"])


def _pools_nothing(node: fx.Node, given: Bound) -> bool:
    def is_all(value: Any, number: int) -> bool:
        return all(item == number for item in value) if isinstance(value, (list, tuple)) else value == number

    strides = given["stride"] or given["kernel_size"]
    single = is_all(given["kernel_size"], 1) and is_all(strides, 1) and is_all(given["padding"], 0)
    return single and given.get("divisor_override") in (None, 1)


def _clips_nothing(node: fx.Node, given: Bound) -> bool:
    bounds, known = activation_bounds(node), _known_bounds(node.all_input_nodes[0])
    return bounds is not None and bounds[0] <= known[0] and known[1] <= bounds[1]


def _known_bounds(node: fx.Node) -> tuple[float, float]:
    """A range that a value never leaves."""
    if node.op == "call_function" and node.target in _CLIPS:
        return activation_bounds(node) or (-_INFINITY, _INFINITY)
    return (0.0, 1.0) if node.op == "call_function" and node.target in _WITHIN_0_1 else (-_INFINITY, _INFINITY)


_CLIPS = (aten.relu.default, aten.hardtanh.default, aten.clamp.default)
_WITHIN_0_1 = (aten.sigmoid.default, aten.hardsigmoid.default, aten.softmax.int)
_FAMILIES: tuple[tuple[Callable[[fx.Node, Bound], bool], tuple[Any, ...]], ...] = (
    (_always, (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)),  # case 1
    (_keeps_type, (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)),
    (_neutral(0), (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)),  # case 2
    (_neutral(1), (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.pow.Tensor_Scalar)),
    (_keeps_type, (aten.reshape.default, aten.view.default, aten.flatten.using_ints)),  # case 3
    (_keeps_type, (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default)),
    (_keeps_type, (aten.repeat.default,)),
    (_keeps_type, (aten.reshape_as.default, aten.expand_as.default, aten.view_as.default)),
    (_keeps_all, (aten.slice.Tensor,)),
    (_keeps_order, (aten.permute.default, aten.transpose.int)),
    (lambda node, given: len(given["tensors"]) == 1, (aten.cat.default,)),
    (_pads_nothing, (aten.pad.default, aten.constant_pad_nd.default)),  # case 4
    (_pools_nothing, (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)),
    (_pools_nothing, (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)),
    (_keeps_type, _ADAPTIVE_POOLS),
    (_clips_nothing, _CLIPS),  # case 5
)
_RULES = {target: rule for rule, targets in _FAMILIES for target in targets}
