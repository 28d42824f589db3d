"""Running what a user wrote: whatever it raises becomes a UserCodeError that says where."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path

from fxquant.errors import FxquantError, UserCodeError
from fxquant.graph.batches import Batch

_FXQUANT = str(Path(__file__).parent.parent)
_NOT_THE_USERS = (_FXQUANT, *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))


@contextmanager
def user_code(thing: str) -> Iterator[None]:
    """Turn what the block raises, but for fxquant's own errors, into a UserCodeError "<thing> raised"."""
    try:
        yield
    except FxquantError:
        raise
    except Exception as err:
        got = f"{type(err).__name__}: {err}" if str(err) else type(err).__name__
        raise UserCodeError(f"{thing} raised", place=user_place(err), got=got) from err


def user_place(err: BaseException) -> str:
    """File and line of the innermost frame outside fxquant, Python and installed packages; of a SyntaxError its own."""
    if isinstance(err, SyntaxError) and err.filename:
        return f"{err.filename}:{err.lineno}"
    frames = traceback.extract_tb(err.__traceback__)
    users = [frame for frame in frames if not frame.filename.startswith((*_NOT_THE_USERS, "<"))]
    return f"{users[-1].filename}:{users[-1].lineno}" if users else ""


def guarded(batches: Iterable[Batch], thing: str) -> Iterable[Batch]:
    """The same batches, whose errors say where; an iterator stays one, and what has a length keeps it."""
    if isinstance(batches, Iterator):
        return _iterate(batches, thing)
    return _SizedBatches(batches, thing) if isinstance(batches, Sized) else _GuardedBatches(batches, thing)


def _iterate(batches: Iterable[Batch], thing: str) -> Iterator[Batch]:
    with user_code(thing):
        iterator = iter(batches)
    while True:
        with user_code(thing):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


class _GuardedBatches:
    def __init__(self, batches: Iterable[Batch], thing: str) -> None:
        self.batches = batches
        self.thing = thing

    def __iter__(self) -> Iterator[Batch]:
        return _iterate(self.batches, self.thing)


class _SizedBatches(_GuardedBatches):
    def __len__(self) -> int:
        assert isinstance(self.batches, Sized)
        with user_code(self.thing):
            return len(self.batches)
