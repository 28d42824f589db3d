"""The Pareto front, and its plot."""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree import ElementTree

import hypothesis.strategies as st
from hypothesis import given

from fxquant.tuning.front_plot import front_plot
from fxquant.tuning.pareto import dominates, pareto_front


@dataclass(frozen=True)
class Trial:
    name: str


@dataclass(frozen=True)
class Point:
    score: float
    cost: float
    activation_bits: int = 8

    @property
    def trial(self) -> Trial:
        return Trial(f"<{self.score} & {self.cost}>")


POINTS = st.lists(st.builds(Point, st.integers(0, 6), st.integers(0, 6), st.integers(0, 2)), max_size=12)
WIDE = st.floats(-1e6, 1e6)


@given(POINTS)
def test_nothing_on_the_front_is_dominated_and_all_else_is(points: list[Point]) -> None:
    front = pareto_front(points)
    for point in points:
        is_dominated = any(_beats(other, point) for other in points)
        assert (point in front) is not is_dominated
    assert len(front) == len(set(front))  # one of equal ones
    assert len(front) == len({(point.score, point.cost) for point in front})
    assert [point.cost for point in front] == sorted(point.cost for point in front)


def _beats(one: Point, other: Point) -> bool:
    """The definition, in other words than the code's."""
    is_cheaper = one.cost < other.cost or (one.cost == other.cost and one.activation_bits < other.activation_bits)
    is_as_cheap = is_cheaper or (one.cost == other.cost and one.activation_bits == other.activation_bits)
    return one != other and one.score >= other.score and (is_cheaper or is_as_cheap)


def test_of_equal_scores_and_costs_the_narrower_is_on_the_front() -> None:
    wide, narrow, better = Point(0.5, 10, 32), Point(0.5, 10, 16), Point(0.6, 10, 32)
    assert pareto_front([wide, narrow, better]) == (narrow, better)
    first, second = Point(0.5, 10), Point(0.5, 10)
    (only,) = pareto_front([first, second])
    assert only is first


@given(POINTS.filter(bool))
def test_domination_is_an_order(points: list[Point]) -> None:
    for one in points:
        assert not dominates(one, one)
        for other in points:
            assert not (dominates(one, other) and dominates(other, one))


@given(st.lists(st.builds(Point, WIDE, WIDE), min_size=1, max_size=6), WIDE)
def test_plot_is_valid_and_inside_its_frame(points: list[Point], threshold: float) -> None:
    front = {point.trial.name for point in pareto_front(points)}
    chosen = points[0].trial.name
    root = ElementTree.fromstring(front_plot(points, front, chosen, threshold, "bit-ops"))
    circles = root.findall("{*}circle")
    assert len(circles) == len(points)
    for circle, point in zip(circles, points, strict=True):
        assert 0 <= float(circle.get("cx", -1)) <= 900 and 0 <= float(circle.get("cy", -1)) <= 520
        assert point.trial.name in "".join(circle.itertext())
    assert {circle.get("class") for circle in circles} <= {"tried", "front", "chosen"}


def test_better_points_lie_higher_and_dearer_ones_to_the_right() -> None:
    points = [Point(0.5, 10.0), Point(0.9, 20.0)]
    root = ElementTree.fromstring(front_plot(points, set(), "", 0.7, "bit-ops"))
    low, high = root.findall("{*}circle")
    assert float(low.get("cy", 0)) > float(high.get("cy", 0)) and float(low.get("cx", 0)) < float(high.get("cx", 0))
