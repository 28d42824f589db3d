"""Give sigmoid, softmax and tanh the grid that fixed-point kernels compute them on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage
from fxquant.graph.rewriter import Rewriter
from fxquant.spec import QuantSpec

from .values import check_ops, definition_of, is_named, set_value_spec, wanted_specs


@dataclass(frozen=True)
class FixOutputScales(Pass):
    """Fix the output grid of operations with a known range to a scale that is a power of two.

    Their kernels write fixed-point fractions, and a runtime refuses other scales (XNNPACK's sigmoid at 8 bits, QNN's at
    16), or requantizes. With n bits:

    1. Sigmoid, softmax: scale 2^-n, zero point at the lowest code; the range is [0, 1 - 2^-n].
    2. Tanh: scale 2^(1-n), zero point in the middle of the codes; the range is [-1, 1 - 2^(1-n)].

    Declines, with the reason, a symmetric spec: its zero point, or its number of codes, does not go with such a scale.
    Contract: PRESERVES (it only annotates).

    Options:
        ops: the operations that are meant, by our name or ONNX operator type.
    """

    name: ClassVar[str] = "fix-output-scales"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.ASSIGNED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    ops: tuple[str, ...] = ("Sigmoid", "Softmax", "Tanh")

    def __post_init__(self) -> None:
        check_ops(self.ops, "fix-output-scales: ops")

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Fix what is wanted of each such value, whoever wants it."""
        for node in program.graph.nodes:
            definition = definition_of(program, node)
            if definition is None or not is_named(self.ops, node, definition):
                continue
            for spec in wanted_specs(node):
                if spec.symmetric:
                    rewriter.miss(node, f"{node.name} keeps its estimated range: its spec is symmetric")
                else:
                    low = -1.0 if definition.output_range is None else 0.0
                    set_value_spec(rewriter, node, spec, _fixed(spec, low))


def _fixed(spec: QuantSpec, low: float) -> QuantSpec:
    """`spec` on the range [low, 1) in 2^bits steps, of which the grid has all but the last."""
    scale = (1.0 - low) / (spec.steps + 1)
    return replace(spec, fixed=(low, 1.0 - scale))
