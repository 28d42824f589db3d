"""The Pareto front of score against cost: what no other configuration beats in one of them and equals in the other.

What multiplies nothing costs no bit-operations, however wide it is. So of equal costs that with fewer activation bits
counts as the smaller: cost is the pair (cost, activation bits), in the order of a dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Point(Protocol):
    """A configuration's score (the higher the better), and its cost and activation bits (the lower the better)."""

    @property
    def score(self) -> float: ...

    @property
    def cost(self) -> float: ...

    @property
    def activation_bits(self) -> int: ...


Item = TypeVar("Item", bound=Point)


def dominates(one: Point, other: Point) -> bool:
    """Whether `one` is as good as `other` in score and cost, and better in one of them."""
    is_no_worse = one.score >= other.score and expense(one) <= expense(other)
    return is_no_worse and (one.score > other.score or expense(one) < expense(other))


def expense(point: Point) -> tuple[float, int]:
    """What is to be small: cost, and of equal costs the activation bits."""
    return point.cost, point.activation_bits


def pareto_front(points: Sequence[Item]) -> tuple[Item, ...]:
    """The points that no other dominates, by rising cost; of equal ones the first.

    In order of cost, and of falling score where costs are equal, a point is on the front iff its score is above all
    before it.
    """
    front: list[Item] = []
    for point in sorted(points, key=lambda item: (expense(item), -item.score)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return tuple(front)
