"""What runs instead of a graph, which itself stays as it is: fewer passes over memory, and what autocast asks for.

1. A relu or clip in front of a FakeQuant is left to it (fused_clips.py).
2. A convolution heeds autocast, as the one of the model does (numerics/autocast.py).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from fxquant.graph.fused_clips import fuse_clips, is_fusible
from fxquant.numerics.autocast import HEEDING_AUTOCAST


def running_graph(graph: fx.Graph, root: nn.Module, copy: Callable[[fx.Graph], fx.Graph]) -> fx.Graph:
    """What to compile for `graph`, which calls modules of `root`: a copy, or itself where there is nothing to do."""
    if not any(is_fusible(node, root) or node.target in HEEDING_AUTOCAST for node in graph.nodes):
        return graph
    running = copy(graph)
    fuse_clips(running, root)
    for node in running.nodes:
        if node.op == "call_function":
            node.target = HEEDING_AUTOCAST.get(node.target, node.target)
    return running
