"""PassData: the batches that passes measure with, and the float program that they measure against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fxquant.errors import PassError
from fxquant.graph.batches import Batch
from fxquant.graph.bias_correction import undo_corrections
from fxquant.numerics.fake_quant import Mode

if TYPE_CHECKING:
    from fxquant.graph.program import Program


@dataclass(frozen=True)
class PassData:
    """What a run of passes measures with.

    Arguments:
        batches: iterated anew by each pass, in the same order each time if results are to be reproducible: a list; a
            DataLoader without shuffling.
        folder: where passes keep what they have finished, so that a run that was killed goes on; None: nowhere.
        progress: whether long passes show a progress bar when standard error is a terminal.
        reference: the program in float, as it was when the run began; the manager makes it.

    Raises PassError for batches that can be iterated only once.
    """

    batches: Iterable[Batch]
    folder: Path | None = None
    progress: bool = True
    reference: Program | None = None

    def __post_init__(self) -> None:
        require_repeatable(self.batches)

    def beginning_at(self, program: Program) -> PassData:
        """The same data, with `program` as it is now, all quantizers off, as the reference unless there is one."""
        return self if self.reference is not None else replace(self, reference=float_twin(program))


def require_repeatable(batches: Iterable[Batch]) -> None:
    """Raise PassError for batches that can be iterated only once, and for a bare tensor."""
    if isinstance(batches, (Iterator, torch.Tensor)):
        raise PassError(
            "batches of passes",
            expected="what can be iterated anew for each pass: a list, a DataLoader",
            got=f"{type(batches).__name__}",
            remedy="Put it in a list: list(batches), or [batch].",
        )


def float_twin(program: Program) -> Program:
    """A copy in eval mode whose quantizers are all off: it computes in float, with biases as before any correction."""
    twin = program.copy()
    undo_corrections(twin)
    for _, module in twin.fake_quant_nodes():
        module.mode = Mode.OFF
    twin.module.eval()
    return twin
