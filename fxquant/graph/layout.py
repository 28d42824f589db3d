"""Layered layout of a directed acyclic graph (after Sugiyama, Tagawa and Toda, 1981): rows, order within rows,
coordinates.

Edges that span several rows pass through dummies, so that they bend around boxes instead of crossing them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Key = Hashable
SWEEPS = 6
DUMMY_WIDTH = 10.0
COLUMN_GAP = 22.0
ROW_GAP = 18.0


@dataclass(frozen=True)
class Dummy:
    """The place at which the edge source -> target crosses row `row`."""

    source: Key
    target: Key
    row: int


@dataclass(frozen=True)
class Layout:
    """Centres of the boxes, the points that each edge passes through, and the size of it all, in pixels."""

    centres: dict[Key, tuple[float, float]]
    paths: dict[tuple[Key, Key], list[tuple[float, float]]]
    width: float
    height: float


def lay_out(sizes: Mapping[Key, tuple[float, float]], edges: Iterable[tuple[Key, Key]]) -> Layout:
    """Place boxes of the given (width, height) from top to bottom along the edges; `sizes` is in topological order."""
    pairs = list(edges)
    rows_of = _rows(sizes, pairs)
    chains = {edge: _chain(edge, rows_of) for edge in pairs}
    rows = _ordered_rows(rows_of, chains)
    xs = _columns(rows, chains, {key: size[0] for key, size in sizes.items()})
    bands = _bands(rows, {key: size[1] for key, size in sizes.items()})
    centres = {key: (xs[key], sum(bands[rows_of[key]]) / 2) for key in sizes}
    paths = {edge: _points(chain, xs, bands, centres, sizes) for edge, chain in chains.items()}
    right = max((xs[key] + sizes[key][0] / 2 for key in sizes), default=0.0)
    right = max((right, *(x + DUMMY_WIDTH for points in paths.values() for x, _ in points)))
    return Layout(centres, paths, right, bands[-1][1] if bands else 0.0)


def _rows(keys: Iterable[Key], edges: list[tuple[Key, Key]]) -> dict[Key, int]:
    """The longest way from a source; a source itself stands right above its first reader."""
    sources: dict[Key, list[Key]] = {key: [] for key in keys}
    readers: dict[Key, list[Key]] = {key: [] for key in sources}
    for source, reader in edges:
        sources[reader].append(source)
        readers[source].append(reader)
    rows: dict[Key, int] = {}
    for key in sources:
        rows[key] = max((rows[source] + 1 for source in sources[key]), default=0)
    for key in sources:
        if not sources[key] and readers[key]:
            rows[key] = min(rows[reader] for reader in readers[key]) - 1
    return rows


def _chain(edge: tuple[Key, Key], rows_of: dict[Key, int]) -> list[Key]:
    source, target = edge
    between = [Dummy(source, target, row) for row in range(rows_of[source] + 1, rows_of[target])]
    return [source, *between, target]


def _ordered_rows(rows_of: dict[Key, int], chains: dict[tuple[Key, Key], list[Key]]) -> list[list[Key]]:
    """Order each row by the mean place of its neighbours in the row above, then below, a few times over."""
    rows: list[list[Key]] = [[] for _ in range(max(rows_of.values(), default=-1) + 1)]
    for key, row in rows_of.items():
        rows[row].append(key)
    for chain in chains.values():
        for item in chain[1:-1]:
            assert isinstance(item, Dummy)
            rows[item.row].append(item)
    above, below = _neighbours(chains)
    for sweep in range(SWEEPS):
        downward = sweep % 2 == 0
        neighbours = above if downward else below
        for index in range(1, len(rows)) if downward else range(len(rows) - 2, -1, -1):
            _sort_by_neighbours(rows[index], rows[index - 1 if downward else index + 1], neighbours)
    return rows


def _neighbours(chains: dict[tuple[Key, Key], list[Key]]) -> tuple[dict[Key, list[Key]], dict[Key, list[Key]]]:
    above: dict[Key, list[Key]] = {}
    below: dict[Key, list[Key]] = {}
    for chain in chains.values():
        for upper, lower in zip(chain[:-1], chain[1:], strict=True):
            above.setdefault(lower, []).append(upper)
            below.setdefault(upper, []).append(lower)
    return above, below


def _sort_by_neighbours(row: list[Key], beside: list[Key], neighbours: dict[Key, list[Key]]) -> None:
    places = {key: place for place, key in enumerate(beside)}
    before = {key: place for place, key in enumerate(row)}
    means = {key: _mean([places[other] for other in neighbours.get(key, [])], before[key]) for key in row}
    row.sort(key=lambda key: (means[key], isinstance(key, Dummy), before[key]))


def _columns(
    rows: list[list[Key]], chains: dict[tuple[Key, Key], list[Key]], widths: Mapping[Key, float]
) -> dict[Key, float]:
    """x of each centre: pulled towards the mean of its neighbours, boxes of a row kept apart."""
    xs: dict[Key, float] = {}
    for row in rows:
        left = 0.0
        for key in row:
            width = widths.get(key, DUMMY_WIDTH)
            xs[key] = left + width / 2
            left += width + COLUMN_GAP
        for key in row:
            xs[key] -= left / 2
    above, below = _neighbours(chains)
    for sweep in range(2 * SWEEPS):
        neighbours = above if sweep % 2 == 0 else below
        for row in rows if sweep % 2 == 0 else reversed(rows):
            _pull(row, xs, neighbours, widths)
    _straighten(rows, chains, xs, widths)
    shift = min((xs[key] - widths.get(key, DUMMY_WIDTH) / 2 for key in xs), default=0.0)
    return {key: x - shift for key, x in xs.items()}


def _pull(row: list[Key], xs: dict[Key, float], neighbours: dict[Key, list[Key]], widths: Mapping[Key, float]) -> None:
    """Move a row's items towards their neighbours: wider boxes first, the others give way on either side."""
    wanted = {key: _mean([xs[other] for other in _weightiest(neighbours.get(key, []))], xs[key]) for key in row}
    anchor = max(range(len(row)), key=lambda index: widths.get(row[index], DUMMY_WIDTH), default=0)
    if not row:
        return
    xs[row[anchor]] = wanted[row[anchor]]
    for step, indices in ((1, range(anchor + 1, len(row))), (-1, range(anchor - 1, -1, -1))):
        for index in indices:
            key, inner = row[index], row[index - step]
            gap = (widths.get(key, DUMMY_WIDTH) + widths.get(inner, DUMMY_WIDTH)) / 2 + COLUMN_GAP
            limit = xs[inner] + step * gap
            xs[key] = max(wanted[key], limit) if step == 1 else min(wanted[key], limit)


