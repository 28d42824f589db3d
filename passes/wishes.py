"""What is wanted of each value while specs are assigned, and by which rule; where wishes differ, the rules decide.

Specs stand in `node.meta`; whose they are is known here only, for the length of one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from fxquant.errors import ConfigError
from fxquant.graph.constants import Constants
from fxquant.graph.float_reasons import FOLLOWS
from fxquant.graph.program import Program, describe, input_slots, input_spec, output_spec, value_type
from fxquant.graph.rewriter import Rewriter
from fxquant.ops.base import OpDef, Role
from fxquant.placement import Choice, Decision, Rule, Source, settle
from fxquant.placement.rules import (
    Setting,
    apply_settings,
    clash,
    describe_rules,
    files_of,
    rule_place,
    settle_output,
    strongest,
)
from fxquant.spec import QuantSpec

from .values import definition_of, is_float_value, role_of

SPEAKS_OF_BOTH = (
    "A rule's `activation` speaks of what a node reads and of what it gives: write `output` where only what it gives "
    "is meant, or make the rules agree."
)


@dataclass(frozen=True)
class Wish:
    """One spec wanted of a value: by `holder` for its output (slot None), or for what it reads at `slot`."""

    holder: fx.Node
    slot: int | None
    choice: Choice

    @property
    def spec(self) -> QuantSpec:
        """The spec."""
        return self.choice.spec

    @property
    def by(self) -> Source:
        """Whose wish it is."""
        return self.choice.by


@dataclass
class Wishes:
    """The wishes of one run, and which rules had a say.

    1. Each value that an integer kernel reads or writes is wanted with a spec, by rules or by defaults.
    2. A value whose wishes differ gets what the most specific rule wants: defaults yield, also those of values that
       share its grid because an operation only moves codes. Rules of one kind that differ contradict each other.
       Where the target does not merge quantizers, those who read what no integer kernel writes may each have a spec.
    3. A node rule that names an input or a parameter speaks of that value, whoever reads it. So does the `output` of a
       rule on an operation that has no spec of its own, as it runs in float.
    """

    program: Program
    rewriter: Rewriter
    rules: Sequence[Rule]
    choices: dict[tuple[fx.Node, int | None], Choice] = field(default_factory=dict)
    heard: set[int] = field(default_factory=set)  # rules that decided whether to quantize
    won: set[int] = field(default_factory=set)  # rules that no other rule overrode, be it without effect

    def settle(self, node: fx.Node, definition: OpDef | None, base: Decision) -> Decision:
        """What the rules make of `base` at a node that could be quantized."""
        decision = settle(node, definition, self.rules, base)
        self.heard.update(decision.quantize_by.rules)
        self.won.update(decision.rules)
        return decision

    def want_input(self, node: fx.Node, slot: int, choice: Choice) -> None:
        """Want what `node` reads at `slot` with a spec."""
        self.choices[node, slot] = choice
        self.rewriter.set_input_spec(node, slot, choice.spec, str(choice.by))

    def want_output(self, node: fx.Node, choice: Choice) -> None:
        """Want a node's output with a spec."""
        self.choices[node, None] = choice
        self.rewriter.set_output_spec(node, choice.spec, str(choice.by))

    def drop_readers(self, value: fx.Node) -> None:
        """Want a value in float for all who read it."""
        for wish in list(self.of(value)):
            if wish.slot is not None:
                self.choices.pop((wish.holder, wish.slot), None)
                self.rewriter.set_input_spec(wish.holder, wish.slot, None)

    def of(self, value: fx.Node) -> Iterator[Wish]:
        """Every wish about a value, its own first."""
        places: list[tuple[fx.Node, int | None, QuantSpec | None]] = [(value, None, output_spec(value))]
        for user in value.users:
            slots = [slot for slot, node in enumerate(input_slots(user)) if node is value]
            places += [(user, slot, input_spec(user, slot)) for slot in slots]
        for holder, slot, spec in places:
            if spec is not None:
                known = self.choices.get((holder, slot), Choice(spec))
                yield Wish(holder, slot, replace(known, spec=spec))

    def agree(self) -> None:
        """Let the most specific rule decide wherever wishes about one value differ (case 2), then case 3."""
        constants = Constants(self.program)
        for group in _groups(self.program, constants):
            wishes = [wish for value in group for wish in self.of(value)]
            named = [wish for value in group for wish in self._named(value)]
            is_one = self.program.target.merges_activation_specs or any(wish.slot is None for wish in wishes)
            for together in (wishes,) if is_one else ((wish,) for wish in wishes):
                self._agree(group, [*together, *named])
        for node in self.program.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._decide_value(node)

    def _agree(self, group: Sequence[fx.Node], wishes: Sequence[Wish]) -> None:
        winners = strongest([item for wish in wishes for item in wish.by.settings])
        differing = clash(winners)
        if differing is not None:
            raise self._contradiction(group[0], wishes, differing)
        if not winners:
            return
        base = wishes[0].choice.default
        made = apply_settings(base, winners, self.rules, f"node '{group[0].name}'")
        spec = _limited(self.program, group, made)
        text = self._agreement(wishes, winners)
        for wish in wishes:
            has_said_all = set(winners) == set(wish.by.settings)
            by = wish.by if has_said_all else Source(text, winners)
            self._change(wish, Choice(spec, by, base))

    def _agreement(self, wishes: Sequence[Wish], winners: Sequence[Setting]) -> str:
        """By whose wish, and which rules, the others are overruled; what names the value itself needs no holder."""
        said = [wish for wish in wishes if {*winners} & {*wish.by.settings} and not _follows(wish)]
        holders = dict.fromkeys(wish.holder.name for wish in said if wish.slot is not None or output_spec(wish.holder))
        text = describe_rules(self.rules, winners)
        return f"agrees with {', '.join(holders)}: {text}" if holders else text

    def _change(self, wish: Wish, choice: Choice) -> None:
        if wish.slot is not None:
            self.want_input(wish.holder, wish.slot, choice)
        elif output_spec(wish.holder) is not None:  # an input's wish is kept by those who read it
            self.want_output(wish.holder, choice)

    def _named(self, value: fx.Node) -> Iterator[Wish]:
        """Case 3, and of what a float operation gives: a rule's `output`, as a wish of its own."""
        wanted = next(self.of(value), None)
        if wanted is None or output_spec(value) is not None:
            return
        output = settle_output(value, self._definition(value), self.rules, Choice(wanted.choice.default))
        if output.by.rules:
            yield Wish(value, None, output)

    def _decide_value(self, value: fx.Node) -> None:
        """Case 3: a parameter's spec, and whether an input or a parameter is quantized at all."""
        for wish in list(self.of(value)):
            choice = Choice(wish.spec)
            decision = self.settle(value, None, Decision(True, choice, choice, choice))
            if wish.slot is None:
                continue
            if not decision.quantize:
                self.rewriter.set_input_spec(wish.holder, wish.slot, None)
                self.rewriter.set_float_reason(value, f"excluded by rule {decision.quantize_by}")
            elif value.op == "get_attr" and decision.weight.by.rules:
                settings = (*wish.by.settings, *decision.weight.by.settings)
                by = Source(describe_rules(self.rules, settings), settings)
                self.want_input(wish.holder, wish.slot, replace(decision.weight, by=by))

    def _contradiction(self, value: fx.Node, wishes: Sequence[Wish], differing: tuple[Setting, Setting]) -> ConfigError:
        one, other = differing
        holders = [next(wish for wish in wishes if item in wish.by.settings) for item in differing]
        got = [
            f"{item.value} {_wisher(wish)}, {self.rules[item.rule]} ({rule_place(item.rule)})"
            for item, wish in zip(differing, holders, strict=True)
        ]
        return ConfigError(
            f"{rule_place(other.rule)} contradicts {rule_place(one.rule)} at the value of node '{value.name}'",
            place=files_of(self.rules, (one.rule, other.rule)) or describe(value),
            expected=f"one value for '{one.name}', as one quantizer serves those who make and those who read it",
            got=" and ".join(got),
            remedy=SPEAKS_OF_BOTH if 0 in (one.strength[1], other.strength[1]) else "Take it out of one of them.",
        )

    def is_matched(self, node: fx.Node, rule: Rule) -> bool:
        """Whether a rule is about a node of this program."""
        return rule.matches(node, self._definition(node))

    def _definition(self, node: fx.Node) -> OpDef | None:
        return definition_of(self.program, node) if node.op in ("call_function", "call_module") else None


