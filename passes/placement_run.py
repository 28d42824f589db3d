"""What apply-placement makes of each value and operation: sections first, then rules."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import fx

from fxquant.graph.float_reasons import FOLLOWS
from fxquant.graph.program import input_slots, value_type
from fxquant.ops.base import Role
from fxquant.placement import Choice, Decision, Source
from fxquant.placement.rules import describe_rules, settle_output
from fxquant.spec import QuantSpec

from .placed_values import PADS, PlacedValues
from .placement_specs import PlacementSpecs, is_constant_scale
from .placement_switches import OFF, ONLY_MOVES, Board, Verdict, input_verdict
from .share_encodings import owner_of
from .supergroups import Line
from .values import is_float_value
from .wishes import Wishes


@dataclass
class PlacementRun:
    """One run of apply-placement over one program; the cases are that pass's."""

    values: PlacedValues
    specs: PlacementSpecs
    board: Board
    wishes: Wishes
    masked: dict[fx.Node, str]
    inner: set[fx.Node] = field(default_factory=set)  # values inside a supergroup
    lines: dict[fx.Node, Line] = field(default_factory=dict)  # supergroups, by their last operation
    coded: dict[fx.Node, QuantSpec] = field(default_factory=dict)  # values that carry codes
    decisions: dict[fx.Node, Decision] = field(default_factory=dict)  # of operations, for their weights and inputs
    biases: dict[str, list[str]] = field(default_factory=dict)  # layers whose bias a place wants on a grid of its own

    def decide_value(self, value: fx.Node) -> None:
        """Want one value quantized, or say why it stays in float."""
        operation = self.values.operation(value)
        reason = self._why_never(value, operation)
        if reason:
            self.wishes.rewriter.set_float_reason(value, reason)
            return
        source = self.values.source(value)
        if source in self.coded and value not in self.inner:  # case 2
            self._pass_on(value, operation, self.coded[source])
            return
        decision = self._settle(value, operation, self._verdict(value, operation), self._spec(value, operation))
        if decision.quantize:
            self._turn_on(value, decision.output)
        else:
            self._leave(value, decision)

    def decide_operands(self, node: fx.Node) -> None:
        """Want the parameters of an operation quantized (case 6), its constants (case 7), and what rules ask of it."""
        decision = self.decisions.get(node)
        if node in self.masked or decision is None:
            return
        slots = self.values.parameter_slots(node)
        if "weight" in slots:
            self._want_weight(node, slots["weight"], decision)
        if "bias" in slots:
            self._want_bias(node, slots["bias"])
        for slot, value in self.values.inputs(node):
            if value in self.coded:
                self._want_input(node, slot, value, decision)
            elif self.values.is_constant(value):
                self._want_constant(node, slot, value)

    def _why_never(self, value: fx.Node, operation: fx.Node) -> str:
        if "float_reason" in value.meta:  # an earlier pass decided
            return str(value.meta["float_reason"])
        if operation in self.masked and not self._is_softmax(operation):
            return self.masked[operation]  # case 4
        readers = [user for user in value.users if is_float_value(user) or user.op == "output"]
        if value.op == "placeholder" and readers and all(reader in self.masked for reader in readers):
            return self.masked[readers[0]]
        return ""

    def _is_softmax(self, node: fx.Node) -> bool:
        definition = self.values.definition(node)
        return definition is not None and definition.role_for(node) is Role.FIXED_RANGE

    def _verdict(self, value: fx.Node, operation: fx.Node) -> Verdict:
        if is_constant_scale(self.values, operation):  # case 3
            return Verdict(False, "multiplied by one known number")
        default = ONLY_MOVES if self.values.moves_codes(value) else OFF
        return self.board.verdicts.get(value, default)

    def _spec(self, value: fx.Node, operation: fx.Node) -> QuantSpec:
        spec = self.specs.of_value(value)
        sources = [source for _, source in self.values.inputs(operation)]
        is_behind = bool(sources) and sources[0] not in self.coded
        return self.specs.within_activation(operation, spec) if is_behind else spec  # case 5

    def _settle(self, value: fx.Node, operation: fx.Node, verdict: Verdict, spec: QuantSpec) -> Decision:
        by = verdict.place if verdict.value else verdict.reason
        base, weight = _choice(spec, self._why(value, verdict)), _choice(self.specs.weight, by)
        definition, taken = self.values.definition(operation), self._taken_over(operation, base)
        decision = self.wishes.settle(operation, definition, Decision(True, base, taken, weight, Source(by)))
        if taken.by.rules:
            decision = replace(decision, output=self._changed(operation, taken))
        if not decision.quantize_by.rules:  # what is off has a weight and inputs, of which rules may speak
            decision = replace(decision, quantize=verdict.value)
        self.decisions[operation] = decision
        return decision

    def _why(self, value: fx.Node, verdict: Verdict) -> str:
        """Who decided whether a value is quantized, and who gave it another spec than other values have."""
        if not verdict.value:
            return verdict.reason
        return ", ".join(dict.fromkeys((verdict.place, *self.specs.deciders(value))))

    def _taken_over(self, operation: fx.Node, base: Choice) -> Choice:
        """Case 8: what rules say of the values inside the supergroup that `operation` ends."""
        choice, line = base, self.lines.get(operation)
        for node, reader in () if line is None else pairwise(line.nodes):
            ahead = self.values.definition(reader)
            is_absorbed = ahead is not None and ahead.role_for(reader) is Role.ACTIVATION
            choice = self._changed(node, choice) if is_absorbed and node not in self.coded else base
        return choice

    def _changed(self, node: fx.Node, under: Choice) -> Choice:
        """What the rules on `node` make of a value's spec, field by field; what they leave stays as it is."""
        base = Choice(under.spec)
        over = settle_output(node, self.values.definition(node), self.wishes.rules, base)
        said = {item.name for item in over.by.settings}
        settings = (*over.by.settings, *(item for item in under.by.settings if item.name not in said))
        text = describe_rules(self.wishes.rules, settings) if settings else under.by.text
        return Choice(over.spec, Source(text, settings), under.default)

    def _pass_on(self, value: fx.Node, operation: fx.Node, spec: QuantSpec) -> None:
        verdict = self.board.verdicts.get(value, OFF)
        place = Verdict(True, verdict.place if verdict.value else FOLLOWS)
        decision = self._settle(value, operation, place, spec)
        if not decision.quantize:
            self._leave(value, decision)
            return
        self.coded[value] = spec
        self.wishes.want_input(operation, 0, _choice(spec, FOLLOWS))
        self.wishes.want_output(value, _choice(spec, place.place))
        definition, source = self.values.definition(operation), input_slots(operation)[0]
        if definition is not None and definition.name in PADS:  # what share-encodings does for the others
            self.wishes.rewriter.share_encoding(value, owner_of(source))

    def _leave(self, value: fx.Node, decision: Decision) -> None:
        by = decision.quantize_by
        self.wishes.rewriter.set_float_reason(value, f"excluded by rule {by}" if by.rules else str(by))

    def _turn_on(self, value: fx.Node, choice: Choice) -> None:
        self.coded[value] = choice.spec
        if value.op != "placeholder":
            self.wishes.want_output(value, choice)
            return
        for user in value.users:
            for slot, node in enumerate(input_slots(user)):
                if node is value and user not in self.masked:
                    self.wishes.want_input(user, slot, choice)

    def _want_weight(self, node: fx.Node, slot: int, decision: Decision) -> None:
        verdict, spec = self.specs.parameter(node, "weight")
        if not (decision.quantize if decision.quantize_by.rules else verdict.value):
            return
        granularity, obstacle = self.specs.granularity(node, spec)
        name = input_slots(node)[slot].name
        if obstacle:
            self.wishes.rewriter.miss(node, f"weight {name} stays per tensor: {obstacle}")
        base = _choice(replace(spec, granularity=granularity), verdict.place)
        self.wishes.want_input(node, slot, self._settled(node, replace(decision, weight=base)).weight)

    def _want_input(self, node: fx.Node, slot: int, value: fx.Node, decision: Decision) -> None:
        wanted = next(self.wishes.of(value), None)
        is_excluded = bool(decision.quantize_by.rules) and not decision.quantize
        if wanted is not None and not is_excluded:
            choice = self._settled(node, replace(decision, input=Choice(wanted.choice.default))).input
            if choice.by.rules:
                self.wishes.want_input(node, slot, choice)

    def _settled(self, node: fx.Node, base: Decision) -> Decision:
        """What the rules make of what is quantized, whether the operation's own output is or not."""
        return self.wishes.settle(node, self.values.definition(node), replace(base, quantize=True))

    def _want_bias(self, node: fx.Node, slot: int) -> None:
        verdict, spec = self.specs.parameter(node, "bias")
        definition = self.values.definition(node)
        if not verdict.value or definition is None:
            return
        if definition.bias is None:
            self.wishes.want_input(node, slot, _choice(spec, verdict.place))
        else:
            self.biases.setdefault(verdict.place, []).append(node.name)

    def _want_constant(self, node: fx.Node, slot: int, value: fx.Node) -> None:
        verdict = input_verdict(self.specs.sections, self.values.types(node))
        kind = value_type(value)
        if verdict.value and kind is not None and kind.dtype is torch.float32:
            self.wishes.want_input(node, slot, _choice(self.specs.of_value(value), verdict.place))


def _choice(spec: QuantSpec, place: str) -> Choice:
    return Choice(spec, Source(place))
