"""The base of every pass: a frozen dataclass whose fields are its options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from fxquant.graph.program import Program, Stage

if TYPE_CHECKING:
    from fxquant.graph.rewriter import Rewriter


class Contract(Enum):
    """What a pass promises about the float outputs of the program.

    PRESERVES is checked only where inputs are given: `PassManager([...]).run(program, check_inputs=x)`, or the same
    argument of Pipeline.prepare and finalize; the other two are declarations that nothing checks.
    """

    PRESERVES = "preserves"  # unchanged up to float rounding
    QUANTIZES = "quantizes"  # changed by quantization only
    CHANGES = "changes"  # changed on purpose


class Pass(ABC):
    """One rewrite of the graph.

    Subclasses are frozen dataclasses in a file of their own; their fields are the options that a config may set.
    They edit through the Rewriter only, and say with `rewriter.miss` why what nearly matched did not. Their contract is
    checked only in runs with `check_inputs=` (see Contract).
    """

    name: ClassVar[str]
    stages: ClassVar[tuple[Stage, ...]]
    leaves: ClassVar[Stage | None] = None  # the stage that the program is at afterwards; None: unchanged
    contract: ClassVar[Contract]

    @property
    def needs_data(self) -> bool:
        """Whether it measures with batches (`rewriter.data`): a run without them is refused before it begins."""
        return False

    @abstractmethod
    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Edit the program through `rewriter`."""