def _groups(program: Program, constants: Constants) -> list[list[fx.Node]]:
    """The values that are no constants, together with those whose codes are theirs because they are only moved."""
    group_of: dict[fx.Node, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if not is_float_value(node) or constants.is_constant(node):
            continue
        group = group_of.get(_moved_from(program, node) or node, [])
        group.append(node)
        group_of[node] = group
    return list({id(group): group for group in group_of.values()}.values())


def _moved_from(program: Program, node: fx.Node) -> fx.Node | None:
    """The value that `node` is moved from, where both sides of the move are wanted quantized; also by a split."""
    if output_spec(node) is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    is_part = value_type(node.args[0]) is None
    mover = node.args[0] if is_part else node
    if role_of(program, mover) is not Role.GRID_PRESERVING or input_spec(mover, 0) is None:
        return None
    source = mover.args[0]  # of the split, where `node` is a part
    return source if isinstance(source, fx.Node) else None


def _limited(program: Program, group: Sequence[fx.Node], spec: QuantSpec) -> QuantSpec:
    """The spec within the ranges that operations fix for the values of a group."""
    for value in group:
        definition = definition_of(program, value)
        if definition is not None and definition.output_range is not None:
            spec = spec.limited(definition.output_range)
    return spec


def _follows(wish: Wish) -> bool:
    return wish.by.text.startswith(FOLLOWS)


def _wisher(wish: Wish) -> str:
    return f"as the output of {wish.holder.name}" if wish.slot is None else f"as an input of {wish.holder.name}"
