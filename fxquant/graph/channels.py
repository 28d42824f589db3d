"""The axis on which a value has its channels, as the layers in front of it say.

A convolution gives [N, C, *spatial], a linear layer [..., C]: a rank does not tell [N, C, L] from [N, L, C], nor
[N, C, H, W] from [N, H, W, C]. From the value back to the nearest layer every axis is followed: through operations that
leave axes where they are, and through permutations, behind which axis i is the one that was at dims[i].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import fx

from fxquant.graph.program import Program, value_type
from fxquant.ops._emit import argument
from fxquant.ops.base import FloatForm, OpDef, Role
from fxquant.ops.table import TABLE

_ELEMENTWISE = (FloatForm.AGREES, FloatForm.POINTWISE, FloatForm.DRIFTS)
_KEEPING = frozenset(
    """
    add multiply subtract reverse_subtract divide power square where masked_fill cast copy dropout glu softmax
    batch_norm batch_norm_functional live_batch_norm layer_norm group_norm instance_norm rms_norm
    max_pool avg_pool adaptive_avg_pool adaptive_max_pool
    upsample_nearest upsample_nearest_exact upsample_linear upsample_cubic upsample_antialiased
    pad constant_pad reflection_pad replication_pad concat slice narrow roll flip channel_shuffle
    """.split()
)
_PERMUTE, _TRANSPOSE = torch.ops.aten.permute.default, torch.ops.aten.transpose.int


def channel_axis_of(program: Program, value: fx.Node) -> int:
    """The axis of a value's channels, counted from the front where its rank is known, else -1.

    That of the nearest layer in front of it; where none is found, 1 of four axes or more, and the last one of fewer.
    """
    rank = _rank(value)
    if rank is None:
        return -1
    start = tuple(range(rank))
    waiting, seen = deque([(value, start)]), {value}
    while waiting:
        node, places = waiting.popleft()
        definition = TABLE.find(node, program.submodule(node) if node.op == "call_module" else None)
        axis = _layer_axis(node, definition, len(places))
        if axis is not None:
            return places[axis]
        for source, found in _sources(program, node, definition, places):
            if source not in seen:
                seen.add(source)
                waiting.append((source, found))
    return 1 if rank >= 4 else rank - 1


def _layer_axis(node: fx.Node, definition: OpDef | None, rank: int) -> int | None:
    """The axis of the channels that a layer gives; None for what is no layer."""
    position = None if definition is None else definition.weight_for(node)
    if definition is None or position is None:
        return None
    if definition.name != "convolution":
        return rank - 1
    weight = node.args[position]
    weight_rank = _rank(weight) if isinstance(weight, fx.Node) else None
    return 1 if weight_rank is None else rank + 1 - weight_rank


def _sources(
    program: Program, node: fx.Node, definition: OpDef | None, places: tuple[int, ...]
) -> Iterator[tuple[fx.Node, tuple[int, ...]]]:
    """What a node reads with the same axes, and for each of those where it lies in the value that is asked about."""
    if node.target in (_PERMUTE, _TRANSPOSE):
        before = [0] * len(places)
        for place, axis in zip(places, _permutation(node, len(places)), strict=True):
            before[axis] = place
        yield node.all_input_nodes[0], tuple(before)
        return
    if program.fake_quant(node) is not None or (definition is not None and _keeps_axes(node, definition)):
        for source in node.all_input_nodes:
            if _rank(source) == len(places):
                yield source, places


def _keeps_axes(node: fx.Node, definition: OpDef) -> bool:
    is_elementwise = definition.float_form_for(node) in _ELEMENTWISE or definition.role_for(node) is Role.ACTIVATION
    return is_elementwise or definition.name in _KEEPING


def _permutation(node: fx.Node, rank: int) -> list[int]:
    """For each axis of what a permutation gives, the one that it was."""
    if node.target is _PERMUTE:
        return [int(axis) % rank for axis in argument(node, "dims")]
    found = list(range(rank))
    first, second = (int(argument(node, name)) % rank for name in ("dim0", "dim1"))
    found[first], found[second] = second, first
    return found


def _rank(node: fx.Node) -> int | None:
    found = value_type(node)
    return None if found is None else len(found.shape)
