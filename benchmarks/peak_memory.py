"""Peak resident memory of one call, in a process of its own.

The peak that the kernel keeps for a program (VmHWM in /proc/self/status) is set back right before the call, so that
what was built beforehand counts only with what of it is still there. Where there is no /proc it is getrusage's, which
may show the parent's peak instead: a child inherits it. glibc is asked to give large blocks back as soon as they are
free: what it keeps otherwise differs from run to run by more than calibration's own memory.
"""

import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

Task = TypeVar("Task")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
LARGE_BLOCK = str(128 * 1024)
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": LARGE_BLOCK, "MALLOC_TRIM_THRESHOLD_": LARGE_BLOCK}


def in_child(measure: Callable[[Task], int], task: Task) -> int:
    """`measure(task)` in a fresh interpreter; both must be importable there."""
    with _environment(GIVE_BACK), ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, task).result()


def peak_bytes(call: Callable[[], object]) -> int:
    """Run `call`, and return the most memory that this process held meanwhile."""
    _reset()
    call()
    return _peak()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """These variables for the processes that are started within."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _reset() -> None:
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return


def _peak() -> int:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
