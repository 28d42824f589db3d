"""The Pareto front of score against cost: what no other configuration beats in one of them and equals in the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Point(Protocol):
    """A configuration's score (the higher the better) and cost (the lower the better)."""

    @property
    def score(self) -> float: ...

    @property
    def cost(self) -> float: ...


Item = TypeVar("Item", bound=Point)


def dominates(one: Point, other: Point) -> bool:
    """Whether `one` is as good as `other` in score and cost, and better in one of them."""
    is_no_worse = one.score >= other.score and one.cost <= other.cost
    return is_no_worse and (one.score > other.score or one.cost < other.cost)


def pareto_front(points: Sequence[Item]) -> tuple[Item, ...]:
    """The points that no other dominates, by rising cost; equal ones are all among them.

    In order of cost, and of falling score where costs are equal, a point is on the front iff its score is above all
    before it, or if it equals the last point there.
    """
    front: list[Item] = []
    for point in sorted(points, key=lambda item: (item.cost, -item.score)):
        last = front[-1] if front else None
        if last is None or point.score > last.score or (point.score, point.cost) == (last.score, last.cost):
            front.append(point)
    return tuple(front)
