"""Say how each value is to be quantized, for whoever produces it and for whoever reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from fxquant.graph.constants import Constants
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage, input_slots, input_spec, output_spec
from fxquant.graph.rewriter import Rewriter
from fxquant.ops.base import OpDef, Role
from fxquant.ops.table import TABLE
from fxquant.placement import Decision, Rule, check_rules, decide
from fxquant.spec import QuantSpec

from .masks import mask_islands
from .values import (
    INTEGER_ROLES,
    arg_slot,
    definition_of,
    is_float_value,
    is_parameter,
    role_of,
    set_value_spec,
    wanted_specs,
    weight_slot,
)


@dataclass(frozen=True)
class AssignSpecs(Pass):
    """Assign a QuantSpec to every (value, consumer) that integer kernels need.

    1. Operations with an integer kernel want their float inputs, their weight and their output quantized.
    2. An operation with a fixed output range (sigmoid, softmax) limits its output's grid to that range.
    3. Every element-wise operation between the product or layer that makes scores and a softmax (also a hand-written
       one) stays in float together with the softmax where a second tensor comes in (a mask, a position bias), and so
       does the mask's own arithmetic: a mask holds -1e9 or -inf, from which no range can be read. The scores are
       quantized before the mask. Python numbers alone (a scale) are no mask. See passes/masks.py.
    4. A relu or clip takes over the spec of the value that it reads, but not that value's fixed range: what it gives
       may lie outside, and its readers know of no range.
    5. A grid-preserving operation (pooling maximum, reshape ...) is quantized on both sides when either side is.

    Operations that the table does not know, float-only operations and nodes that a rule excludes are left in float,
    each with its reason. Refuses rules that can match nothing. Contract: PRESERVES (it only annotates).

    Options:
        activation: spec of activations.
        weight: spec of weights (per tensor here; select-per-channel narrows it).
        rules: placement rules, see fxquant.placement.
    """

    name: ClassVar[str] = "assign-specs"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    leaves: ClassVar[Stage | None] = Stage.ASSIGNED
    contract: ClassVar[Contract] = Contract.PRESERVES

    activation: QuantSpec = QuantSpec(bits=8)
    weight: QuantSpec = QuantSpec(bits=8, signed=True, symmetric=True, strict=True)
    rules: tuple[Rule, ...] = field(default=())

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Annotate the compute first, then what lies between it."""
        check_rules(self.rules, program, TABLE)
        masked, constants = mask_islands(program), Constants(program)
        for node in program.graph.nodes:
            if node.op not in ("call_function", "call_module"):
                continue
            definition = definition_of(program, node)
            if definition is None:
                rewriter.set_float_reason(node, f"operation {node.target} is not in the table")
                continue
            self._assign(rewriter, node, definition, masked, constants)
        _spread_forward(program, rewriter, masked)
        _limit_outputs(program, rewriter)
        _spread_backward(program, rewriter, masked)

    def _assign(
        self, rewriter: Rewriter, node: fx.Node, definition: OpDef, masked: dict[fx.Node, str], constants: Constants
    ) -> None:
        role = definition.role_for(node)
        if "float_reason" in node.meta:  # an earlier pass decided
            return
        if node in masked:
            rewriter.set_float_reason(node, masked[node])  # case 3
        elif role is Role.FLOAT:
            rewriter.set_float_reason(node, f"{definition.name} has no integer kernel")
        if role not in INTEGER_ROLES or not is_float_value(node):
            return
        decision = decide(node, definition, self.rules, self.activation, self.weight)
        if not decision.quantize:
            rewriter.set_float_reason(node, f"excluded by rule {decision.rule}")
        elif node not in masked or role is Role.FIXED_RANGE:
            if node not in masked:  # case 3: a masked softmax reads a float value
                _want_inputs(rewriter, node, definition, decision, constants)
            rewriter.set_output_spec(node, decision.activation, decision.rule)


def _want_inputs(
    rewriter: Rewriter, node: fx.Node, definition: OpDef, decision: Decision, constants: Constants
) -> None:
    """Case 1: a spec for every float input but the bias."""
    of_weight = weight_slot(node, definition)
    of_bias = None if definition.bias is None else arg_slot(node, definition.bias)
    for slot, value in enumerate(input_slots(node)):
        if slot != of_bias and is_float_value(value):
            is_weight = slot == of_weight and constants.is_constant(value)
            rewriter.set_input_spec(node, slot, decision.weight if is_weight else decision.activation)


def _limit_outputs(program: Program, rewriter: Rewriter) -> None:
    """Case 2: what is wanted of a value obeys the range that its operation fixes, whoever wants it."""
    for node in program.graph.nodes:
        definition = definition_of(program, node)
        if definition is not None and definition.output_range is not None:
            for spec in wanted_specs(node):
                set_value_spec(rewriter, node, spec, spec.limited(definition.output_range))


def _spread_forward(program: Program, rewriter: Rewriter, masked: dict[fx.Node, str]) -> None:
    """Cases 4 and 5, in graph order: what keeps a quantized value's grid, or is absorbed, is quantized too."""
    for node in program.graph.nodes:
        role = role_of(program, node)
        if role not in (Role.ACTIVATION, Role.GRID_PRESERVING) or node in masked:
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or not is_float_value(source):
            continue
        spec = output_spec(source) or next(iter(wanted_specs(source)), None)
        if spec is not None and not is_parameter(source):
            _want_both_sides(program, rewriter, node, spec)


def _spread_backward(program: Program, rewriter: Rewriter, masked: dict[fx.Node, str]) -> None:
    """Case 5, in reverse: a grid-preserving operation whose output is wanted quantized takes a quantized input."""
    for node in reversed(list(program.graph.nodes)):
        if role_of(program, node) is not Role.GRID_PRESERVING or input_spec(node, 0) is not None or node in masked:
            continue
        specs = wanted_specs(node)
        source = node.args[0]
        if specs and isinstance(source, fx.Node) and is_float_value(source) and not is_parameter(source):
            _want_both_sides(program, rewriter, node, next(iter(specs)))


def _want_both_sides(program: Program, rewriter: Rewriter, node: fx.Node, spec: QuantSpec) -> None:
    rewriter.set_input_spec(node, 0, spec)
    if is_float_value(node):
        rewriter.set_output_spec(node, spec, "follows its input")
    for user in list(node.users):
        if not is_float_value(node) and is_float_value(user):  # the parts of a split or chunk
            rewriter.set_output_spec(user, spec, "follows its input")
