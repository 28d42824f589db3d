"""Say how each value is to be quantized, for whoever produces it and for whoever reads it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import fx

from fxquant.graph.constants import Constants
from fxquant.graph.float_reasons import FOLLOWS
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage, input_slots, input_spec
from fxquant.graph.rewriter import Rewriter
from fxquant.ops.base import OpDef, Role
from fxquant.ops.table import TABLE
from fxquant.placement import Choice, Decision, Rule, Source, check_rules, defaults
from fxquant.spec import QuantSpec, parse_training

from .masks import mask_islands
from .rule_report import report_rules
from .values import (
    INTEGER_ROLES,
    arg_slot,
    check_ops,
    definition_of,
    is_float_value,
    is_named,
    is_parameter,
    role_of,
    set_value_spec,
    wanted_specs,
    weight_slot,
)
from .wishes import Wish, Wishes


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
    5. A grid-preserving operation (pooling maximum, reshape ...) is quantized on both sides when either side is. One
       that a rule excludes, or a concatenation, leaves its value in float for all readers where it reads a quantized
       one, together with what moves that value on: between two quantizers it would run on codes all the same.
    6. Where those who make a value and those who read it want different specs of it, the most specific rule decides;
       defaults yield to any rule. A rule's `activation` speaks of both sides, `input` and `output` of one.
    7. A rule's `output` on a relu or clip changes what it gives. A grid-preserving operation has no spec of its own: a
       rule can only leave it in float.
    8. A node rule that names an input or a parameter speaks of that value, whoever reads it; so does `output` in a rule
       on a float operation whose result is quantized for its readers.
    9. A parameter that is no weight (a layer scale, a position embedding) takes the spec of activations, but no moving
       average: its grid follows the parameter.

    Operations that the table does not know, float-only operations and nodes that a rule excludes are left in float,
    each with its reason. Refuses rules that can match nothing, and rules that contradict each other, with their places
    in the file; rules that decide nothing, or want quantized what has no integer kernel, are near misses in the trace.
    Contract: PRESERVES (it only annotates).

    Options:
        activation: spec of activations.
        weight: spec of weights (per tensor here; select-per-channel narrows it).
        rules: placement rules, see fxquant.placement.
        integer_ops: operations (our names or ONNX operator types) that the target has integer kernels for, though
            onnxruntime has none: "ConvTranspose".
    """

    name: ClassVar[str] = "assign-specs"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    leaves: ClassVar[Stage | None] = Stage.ASSIGNED
    contract: ClassVar[Contract] = Contract.PRESERVES

    activation: QuantSpec = QuantSpec(bits=8)
    weight: QuantSpec = QuantSpec(bits=8, signed=True, symmetric=True, strict=True)
    rules: tuple[Rule, ...] = field(default=())
    integer_ops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_ops(self.integer_ops, "assign-specs: integer_ops")

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Annotate the compute first, then what lies between it."""
        check_rules(self.rules, program, TABLE)
        masked, constants = mask_islands(program), Constants(program)
        wishes = Wishes(program, rewriter, self.rules)
        for node in program.graph.nodes:
            if node.op not in ("call_function", "call_module") or constants.is_constant(node):
                continue
            definition = definition_of(program, node)
            if definition is None:
                rewriter.set_float_reason(node, f"operation {node.target} is not in the table")
                continue
            self._assign(wishes, node, definition, masked, constants)
        base = defaults(self.activation, self.weight)
        _spread_forward(wishes, masked, base)
        _limit_outputs(program, rewriter)
        _spread_backward(wishes, masked, base)
        wishes.agree()
        report_rules(wishes)

    def _role(self, node: fx.Node, definition: OpDef) -> Role:
        role = definition.role_for(node)
        return Role.COMPUTE if role is Role.FLOAT and is_named(self.integer_ops, node, definition) else role

    def _assign(
        self, wishes: Wishes, node: fx.Node, definition: OpDef, masked: dict[fx.Node, str], constants: Constants
    ) -> None:
        role = self._role(node, definition)
        if "float_reason" in node.meta:  # an earlier pass decided
            return
        if node in masked:
            wishes.rewriter.set_float_reason(node, masked[node])  # case 3
        elif role is Role.FLOAT:
            wishes.rewriter.set_float_reason(node, f"{definition.name} has no integer kernel")
        if role not in INTEGER_ROLES or not is_float_value(node) or (node in masked and role is not Role.FIXED_RANGE):
            return
        decision = wishes.settle(node, definition, defaults(self.activation, self.weight))
        if not decision.quantize:
            wishes.rewriter.set_float_reason(node, f"excluded by rule {decision.quantize_by}")
            return
        if node not in masked:  # case 3: a masked softmax reads a float value
            _want_inputs(wishes, node, definition, decision, constants)
        wishes.want_output(node, decision.output)


def _want_inputs(wishes: Wishes, node: fx.Node, definition: OpDef, decision: Decision, constants: Constants) -> None:
    """Cases 1 and 9: a spec for every float input but the bias."""
    of_weight = weight_slot(node, definition)
    of_bias = None if definition.bias is None else arg_slot(node, definition.bias)
    for slot, value in enumerate(input_slots(node)):
        if slot != of_bias and is_float_value(value):
            choice = decision.input
            if constants.is_constant(value):
                choice = decision.weight if slot == of_weight else _without_average(choice)
            wishes.want_input(node, slot, choice)


def _without_average(choice: Choice) -> Choice:
    """Case 9."""
    averages = parse_training(choice.spec.training)[0] == "moving-average"
    return replace(choice, spec=replace(choice.spec, training="static")) if averages else choice


def _limit_outputs(program: Program, rewriter: Rewriter) -> None:
    """Case 2: what is wanted of a value obeys the range that its operation fixes, whoever wants it."""
    for node in program.graph.nodes:
        definition = definition_of(program, node)
        if definition is not None and definition.output_range is not None:
            for spec in wanted_specs(node):
                set_value_spec(rewriter, node, spec, spec.limited(definition.output_range))


def _spread_forward(wishes: Wishes, masked: dict[fx.Node, str], base: Decision) -> None:
    """Cases 4 and 5, in graph order: what keeps a quantized value's grid, or is absorbed, is quantized too."""
    left: set[fx.Node] = set()
    for node in wishes.program.graph.nodes:
        role = role_of(wishes.program, node)
        if node in masked:
            continue
        if role in (Role.CONCAT, Role.GRID_PRESERVING) and (reason := _why_left(wishes, node, left, base)):
            left.update(_leave(wishes, node, reason))
        if role not in (Role.ACTIVATION, Role.GRID_PRESERVING) or node in left:
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or not is_float_value(source):
            continue
        wish = next(wishes.of(source), None)
        if wish is not None and not is_parameter(source):
            _want_both_sides(wishes, node, wish, base)


