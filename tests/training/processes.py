"""Two processes of one gloo group that live as long as a test module, and run what tests give them, both at once."""

from __future__ import annotations

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

COUNT = 2
START_SECONDS, JOB_SECONDS = 120, 60  # a hang is a failure
_SPAWN = multiprocessing.get_context("spawn")


class Failure(Exception):
    """What a process raised, or that it did not answer."""


class Processes:
    """Usable in a `with`; after a failure its processes may have lost step, so that the next job gets new ones.

    Arguments:
        folder: an empty one, for the files by which they find each other.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._starts = folder, 0
        self._workers: list[Any] = []
        self._ends: list[Connection] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, job: Callable[..., Any], *args: Any, timeout: float = JOB_SECONDS) -> list[Any]:
        """What `job(*args)` returns in each process, by rank. `job` is a function of an importable module."""
        if not self._workers:
            self._start()
        try:
            for end in self._ends:
                end.send_bytes(pickle.dumps((job, args)))
            answers = self._answers(timeout)
        except BaseException:
            self._stop()
            raise
        return answers

    def _start(self) -> None:
        self._starts += 1
        for rank in range(COUNT):
            mine, theirs = _SPAWN.Pipe()
            file = str(self._folder / f"group{self._starts}")
            worker = _SPAWN.Process(target=_serve, args=(theirs, rank, file), daemon=True)
            worker.start()
            self._workers.append(worker)
            self._ends.append(mine)
        self._answers(START_SECONDS)

    def _answers(self, timeout: float) -> list[Any]:
        """Of all processes, within `timeout` seconds together; what one alone did wrong often shows in the other."""
        deadline = time.monotonic() + timeout
        found = [self._answer(rank, deadline - time.monotonic()) for rank in range(COUNT)]
        wrong = [f"process {rank}: {answer}" for rank, (is_right, answer) in enumerate(found) if not is_right]
        if wrong:
            raise Failure("\n".join(wrong))
        return [answer for _, answer in found]

    def _answer(self, rank: int, seconds: float) -> tuple[bool, Any]:
        if not self._ends[rank].poll(max(seconds, 1.0)):
            return False, "no answer in time"
        try:
            answer: tuple[bool, Any] = pickle.loads(self._ends[rank].recv_bytes())
        except (EOFError, ConnectionError):
            return False, "it died"
        return answer

    def _stop(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.join()
        for end in self._ends:
            end.close()
        self._workers, self._ends = [], []


def _serve(end: Connection, rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=COUNT, timeout=timedelta(seconds=JOB_SECONDS)
    )
    end.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            job, args = pickle.loads(end.recv_bytes())
        except EOFError:
            return
        try:
            answer = True, job(*args)
        except Exception:
            answer = False, traceback.format_exc()
        end.send_bytes(pickle.dumps(answer))
