"""Whether a forward is the second one, which gradient checkpointing runs to get back what its first did not keep."""

from __future__ import annotations

import torch


def is_recomputing() -> bool:
    """Whether this runs inside a backward pass: state that a forward moves was moved by the first one already.

    torch.utils.checkpoint recomputes in backward, on the engine's thread of a graph task, with or without reentrancy.
    """
    return not torch.compiler.is_compiling() and bool(torch._C._current_graph_task_id() != -1)