def _why_left(wishes: Wishes, node: fx.Node, left: set[fx.Node], base: Decision) -> str:
    """Why what moves or joins codes leaves its value in float; "" if it does not."""
    definition = definition_of(wishes.program, node)
    assert definition is not None
    sources = [source for source in input_slots(node) if is_float_value(source) and not is_parameter(source)]
    moved = next((source for source in sources if source in left), None)
    if moved is not None and definition.role_for(node) is Role.GRID_PRESERVING:
        return f"follows its input '{moved.name}', which a rule leaves in float"
    decision = wishes.settle(node, definition, base)
    is_integer = moved is not None or any(True for source in sources for _ in wishes.of(source))
    return "" if decision.quantize or not is_integer else f"excluded by rule {decision.quantize_by}"


def _leave(wishes: Wishes, node: fx.Node, reason: str) -> list[fx.Node]:
    """Leave a node's value, or its parts, in float for all who read it."""
    parts = [node] if is_float_value(node) else [user for user in node.users if is_float_value(user)]
    wishes.rewriter.set_float_reason(node, reason)
    for value in parts:
        wishes.rewriter.set_float_reason(value, reason)
        wishes.drop_readers(value)
    return [node, *parts]


def _spread_backward(wishes: Wishes, masked: dict[fx.Node, str], base: Decision) -> None:
    """Case 5, in reverse: a grid-preserving operation whose output is wanted quantized takes a quantized input."""
    for node in reversed(list(wishes.program.graph.nodes)):
        role = role_of(wishes.program, node)
        if role is not Role.GRID_PRESERVING or input_spec(node, 0) is not None or node in masked:
            continue
        wish = next(wishes.of(node), None)
        source = node.args[0]
        if wish and isinstance(source, fx.Node) and is_float_value(source) and not is_parameter(source):
            _want_both_sides(wishes, node, wish, base)


def _want_both_sides(wishes: Wishes, node: fx.Node, wish: Wish, base: Decision) -> None:
    definition = definition_of(wishes.program, node)
    assert definition is not None
    follows = replace(wish.choice, by=_following(wish.by))
    decision = wishes.settle(node, definition, replace(base, input=follows, output=follows))
    if not decision.quantize:
        wishes.rewriter.set_float_reason(node, f"excluded by rule {decision.quantize_by}")
        return
    is_moved = definition.role_for(node) is Role.GRID_PRESERVING
    wishes.want_input(node, 0, follows)
    if is_float_value(node):
        wishes.want_output(node, follows if is_moved else decision.output)  # case 7
    for user in list(node.users):
        if not is_float_value(node) and is_float_value(user):  # the parts of a split or chunk
            wishes.want_output(user, follows)


def _following(source: Source) -> Source:
    """What follows a value does so by the rule that decided the value."""
    if not source.rules:
        return Source(FOLLOWS)
    return source if source.text.startswith(FOLLOWS) else replace(source, text=f"{FOLLOWS}: {source}")
