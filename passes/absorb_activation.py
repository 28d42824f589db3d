"""Let the quantizer behind a relu or clip do its work, so that the runtime can remove it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage, output_spec
from fxquant.graph.rewriter import Rewriter
from fxquant.ops.activation import activation_bounds
from fxquant.ops.base import Role
from fxquant.spec import Limits, QuantSpec

from .norms import in_front_of_live, is_live_batch_norm
from .values import role_of, set_value_spec


@dataclass(frozen=True)
class AbsorbActivation(Pass):
    """Quantize after a relu or clip instead of before it, on a grid that does not leave the activation's range.

    onnxruntime removes a Relu before a QuantizeLinear iff the zero point is the lowest code, and a Clip iff the grid
    lies within its bounds; only then does the convolution in front run in its integer kernel.

    1. relu behind an operation with an integer kernel: zero point = lowest code.
    2. clip or hardtanh with bounds (low, high): grid within [low, high]; low = 0 also fixes the zero point.
    3. A live batch norm, which outside training is nothing: the quantizer moves behind it, and behind what case 1 or 2
       finds there.
    4. A symmetric signed grid keeps its zero point 0: the quantizer moves behind the activation, and no limit is set.

    Declines, with the reason: the value before the activation has other users; it comes from no integer kernel, or from
    a concatenation where only onnxruntime could absorb it; the bounds are not constants, or leave out 0.
    Contract: PRESERVES (it only annotates).
    """

    name: ClassVar[str] = "absorb-activation"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.ASSIGNED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Visit every relu and clip that has a spec."""
        for node in program.graph.nodes:
            spec = output_spec(node)
            if spec is not None and role_of(program, node) is Role.ACTIVATION:
                self._absorb(program, rewriter, node, spec)

    def _absorb(self, program: Program, rewriter: Rewriter, node: fx.Node, spec: QuantSpec) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        reason = _why_not(program, node, source)
        if reason is not None:
            rewriter.miss(node, f"{node.name} not absorbed: {reason}")
            return
        bounds = activation_bounds(node)
        assert bounds is not None
        rewriter.set_output_spec(source, None)
        rewriter.set_input_spec(node, 0, None)
        if not (spec.symmetric and spec.signed) and not is_live_batch_norm(program, node):  # cases 3 and 4
            set_value_spec(rewriter, node, spec, spec.limited(limits_of(bounds, spec)))


def _why_not(program: Program, node: fx.Node, source: fx.Node) -> str | None:
    bounds = activation_bounds(node)
    if bounds is None:
        return "its bounds are not constants"
    if bounds[0] > 0 or bounds[1] <= 0:
        return f"its bounds [{bounds[0]:g}, {bounds[1]:g}] leave out 0"
    role = role_of(program, in_front_of_live(program, source))
    if output_spec(source) is None or role in (Role.ACTIVATION, Role.GRID_PRESERVING, None):
        return f"{source.name} has no integer kernel whose output it could clip"
    if role_of(program, source) is Role.CONCAT and not program.target.clips_by_grid:
        return f"{source.name} is a concatenation, whose output is on the grid of its inputs"
    if len(source.users) > 1:
        users = ", ".join(user.name for user in source.users)
        return f"{source.name} has {len(source.users)} users ({users})"
    return None


def limits_of(bounds: tuple[float, float], spec: QuantSpec) -> Limits:
    """The limits under which a grid makes an activation with these bounds, around 0, redundant (cases 1 and 2)."""
    low, high = bounds
    finite_high = None if high == float("inf") else high
    if low == 0.0:
        return Limits(0.0, finite_high, spec.qmin)  # case 1, and case 2 from 0
    return Limits(None if low == float("-inf") else low, finite_high)  # case 2
