"""Files that a full disk or a kill never leaves half written.

They are written without a name (O_TMPFILE) where the file system can do that, flushed, and only then put in place;
elsewhere under a temporary name that is removed on failure.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacement(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, which takes the place of `path` when the block ends well; else nothing is left of it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with _new_file(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not temporary.exists():
                # CPython follows the link only through linkat, which it calls when a folder's descriptor is given.
                os.link(f"/proc/self/fd/{file.fileno()}", temporary, src_dir_fd=file.fileno(), follow_symlinks=True)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise


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


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) that takes the place of `path` once it is whole."""
    with replacement(path) as file:
        file.write(text.encode("utf-8"))


def remove(path: Path) -> None:
    """Remove a file if it is there and can be."""
    with contextlib.suppress(OSError):
        path.unlink()
