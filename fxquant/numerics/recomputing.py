"""The second forward, which gradient checkpointing runs to get back what its first did not keep, and which first it is.

torch.utils.checkpoint recomputes in backward, while some node of the first forward's graph is evaluated. Nodes are
numbered as they are made, so that a forward that began at number b made that node, of number s, if

    without reentrancy    b <= s, and no later forward did         the node is one of those it made
    with it               b > s, and no earlier forward did        the node is CheckpointFunction's, which called it
"""

from __future__ import annotations

from collections import deque
from typing import Any, Generic, TypeVar

import torch

from fxquant.errors import FxquantError

T = TypeVar("T")
_KEPT = 64  # forwards whose backward may be outstanding: gradients of more are rarely summed in one pass


def is_recomputing() -> bool:
    """Whether this runs inside a backward pass: state that a forward moves was moved by the first one already.

    torch.utils.checkpoint recomputes in backward, on the engine's thread of a graph task, with or without reentrancy.
    """
    return not torch.compiler.is_compiling() and bool(torch._C._current_graph_task_id() != -1)


class FirstForwards(Generic[T]):
    """What the latest forwards used, for recomputations of them; copies and files begin with none."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, bool, T]] = deque(maxlen=_KEPT)

    def keep(self, value: T) -> None:
        """Keep what a forward, which is none of checkpointing's second ones, uses."""
        self._kept.append((torch._C._autograd._get_sequence_nr(), torch.is_grad_enabled(), value))

    def of_this(self) -> T:
        """What the first forward of this recomputation used. Raises FxquantError if that is no longer kept."""
        return self._this()[-1]

    def require_latest(self, place: str) -> None:
        """Raise FxquantError where a forward came after the recomputed one, and has moved what `place` names."""
        if self._this() is not self._kept[-1]:
            raise FxquantError(
                f"gradient checkpointing: {place} is recomputed",
                expected="the latest forward in training mode",
                got="an earlier one, whose grid has moved on",
                remedy="Call backward after each forward, or freeze the encodings before (freeze_encodings).",
            )

    def _this(self) -> tuple[int, bool, T]:
        node: Any = torch._C._current_autograd_node()  # torch leaves it untyped
        number = node._sequence_nr()
        if node.name().startswith("CheckpointFunction"):
            found = [kept for kept in self._kept if not kept[1] and kept[0] > number][:1]
        else:
            found = [kept for kept in self._kept if kept[1] and kept[0] <= number][-1:]
        if not found:
            raise FxquantError(
                "gradient checkpointing: a forward is recomputed",
                expected=f"one of the latest {_KEPT} of this module in training mode",
                got="another one",
                remedy="Call backward for fewer forwards at once, or freeze batch norm and encodings before.",
            )
        return found[0]

    def __reduce__(self) -> tuple[type[FirstForwards[T]], tuple[()]]:
        return FirstForwards, ()
