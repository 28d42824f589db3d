"""The Pareto front as one self-contained SVG: score over cost, the front joined, names on hover."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 520, 90, 30, 40, 60
TICKS = 5
STYLE = (
    "text{font:13px sans-serif;fill:#222}.axis{stroke:#888}.grid{stroke:#e4e4e4}"
    ".tried{fill:#9aa7b5}.front{fill:#1f6fb4}.chosen{fill:#d1495b}"
    ".line{fill:none;stroke:#1f6fb4;stroke-width:1.5}.limit{stroke:#d1495b;stroke-dasharray:6 4}"
)


class Named(Protocol):
    """What has a name."""

    @property
    def name(self) -> str: ...


class PlottedPoint(Protocol):
    """A configuration's name, score and cost."""

    @property
    def trial(self) -> Named: ...

    @property
    def score(self) -> float: ...

    @property
    def cost(self) -> float: ...


@dataclass(frozen=True)
class _Scale:
    """From numbers to pixels along one axis."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> _Scale:
        low, high = min(values), max(values)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - margin, high + margin, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers inside."""
        rough = (self.high - self.low) / TICKS
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step) + 1)]


def front_plot(points: Sequence[PlottedPoint], front: Collection[str], chosen: str, threshold: float, cost: str) -> str:
    """The text of an SVG file.

    Arguments:
        points: all that were evaluated.
        front: names of those on the front.
        chosen: the name of the one that was chosen.
        threshold: the score that is to be reached, drawn as a line.
        cost: the name of the horizontal axis.
    """
    across = _Scale.around([point.cost for point in points], LEFT, WIDTH - RIGHT)
    up = _Scale.around([*(point.score for point in points), threshold], HEIGHT - BOTTOM, TOP)
    joined = sorted((point for point in points if point.trial.name in front), key=lambda item: (item.cost, item.score))
    path = " ".join(f"{across(point.cost):.1f},{up(point.score):.1f}" for point in joined)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        *_axes(across, up, cost),
        f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(threshold):.1f}" y2="{up(threshold):.1f}"/>',
        f'<text x="{WIDTH - RIGHT}" y="{up(threshold) - 5:.1f}" text-anchor="end">target {threshold:.6g}</text>',
        f'<polyline class="line" points="{path}"/>',
        *(_mark(point, across, up, front, chosen) for point in points),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _axes(across: _Scale, up: _Scale, cost: str) -> list[str]:
    bottom, found = HEIGHT - BOTTOM, []
    for value in across.ticks():
        x = f"{across(value):.1f}"
        found.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}"/>')
        found.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{value:.4g}</text>')
    for value in up.ticks():
        y = f"{up(value):.1f}"
        found.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        found.append(f'<text x="{LEFT - 8}" y="{y}" text-anchor="end" dominant-baseline="middle">{value:.4g}</text>')
    found.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    found.append(f'<line class="axis" x1="{LEFT}" x2="{LEFT}" y1="{TOP}" y2="{bottom}"/>')
    found.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(cost)}</text>')
    found.append(f'<text x="{LEFT}" y="{TOP - 14}">score</text>')
    return found


def _mark(point: PlottedPoint, across: _Scale, up: _Scale, front: Collection[str], chosen: str) -> str:
    name = point.trial.name
    kind = "chosen" if name == chosen else "front" if name in front else "tried"
    x, y = across(point.cost), up(point.score)
    title = f"{name}: score {point.score:.6g}, cost {point.cost:.6g}"
    label = "" if name.startswith("search") and name != chosen else _label(name, x, y)
    circle = f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{6 if kind == "chosen" else 4.5}">'
    return f"{circle}<title>{escape(title)}</title></circle>{label}"


def _label(name: str, x: float, y: float) -> str:
    anchor, shift = ("end", -9) if x > WIDTH / 2 else ("start", 9)
    return f'<text x="{x + shift:.1f}" y="{y + 16:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
