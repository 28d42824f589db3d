"""Files that a full disk or a kill never leaves half written.

They are written without a name (O_TMPFILE) where the file system can do that, flushed, and only then put in place;
elsewhere under a temporary name that is removed on failure. A file that is replaced keeps its permission bits, and a
link to it stays a link.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fxquant.errors import StorageError

REMEDY = "Free some space or choose another place; what was there before is unchanged."


@dataclass(frozen=True)
class _Whole:
    """A file written whole that is yet to take the place of `target`."""

    file: BinaryIO
    temporary: Path
    target: Path

    def name(self) -> None:
        """Give a nameless file its temporary name."""
        if not self.temporary.exists():
            descriptor = self.file.fileno()
            # CPython follows the link only through linkat, which it calls when a folder's descriptor is given.
            os.link(f"/proc/self/fd/{descriptor}", self.temporary, src_dir_fd=descriptor, follow_symlinks=True)

    def place(self) -> None:
        """Take the target's place."""
        os.replace(self.temporary, self.target)


@dataclass(frozen=True)
class _Group:
    stack: contextlib.ExitStack
    files: list[_Whole] = field(default_factory=list)
    afterwards: list[Callable[[], None]] = field(default_factory=list)


_GROUP: ContextVar[_Group | None] = ContextVar("fxquant.files.group", default=None)


@contextlib.contextmanager
def replacement(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, which takes the place of `path` when the block ends well; else nothing is left of it.

    Inside `together` it takes its place at that block's end. A device or a pipe is written as it is.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as device:
            yield device
        return
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    with contextlib.ExitStack() as stack:
        stack.callback(remove, temporary)
        file: BinaryIO = stack.enter_context(_new_file(temporary))
        yield file
        file.flush()
        _keep_permissions(file, target)
        os.fsync(file.fileno())
        whole, group = _Whole(file, temporary, target), _GROUP.get()
        if group is None:
            whole.name()
            whole.place()
        else:
            group.files.append(whole)
            group.stack.push(stack.pop_all())


@contextlib.contextmanager
def together() -> Iterator[None]:
    """The files that are replaced in the block take their places one right after another at its end, or none does.

    Raises StorageError if one cannot; those before it are then put back as they were.
    """
    with contextlib.ExitStack() as stack:
        group = _Group(stack)
        token = _GROUP.set(group)
        try:
            yield
        finally:
            _GROUP.reset(token)
        for whole in group.files:
            with written(whole.target):
                whole.name()
        _place_all(group.files)
    for action in group.afterwards:
        action()


def _place_all(files: Sequence[_Whole]) -> None:
    with contextlib.ExitStack() as backups, contextlib.ExitStack() as undo:
        for whole in files:
            restore = _backed_up(whole.target, backups)
            with written(whole.target):
                whole.place()
            undo.callback(restore)
        undo.pop_all()


def _backed_up(target: Path, backups: contextlib.ExitStack) -> Callable[[], None]:
    """What puts `target` back as it is now; the second name that this needs goes when `backups` ends."""
    backup = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    existed = target.exists()
    with contextlib.suppress(OSError):  # a file system without second names: what took its place stays
        os.link(target, backup)
    is_kept = backup.exists()
    backups.callback(remove, backup)

    def restore() -> None:
        with contextlib.suppress(OSError):
            if is_kept:
                os.replace(backup, target)
            elif not existed:
                remove(target)

    return restore


def afterwards(action: Callable[[], None]) -> None:
    """Do `action` once the files replaced so far are in place: now, or at the end of the `together` block."""
    group = _GROUP.get()
    if group is None:
        action()
    else:
        group.afterwards.append(action)


@contextlib.contextmanager
def _new_file(temporary: Path) -> Iterator[BinaryIO]:
    """A file without a name; one called `temporary` where the file system has no such thing."""
    try:
        descriptor = os.open(temporary.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except (AttributeError, OSError) as err:
        if isinstance(err, OSError) and err.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        yield file


def _keep_permissions(file: BinaryIO, target: Path) -> None:
    with contextlib.suppress(OSError):  # there is none before, or the file system has no permissions
        os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) that takes the place of `path` once it is whole; StorageError if it cannot be."""
    with written(path), replacement(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Turn the block's OSError into a StorageError that names `path`, not a temporary file."""
    try:
        yield
    except OSError as err:
        raise StorageError(f"'{path}' cannot be written", got=err.strerror or str(err), remedy=REMEDY) from err


def make_folder(folder: Path, names: Sequence[str] = ()) -> None:
    """Make `folder` if need be, and see that files can be written there, under `names` too; else StorageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as err:
        got = "a file" if folder.is_file() else err.strerror or str(err)
        raise StorageError(
            f"folder '{folder}' cannot be written to", expected="a folder", got=got, remedy="Choose another folder."
        ) from err
    for path in (folder / name for name in names):
        if path.is_dir():
            remedy = "Move it away, or choose another place."
            raise StorageError(f"'{path}' cannot be written", expected="a file", got="a folder", remedy=remedy)


@contextlib.contextmanager
def made_folder(folder: Path, names: Sequence[str] = ()) -> Iterator[None]:
    """`make_folder` for the block; if it or the block raises, the folders that it made and that are empty go again."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        make_folder(folder, names)
        yield
    except BaseException:
        for place in new:
            with contextlib.suppress(OSError):
                place.rmdir()
        raise


def remove(path: Path) -> None:
    """Remove a file if it is there and can be."""
    with contextlib.suppress(OSError):
        path.unlink()
