"""Whether a pass that promises to preserve the float outputs did."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxquant.errors import PassError
from fxquant.graph.batches import Batch, as_arguments
from fxquant.graph.program import Program

TOLERANCE = 1e-4  # of the output's largest magnitude: float32 rounding through some hundred layers stays below it


class OutputCheck:
    """Compares a program's outputs before and after a pass; does nothing without inputs.

    The outputs are those of a copy in eval mode, so that no observer, batch norm or gradient sees the check.
    """

    def __init__(self, program: Program, inputs: Batch | None, tolerance: float) -> None:
        self.program = program
        self.inputs = inputs
        self.tolerance = tolerance
        self._outputs: list[Any] = []

    def before(self) -> None:
        """Keep the outputs as they are now."""
        if self.inputs is not None:
            self._outputs = self._run()

    def after(self) -> None:
        """Raise PassError if an output is no longer what `before` kept."""
        if self.inputs is None:
            return
        for index, (old, new) in enumerate(zip(self._outputs, self._run(), strict=True)):
            difference = _difference(old, new)
            if not difference <= self.tolerance:
                raise PassError(
                    f"output {index} changed, though the pass promises to preserve it",
                    expected=f"a difference of at most {self.tolerance:g} of its largest magnitude",
                    got=f"{difference:.3g}",
                )

    def _run(self) -> list[Any]:
        args, kwargs = as_arguments(self.inputs) if self.inputs is not None else ((), {})
        module = self.program.copy().module.eval()
        with torch.no_grad():
            return pytree.tree_leaves(module(*args, **kwargs))


def _difference(old: Any, new: Any) -> float:
    """Largest difference as a fraction of the largest magnitude; infinite if shape, dtype, value or NaNs differ."""
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return 0.0 if old == new else float("inf")
    if old.shape != new.shape or old.dtype != new.dtype:
        return float("inf")
    if torch.equal(old, new) or old.numel() == 0:
        return 0.0
    if not old.is_floating_point():
        return float("inf")
    is_same = (old == new) | (old.isnan() & new.isnan())
    gap = torch.where(is_same, 0.0, (old.double() - new.double()).abs())
    finite = old[old.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    worst = float(gap.nan_to_num(float("inf"), float("inf")).max())
    return worst / largest if largest else worst
