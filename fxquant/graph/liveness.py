"""Which values nothing reads any more: so that a graph that is run node by node holds no more than it must."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from torch import fx


def last_uses(
    nodes: Iterable[fx.Node],
    keep: Collection[fx.Node],
    reads: Callable[[fx.Node], Iterable[fx.Node]] = lambda node: node.all_input_nodes,
) -> dict[fx.Node, list[fx.Node]]:
    """By node, the values that nothing of `nodes` reads after it, but for those to keep; a value that nothing reads
    dies where it is made.

    `nodes` in the order in which they run; `reads`: what a node reads.
    """
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last.update((value, node) for value in (node, *reads(node)))
    dead: dict[fx.Node, list[fx.Node]] = {}
    for value, user in last.items():
        if value not in keep:
            dead.setdefault(user, []).append(value)
    return dead
