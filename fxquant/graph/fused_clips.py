"""A relu or clip in front of a FakeQuant is left to the FakeQuant, in what runs instead of a graph.

    q = fq(relu(x))    runs as    q = fq(x, clip=(0, inf))

Where the grid's own clip makes it redundant, that saves its passes over memory, in backward too, and what it keeps for
backward; elsewhere the FakeQuant applies it (numerics/fake_quant.py).
"""

from __future__ import annotations

import torch
from torch import fx, nn

from fxquant.numerics.fake_quant import FakeQuant
from fxquant.ops.activation import activation_bounds

aten = torch.ops.aten
# Their gradient stops at their bounds. A clamp's passes there.
_CLIPS = (aten.relu.default, aten.relu6.default, aten.hardtanh.default)


def fuse_clips(graph: fx.Graph, root: nn.Module) -> None:
    """Erase the clips that FakeQuants of `root` can take over, and give them to these."""
    for node in list(graph.nodes):
        if is_fusible(node, root):
            (quantizer,) = node.users
            quantizer.args = (node.args[0], *quantizer.args[1:])
            quantizer.kwargs = {**quantizer.kwargs, "clip": activation_bounds(node)}
            graph.erase_node(node)


def is_fusible(node: fx.Node, root: nn.Module) -> bool:
    """Whether `node` is a clip with constant bounds that nothing but one FakeQuant reads."""
    if node.op != "call_function" or node.target not in _CLIPS or len(node.users) != 1:
        return False
    (reader,) = node.users
    if reader.op != "call_module" or not isinstance(node.args[0], fx.Node):
        return False
    return activation_bounds(node) is not None and isinstance(_module_at(root, str(reader.target)), FakeQuant)


def _module_at(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None
