"""Progress bars on long work; silent unless standard error is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

Item = TypeVar("Item")


def track(
    items: Iterable[Item], text: str | Callable[[], str], *, total: int | None = None, show: bool = True
) -> Generator[Item, None, None]:
    """Yield from `items` under a progress bar; a callable `text` is asked again after each."""
    if not show or not sys.stderr.isatty():
        yield from items
        return
    ask = text if callable(text) else lambda: text
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(ask(), total=len(items) if total is None and isinstance(items, Sized) else total)
        for item in items:
            yield item
            bar.update(task, advance=1, description=ask())
