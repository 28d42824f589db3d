"""Say which values and parameters are quantized, and how, as the sections of a placement file do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import fx

from fxquant.errors import ConfigError
from fxquant.graph.float_reasons import FOLLOWS
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Note, NoteKind, Program, Stage, input_slots, value_type
from fxquant.graph.rewriter import Rewriter
from fxquant.ops.base import Role
from fxquant.ops.table import TABLE
from fxquant.placement import Choice, Decision, Rule, Source, check_rules
from fxquant.placement.aimet_json import read_sections
from fxquant.placement.rules import describe_rules, settle_output
from fxquant.placement.sections import Sections
from fxquant.spec import QuantSpec, SpecOverride

from .masks import mask_islands
from .placed_values import PADS, PlacedValues
from .placement_notes import bias_notes, placement_notes
from .placement_specs import PlacementSpecs, decided_fields, is_constant_scale
from .placement_switches import OFF, ONLY_MOVES, Board, Verdict, input_verdict, place_values, symmetric_values
from .share_encodings import owner_of
from .supergroups import Line, match_supergroups
from .values import is_float_value
from .wishes import Wishes


@dataclass(frozen=True)
class ApplyPlacement(Sections, Pass):
    """Turn values and parameters on and off as six sections say (fxquant/placement/sections.py), then rules.

    1. Each value is on or off for all who read it, by the last section that speaks of it (placement_switches.py).
    2. What only moves codes is no quantizer of its own: where its source is quantized it passes the codes on.
    3. A product or quotient with one known number is off, as a runtime can fold it into a scale; rules may turn it on.
    4. What lies between attention scores and a masked softmax stays in float, whatever the file says: a mask holds
       -1e9 or -inf, from which no range can be read.
    5. A relu or clip whose input is off gets a grid that makes it redundant, so that onnxruntime can remove it.
    6. "weight" and "bias" are those of whichever operation has them. A bias that an integer kernel adds is never
       quantized on a grid of its own (quantize-bias gives it int32 codes, whatever the file says: a note).
    7. Constants that are no parameter of an operation are quantized where `is_input_quantized` speaks of its reader.
    8. Rules come last: module rules beat operation rules, node rules beat both. They reach the weights and inputs of
       what stands inside a supergroup, too. What they say of its output goes to the end of the supergroup, if only
       relus and clips lie between: each takes the spec over, and its own rules change it.

    What the file says and the program has not is a note. Refuses sections that contradict themselves, and rules as
    assign-specs does. Contract: PRESERVES (it only annotates).

    Options, besides the sections:
        activation: spec of activations, of which the sections decide the symmetry.
        weight: spec of parameters, of which the sections decide the symmetry and the granularity.
        rules: placement rules, see fxquant.placement.
    """

    name: ClassVar[str] = "apply-placement"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    leaves: ClassVar[Stage | None] = Stage.ASSIGNED
    contract: ClassVar[Contract] = Contract.PRESERVES

    activation: QuantSpec = QuantSpec(bits=8)
    weight: QuantSpec = QuantSpec(bits=8, signed=True, symmetric=True)
    rules: tuple[Rule, ...] = field(default=())
    place: str = field(default="", init=False, compare=False, repr=False)

    def placed(self, place: str) -> ApplyPlacement:
        """This pass, knowing where its sections were read."""
        object.__setattr__(self, "place", place)
        return self

    def with_file(self, text: str, file: str) -> ApplyPlacement:
        """This pass with the sections of AIMET's JSON; raises ConfigError."""
        sections = read_sections(text, file)
        found: dict[str, Any] = {item.name: getattr(sections, item.name) for item in fields(Sections)}
        return replace(self, **found).placed(file)

    def check_override(self, given: Mapping[str, SpecOverride]) -> None:
        """Refuse to change what the sections decide; raises ConfigError."""
        for option, change in given.items():
            for name, (said, place) in decided_fields(self, option).items():
                wanted = getattr(change, name)
                if wanted is not None and wanted != said:
                    raise ConfigError(
                        f"{option}.{name} cannot be overridden",
                        place=self.place or self.name,
                        expected=f"{name} {said}, which {place} decides",
                        got=f"{name} {wanted}",
                        remedy=f"Change {place} in the file, or give apply-placement a rule.",
                    )

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Decide every value in graph order, then every parameter."""
        check_rules(self.rules, program, TABLE)
        values = PlacedValues(program)
        lines = match_supergroups(values, self)
        specs = PlacementSpecs(values, self, self.activation, self.weight, symmetric_values(values, self, self.place))
        board = place_values(values, self, lines, self.place)
        run = _Run(values, specs, board, Wishes(program, rewriter, self.rules), mask_islands(program))
        run.inner = {node for line in lines for node in line.nodes[:-1]}
        run.lines = {line.nodes[-1]: line for line in lines}
        for value in values.values:
            run.decide_value(value)
        for node in values.operations:
            run.decide_operands(node)
        run.wishes.agree()
        run.wishes.report()
        for text in (*placement_notes(self, values, specs, lines), *bias_notes(run.biases)):
            rewriter.note(Note(NoteKind.OTHER, self.place or self.name, text))


@dataclass
class _Run:
    """One run over one program."""

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
