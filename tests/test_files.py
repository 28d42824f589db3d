"""Files are replaced whole, alone or together."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from fxquant.errors import StorageError
from fxquant.files import afterwards, make_folder, replacement, together, write_text


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture(params=["nameless", "named"])
def pair(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files a and b, on a file system with or without O_TMPFILE."""
    if request.param == "named":
        real = os.open

        def without(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "not here")
            return real(path, flags, *rest, **named)

        monkeypatch.setattr(os, "open", without)
    write_text(tmp_path / "a", "old a")
    write_text(tmp_path / "b", "old b")
    return tmp_path


def test_both_files_change_at_the_end_when_written_together(pair: Path) -> None:
    done: list[str] = []
    with together():
        write_text(pair / "a", "new a")
        afterwards(lambda: done.append("after"))
        write_text(pair / "b", "new b")
        assert (pair / "a").read_text() == "old a" and done == []
    assert contents(pair) == {"a": "new a", "b": "new b"} and done == ["after"]


def test_neither_file_changes_when_the_second_fails(pair: Path) -> None:
    with pytest.raises(ValueError, match="second"), together():
        write_text(pair / "a", "new a")
        with replacement(pair / "b") as file:
            file.write(b"half")
            raise ValueError("second")
    assert contents(pair) == {"a": "old a", "b": "old b"}


@pytest.mark.parametrize("is_new", [False, True])
def test_the_first_is_put_back_when_the_second_cannot_take_its_place(
    pair: Path, is_new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_new:
        (pair / "a").unlink()
    before, real = contents(pair), os.replace

    def failing(source: Path, target: Path) -> None:
        if target.name == "b":
            assert (pair / "a").read_text() == "new a"
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(StorageError, match=r"/b' cannot be written; got Input/output error"), together():
        write_text(pair / "a", "new a")
        write_text(pair / "b", "new b")
    assert contents(pair) == before


def test_permissions_stay_when_a_file_is_replaced(pair: Path) -> None:
    (pair / "a").chmod(0o640)
    write_text(pair / "a", "new")
    assert stat.S_IMODE((pair / "a").stat().st_mode) == 0o640


def test_link_stays_a_link_when_what_it_names_is_replaced(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("a")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a").read_text() == "new"


def test_pipe_is_written_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "text")
    reader.join(timeout=10)
    assert read == ["text"] and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["absent/file.txt", "a/file.txt", "."])
def test_error_names_the_target_and_no_temporary_file(pair: Path, name: str) -> None:
    with pytest.raises(StorageError) as caught:
        write_text(pair / name, "new")
    assert f"'{pair / name}' cannot be written" in str(caught.value) and "partial" not in str(caught.value)
    assert contents(pair) == {"a": "old a", "b": "old b"}


def test_folder_is_made_or_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "x" / "y", ["model.onnx"])
    assert list((tmp_path / "x" / "y").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file' cannot be written to; expected a folder; got a file"):
        make_folder(tmp_path / "file")
    with pytest.raises(StorageError, match=r"y' cannot be written; expected a file; got a folder"):
        make_folder(tmp_path / "x", ["y"])
