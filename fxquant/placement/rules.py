"""Rules: which node is quantized, and with which specs, in rising specificity.

A rule names operations, module paths (regular expressions) or nodes. Each setting (whether, and each field of the specs
of inputs, output and weight) is decided on its own, by the most specific rule that speaks of it:

    defaults < op < module < node;   of one kind `activation` < `input` and `output`

Two rules of one kind that say different things of one setting of one node contradict each other, unless a more specific
one says it too: that is an error, whatever their order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import fx

from fxquant.errors import ConfigError, SpecError
from fxquant.ops.base import OpDef
from fxquant.spec import QuantSpec, SpecOverride

DEFAULTS = "defaults"
_KEYS = ("op", "module", "node")
_SETTINGS = ("quantize", "activation", "input", "output", "weight")
_SPECIFICITY = {"op": 0, "module": 1, "node": 2}


@dataclass(frozen=True)
class Rule:
    """What is wanted for the nodes that match; None leaves a setting to less specific rules.

    Arguments:
        op: our name of an operation, or an ONNX operator type ("linear", "Conv").
        module: regular expression for the whole module path ("layer4\\..*").
        node: a node's name; an input's too.
        quantize: False leaves the node in float, True takes it back from a less specific rule. What only moves or joins
            codes has no float kernel to run: left in float, neither it nor its value is on a grid.
        activation: what to change of the spec of its inputs and output.
        weight: what to change of the spec of its weight.
        input: what to change of the spec of its inputs alone.
        output: what to change of the spec of its output alone.

    `place` says where the rule was read ("my.toml: prepare[7] assign-specs.rules[2]"); "" for one made in Python.
    """

    op: str | None = None
    module: str | None = None
    node: str | None = None
    quantize: bool | None = None
    activation: SpecOverride | None = None
    weight: SpecOverride | None = None
    input: SpecOverride | None = None
    output: SpecOverride | None = None
    place: str = field(default="", init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        named = [key for key in _KEYS if getattr(self, key) is not None]
        if len(named) != 1:
            raise ConfigError(
                "placement rule", expected="exactly one of op, module, node", got=", ".join(named) or "none"
            )
        if all(getattr(self, key) is None for key in _SETTINGS):
            raise ConfigError(f"placement rule for {self}", expected=f"one of {', '.join(_SETTINGS)}", got="none")
        if self.module is not None:
            try:
                re.compile(self.module)
            except re.error as err:
                raise ConfigError(
                    "placement rule: module", expected="a regular expression", got=f"'{self.module}' ({err})"
                ) from err

    def placed(self, place: str) -> Rule:
        """This rule, knowing where it was read."""
        object.__setattr__(self, "place", place)
        return self

    @property
    def specificity(self) -> int:
        """0 for an operation, 1 for a module, 2 for a node."""
        return _SPECIFICITY[self._key]

    def matches(self, node: fx.Node, definition: OpDef | None) -> bool:
        """Whether the rule is about this node; what is no known operation (an input, a parameter) is known by name."""
        if self.node is not None:
            return node.name == self.node
        if definition is None:
            return False
        if self.module is not None:
            return re.fullmatch(self.module, node.meta.get("module_path", "")) is not None
        return self.op == definition.name or self.op in definition.types_for(node)

    @property
    def _key(self) -> str:
        return next(key for key in _KEYS if getattr(self, key) is not None)

    def __str__(self) -> str:
        return f"{self._key} '{getattr(self, self._key)}'"


@dataclass(frozen=True)
class Setting:
    """One rule's word on one setting ("bits"), as strong as the rule is specific, then as its key is fine."""

    name: str
    value: Any
    rule: int
    strength: tuple[int, int]


@dataclass(frozen=True)
class Source:
    """Who decided: in words ("module 'layer4' (rules[2])"), and what rules said; without rules the defaults decided."""

    text: str = DEFAULTS
    settings: tuple[Setting, ...] = ()

    @property
    def rules(self) -> tuple[int, ...]:
        """Indices of the rules that had a say."""
        return tuple(sorted({item.rule for item in self.settings}))

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Choice:
    """A spec, who decided it, and what it was before rules changed it (None: they did not)."""

    spec: QuantSpec
    by: Source = Source()
    base: QuantSpec | None = None

    @classmethod
    def of(cls, spec: QuantSpec, by: str = DEFAULTS) -> Choice:
        """A spec that no rule had a say in."""
        return cls(spec, Source(by))

    @property
    def default(self) -> QuantSpec:
        """What it would be without rules."""
        return self.spec if self.base is None else self.base


@dataclass(frozen=True)
class Decision:
    """What is wanted of one node: whether to quantize it, and how its inputs, output and weight."""

    quantize: bool
    input: Choice
    output: Choice
    weight: Choice
    quantize_by: Source = Source()

    @property
    def rules(self) -> frozenset[int]:
        """Indices of the rules that decided anything."""
        sources = (self.quantize_by, self.input.by, self.output.by, self.weight.by)
        return frozenset(index for source in sources for index in source.rules)


def defaults(activation: QuantSpec, weight: QuantSpec, by: str = DEFAULTS) -> Decision:
    """What is wanted of a node that no rule speaks of."""
    choice = Choice.of(activation, by)
    return Decision(True, choice, choice, Choice.of(weight, by), Source(by))