def _weightiest(neighbours: list[Key]) -> list[Key]:
    """The boxes among the neighbours, if any: a chain of boxes stays straight, and the edges that pass it by make
    room.
    """
    return [key for key in neighbours if not isinstance(key, Dummy)] or neighbours


def _straighten(
    rows: list[list[Key]], chains: dict[tuple[Key, Key], list[Key]], xs: dict[Key, float], widths: Mapping[Key, float]
) -> None:
    """Give all dummies of an edge one x, the outermost of theirs, where nothing else stands in the way."""
    for chain in chains.values():
        dummies = [item for item in chain[1:-1] if isinstance(item, Dummy)]
        if len(dummies) < 2:
            continue
        ends = (xs[chain[0]] + xs[chain[-1]]) / 2
        pick = max if sum(xs[item] for item in dummies) / len(dummies) >= ends else min
        goal = pick(xs[item] for item in dummies)
        if all(_is_free(rows[item.row], item, goal, xs, widths) for item in dummies):
            xs.update(dict.fromkeys(dummies, goal))


def _is_free(row: list[Key], item: Key, goal: float, xs: dict[Key, float], widths: Mapping[Key, float]) -> bool:
    low, high = min(xs[item], goal), max(xs[item], goal)
    return all(
        other == item
        or not low - DUMMY_WIDTH < xs[other] + side * widths.get(other, DUMMY_WIDTH) / 2 < high + DUMMY_WIDTH
        for other in row
        for side in (-1, 1)
    )


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _bands(rows: list[list[Key]], heights: Mapping[Key, float]) -> list[tuple[float, float]]:
    """Top and bottom of each row."""
    bands: list[tuple[float, float]] = []
    top = 0.0
    for row in rows:
        height = max((heights.get(key, 0.0) for key in row), default=0.0)
        bands.append((top, top + height))
        top += height + ROW_GAP
    return bands


def _points(
    chain: list[Key],
    xs: dict[Key, float],
    bands: list[tuple[float, float]],
    centres: dict[Key, tuple[float, float]],
    sizes: Mapping[Key, tuple[float, float]],
) -> list[tuple[float, float]]:
    """From the bottom of the source to the top of the target, straight down through every row between."""
    (x0, y0), (x1, y1) = centres[chain[0]], centres[chain[-1]]
    between = [(xs[item], y) for item in chain[1:-1] if isinstance(item, Dummy) for y in bands[item.row]]
    return [(x0, y0 + sizes[chain[0]][1] / 2), *between, (x1, y1 - sizes[chain[-1]][1] / 2)]
