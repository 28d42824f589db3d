"""Lockstep: iterators of several processes that advance together, so that what is collective in between meets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from fxquant.errors import CalibrationError
from fxquant.numerics.peers import Peers

T = TypeVar("T")
_HAS, _IS_DONE, _HAS_FAILED = 0, 1, 2


def in_step(items: Iterable[T], peers: Peers | None, device: torch.device) -> Iterator[T | None]:
    """The items, as many as the process that has most of them; None in place of those that this one has not.

    An exception of one process's iterator is raised there, and as a CalibrationError that names the process in all
    others. Without peers: the items.

    Arguments:
        device: where the group's backend takes tensors.
    """
    if peers is None:
        yield from items
        return
    iterator = iter(items)
    while True:
        item, state, failure = None, _HAS, None
        try:
            item = next(iterator)
        except StopIteration:
            state = _IS_DONE
        except Exception as err:
            state, failure = _HAS_FAILED, err
        states = peers.gathered(torch.tensor(state, device=device)).tolist()
        if _HAS_FAILED in states:
            texts = peers.objects(None if failure is None else f"{type(failure).__name__}: {failure}")
            raise failure or _failure_of_another(texts)
        if _HAS not in states:
            return
        yield item


def _failure_of_another(texts: list[str | None]) -> CalibrationError:
    rank = next(rank for rank, text in enumerate(texts) if text is not None)
    return CalibrationError(
        f"batches of process {rank}",
        expected="batches in all processes",
        got=str(texts[rank]),
        remedy="It fails there; all others stop with it.",
    )
