"""What runs instead of a graph: a relu or clip in front of a FakeQuant is left to the FakeQuant.

    q = fq(relu(x))    runs as    q = fq(x, clip=(0, inf))

Where the grid's own clip makes it redundant, that saves its passes over memory, in backward too, and what it keeps for
backward; elsewhere the FakeQuant applies it (numerics/fake_quant.py). The graph itself stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

from fxquant.numerics.fake_quant import FakeQuant
from fxquant.ops.activation import activation_bounds

aten = torch.ops.aten
# Their gradient stops at their bounds. A clamp's passes there.
_CLIPS = (aten.relu.default, aten.relu6.default, aten.hardtanh.default)


def fuse_clips(graph: fx.Graph, root: nn.Module, copy: Callable[[fx.Graph], fx.Graph]) -> fx.Graph:
    """A copy of `graph` without the clips that FakeQuants of `root` can take over; `graph` itself if there are none."""
    if not any(_is_fusible(node, root) for node in graph.nodes):
        return graph
    fused = copy(graph)
    for node in list(fused.nodes):
        if _is_fusible(node, root):
            (quantizer,) = node.users
            quantizer.args = (node.args[0], *quantizer.args[1:])
            quantizer.kwargs = {**quantizer.kwargs, "clip": activation_bounds(node)}
            fused.erase_node(node)
    return fused


def _is_fusible(node: fx.Node, root: nn.Module) -> bool:
    """Whether `node` is a clip with constant bounds that nothing but one FakeQuant reads, as its first argument."""
    if node.op != "call_function" or node.target not in _CLIPS or len(node.users) != 1:
        return False
    (reader,) = node.users
    if reader.op != "call_module" or reader.args[:1] != (node,) or not isinstance(node.args[0], fx.Node):
        return False
    return activation_bounds(node) is not None and isinstance(_module_at(root, str(reader.target)), FakeQuant)


def _module_at(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None
