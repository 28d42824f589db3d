"""Progress bars on long work; silent unless standard error is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

Item = TypeVar("Item")


def track(items: Iterable[Item], text: str, *, total: int | None = None, show: bool = True) -> Iterator[Item]:
    """Yield from `items` under a progress bar."""
    if not show or not sys.stderr.isatty():
        yield from items
        return
    yield from rich_track(items, description=text, total=total, console=Console(stderr=True), transient=True)