def settle(node: fx.Node, definition: OpDef | None, rules: Sequence[Rule], base: Decision) -> Decision:
    """Apply the rules that match `node` to what is wanted of it without them.

    Raises ConfigError, naming both places, where two of them contradict each other, and where a spec that they make is
    none.
    """
    matching = _matching(node, definition, rules)
    if not matching:
        return base
    winners = _quantize_winners(node, matching, rules)
    quantize = winners[0].value if winners else base.quantize
    by = Source(describe_rules(rules, winners), winners) if winners else base.quantize_by
    if not quantize:  # of a node in float no spec is asked
        return Decision(False, base.input, base.output, base.weight, by)
    if winners:
        base = Decision(True, _turned_on(base.input, by), _turned_on(base.output, by), _turned_on(base.weight, by))
    return Decision(
        True,
        _chosen(node, matching, rules, "input", base.input),
        _chosen(node, matching, rules, "output", base.output),
        _chosen(node, matching, rules, "weight", base.weight),
        by,
    )


def settle_output(node: fx.Node, definition: OpDef | None, rules: Sequence[Rule], base: Choice) -> Choice:
    """What the rules make of the spec of a node's output alone; see `settle`."""
    matching = _matching(node, definition, rules)
    winners = _quantize_winners(node, matching, rules)
    if winners and not winners[0].value:
        return base
    return _chosen(node, matching, rules, "output", base)


def _matching(node: fx.Node, definition: OpDef | None, rules: Sequence[Rule]) -> list[tuple[int, Rule]]:
    return [(index, rule) for index, rule in enumerate(rules) if rule.matches(node, definition)]


def _quantize_winners(
    node: fx.Node, matching: Sequence[tuple[int, Rule]], rules: Sequence[Rule]
) -> tuple[Setting, ...]:
    said = [
        Setting("quantize", rule.quantize, index, (rule.specificity, 0))
        for index, rule in matching
        if rule.quantize is not None
    ]
    return _winners(said, rules, node, "")


def _turned_on(choice: Choice, by: Source) -> Choice:
    """What is quantized because a rule says so is that rule's choice, whoever decided its spec."""
    return replace(choice, by=replace(choice.by, text=by.text))


def _chosen(
    node: fx.Node, matching: Sequence[tuple[int, Rule]], rules: Sequence[Rule], side: str, base: Choice
) -> Choice:
    """What the matching rules make of the spec of one side."""
    keys = ((side, 1),) if side == "weight" else (("activation", 0), (side, 1))
    said = [
        Setting(name, value, index, (rule.specificity, fineness))
        for index, rule in matching
        for key, fineness in keys
        for name, value in _given(getattr(rule, key))
    ]
    winners = _winners(said, rules, node, f"{side}.")
    if not winners:
        return base
    spec = apply_settings(base.default, winners, rules, f"node '{node.name}' ({side})")
    return Choice(spec, Source(describe_rules(rules, winners), winners), base.default)


def _given(change: SpecOverride | None) -> Iterator[tuple[str, Any]]:
    for item in () if change is None else fields(change):
        value = getattr(change, item.name)
        if value is not None:
            yield item.name, value


def strongest(said: Sequence[Setting]) -> tuple[Setting, ...]:
    """Of each setting the most specific words; they may still differ."""
    best: dict[str, tuple[int, int]] = {}
    for item in said:
        best[item.name] = max(item.strength, best.get(item.name, item.strength))
    return tuple(dict.fromkeys(item for item in said if item.strength == best[item.name]))


def clash(said: Sequence[Setting]) -> tuple[Setting, Setting] | None:
    """The first two words that want different things of one setting."""
    first: dict[str, Setting] = {}
    for item in said:
        if first.setdefault(item.name, item).value != item.value:
            return first[item.name], item
    return None


def _winners(said: Sequence[Setting], rules: Sequence[Rule], node: fx.Node, side: str) -> tuple[Setting, ...]:
    """The words of the most specific rules, which must agree."""
    winners = strongest(said)
    differing = clash(winners)
    if differing is None:
        return winners
    one, other = differing
    wishes = [f"{_text(item.value)} by {rule_place(item.rule)}, {rules[item.rule]}" for item in differing]
    raise ConfigError(
        f"{rule_place(other.rule)} contradicts {rule_place(one.rule)} at node '{node.name}'",
        place=files_of(rules, (one.rule, other.rule)),
        expected=f"one value for '{side}{one.name}'",
        got=" and ".join(wishes),
        remedy=f'Take it out of one of them, or say it in a more specific rule (node = "{node.name}").',
    )


def apply_settings(spec: QuantSpec, winners: Sequence[Setting], rules: Sequence[Rule], of: str) -> QuantSpec:
    """`spec` with these settings; ConfigError, naming the rules, if that is none."""
    try:
        return SpecOverride(**{item.name: item.value for item in winners}).apply(spec)
    except SpecError as err:
        indices = sorted({item.rule for item in winners})
        thing = f"{', '.join(map(rule_place, indices))}: the spec of {of}: {err.thing}"
        place = files_of(rules, indices)
        raise ConfigError(thing, place=place, expected=err.expected, got=err.got, remedy=err.remedy) from err


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def describe_rules(rules: Sequence[Rule], winners: Sequence[Setting]) -> str:
    """The rules of these settings in words, with the file where known: "op 'Conv' (rules[0]), node 'c' (rules[3])"."""
    indices = sorted({item.rule for item in winners})
    return ", ".join(f"{rules[index]} ({rules[index].place or rule_place(index)})" for index in indices)


def rule_place(index: int) -> str:
    """The rule's place within its pass: "rules[2]"."""
    return f"rules[{index}]"


def files_of(rules: Sequence[Rule], indices: Sequence[int]) -> str:
    """Where these rules were read, for an error's place; "" for rules made in Python."""
    return " and ".join(dict.fromkeys(rules[index].place for index in indices if rules[index].place))
