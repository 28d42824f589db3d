"""Configurations: which candidate each group has, and the pipeline that says so.

A candidate becomes placement rules on nodes (fxquant.placement), which any pipeline file can hold. What the config
wants anyway is not said again, so that the rules are few and tell what differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from fxquant.errors import ConfigError
from fxquant.graph.batches import Batch
from fxquant.graph.passes import Pass
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Program
from fxquant.placement import Rule
from fxquant.spec import PER_TENSOR, Granularity, SpecOverride
from fxquant.tuning.candidates import Candidate
from fxquant.tuning.costs import FLOAT_BITS
from fxquant.tuning.groups import Group, Operation, find_groups

Assignment = tuple[str, ...]  # the name of a candidate for each group
SELECT_PER_CHANNEL = "select-per-channel"


@dataclass(frozen=True)
class Setting:
    """What a candidate is at a group: rules, and the layers whose weights keep one scale."""

    rules: tuple[Rule, ...] = ()
    per_tensor: tuple[str, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """A candidate that a group does not have, and why."""

    group: str
    candidate: str
    reason: str


class Space:
    """The groups of a captured program under a config, and what each candidate is there.

    Arguments:
        captured: the program.
        pipeline: the config.
        candidates: the search's and the baselines'.
        batches: for prepare passes that measure.
    """

    def __init__(
        self, captured: Program, pipeline: Pipeline, candidates: Sequence[Candidate], batches: Iterable[Batch]
    ) -> None:
        self.pipeline = pipeline
        self.candidates = tuple(candidates)
        self._place = _rules_place(pipeline)
        self._selects = any(item.name == SELECT_PER_CHANNEL for item in pipeline.prepare_passes)
        assigned, inserted = captured.copy(), captured.copy()
        passes = list(pipeline.prepare_passes)
        pipeline.changed(prepare=passes[: self._place + 1]).prepare(assigned, batches=batches)
        pipeline.prepare(inserted, batches=batches)
        self.base = inserted  # the config without any candidate, not calibrated
        self.groups = find_groups(assigned, inserted)
        self.left_out: list[LeftOut] = []
        self._settings = [self._settings_of(group) for group in self.groups]

    def names(self, group: int) -> tuple[str, ...]:
        """The candidates that differ from each other at a group."""
        return tuple(self._settings[group])

    def uniform(self, candidate: Candidate) -> Assignment:
        """The assignment with one candidate wherever it can be; elsewhere what is the same there, or the config's."""
        found = []
        for group, settings in zip(self.groups, self._settings, strict=True):
            wanted = self._setting(group, candidate)
            same = [name for name, setting in settings.items() if setting == wanted]
            found.append(candidate.name if candidate.name in settings or not same else same[0])
        return tuple(found)

    def activation_bits(self, assignment: Assignment) -> int:
        """Bits of what each group reads, summed over the groups; 32 for float."""
        known = {item.name: item for item in self.candidates}
        return sum(_bits_read(group, known[name]) for group, name in zip(self.groups, assignment, strict=True))

    def pipeline_of(self, assignment: Assignment, name: str) -> Pipeline:
        """The config with the assignment's rules."""
        known = {item.name: item for item in self.candidates}
        chosen = [known[item] for item in assignment]
        floats = frozenset(index for index, item in enumerate(chosen) if not item.quantize)
        settings = [self._setting(group, item, floats) for group, item in zip(self.groups, chosen, strict=True)]
        rules = tuple(rule for setting in settings for rule in setting.rules)
        per_tensor = tuple(name for setting in settings for name in setting.per_tensor)
        passes: list[Pass] = []
        for index, item in enumerate(self.pipeline.prepare_passes):
            if index == self._place:
                item = _with(item, rules=(*vars(item)["rules"], *rules))
            elif item.name == SELECT_PER_CHANNEL and per_tensor:
                item = _with(item, except_nodes=(*vars(item)["except_nodes"], *per_tensor))
            passes.append(item)
        return self.pipeline.changed(prepare=passes, name=name)

    def _settings_of(self, group: Group) -> dict[str, Setting]:
        """The group's own candidates; others are told in `left_out`."""
        found: dict[str, Setting] = {}
        named = {rule.node for rule in vars(list(self.pipeline.prepare_passes)[self._place])["rules"]}
        for candidate in self.candidates:
            setting = self._setting(group, candidate)
            same = next((name for name, known in found.items() if known == setting), None)
            reason = self._why_not(group, candidate)
            if named & {*group.names, *group.followers}:
                reason = "a rule of the config names one of its nodes"
            elif same is not None:
                reason = reason or f"it is '{same}' there"
            if reason:
                self.left_out.append(LeftOut(group.name, candidate.name, reason))
            else:
                found[candidate.name] = setting
        return found

    def _why_not(self, group: Group, candidate: Candidate) -> str:
        if not candidate.per_channel:
            return ""
        weights = [item for item in group.operations if item.weight is not None]
        if weights and all(item.channel_axis is None for item in weights):
            return f"the weight of {weights[0].name} has no axis of output channels"
        asymmetric = next((item for item in weights if item.weight is not None and not item.weight.symmetric), None)
        return f"the weight of {asymmetric.name} is asymmetric" if asymmetric else ""

    def _setting(self, group: Group, candidate: Candidate, floats: frozenset[int] = frozenset()) -> Setting:
        """What a candidate is at a group, while others are in float."""
        if not candidate.quantize:
            return Setting(tuple(Rule(node=name, quantize=False) for name in group.names))
        bits = {item.activation_bits for item in group.operations} - {None}
        change = None
        if candidate.activation_bits is not None and bits - {candidate.activation_bits}:
            change = SpecOverride(bits=candidate.activation_bits)
        rules = [self._rule(item, candidate, change, floats) for item in group.operations]
        rules += [Rule(node=name, activation=change) if change else None for name in group.followers]
        return Setting(
            tuple(rule for rule in rules if rule is not None),
            tuple(item.name for item in group.operations if self._keeps_one_scale(item, candidate)),
        )

    def _rule(
        self, item: Operation, candidate: Candidate, change: SpecOverride | None, floats: frozenset[int]
    ) -> Rule | None:
        weight = self._weight_change(item, candidate)
        reads = change if item.activation_bits is not None else None
        gives = change if item.readers is None or item.readers in floats else None
        if reads is None and gives is None and weight is None:
            return None
        return Rule(node=item.name, input=reads, output=gives, weight=weight)

    def _weight_change(self, item: Operation, candidate: Candidate) -> SpecOverride | None:
        if item.weight is None:
            return None
        bits = None if candidate.weight_bits in (None, item.weight.bits) else candidate.weight_bits
        granularity = None
        if candidate.per_channel and item.granularity == PER_TENSOR and item.channel_axis is not None:
            granularity = Granularity(item.channel_axis) if item.weight.symmetric else None
        if candidate.per_channel is False and item.granularity != PER_TENSOR and not self._selects:
            granularity = PER_TENSOR
        return None if bits is None and granularity is None else SpecOverride(bits=bits, granularity=granularity)

    def _keeps_one_scale(self, item: Operation, candidate: Candidate) -> bool:
        return candidate.per_channel is False and item.granularity not in (None, PER_TENSOR) and self._selects


def _bits_read(group: Group, candidate: Candidate) -> int:
    bits = [item.activation_bits for item in group.operations if item.activation_bits is not None]
    if not candidate.quantize or not bits:
        return FLOAT_BITS
    return candidate.activation_bits or max(bits)


def _rules_place(pipeline: Pipeline) -> int:
    """The index of the prepare pass that takes placement rules."""
    for index, item in enumerate(pipeline.prepare_passes):
        if is_dataclass(item) and any(option.name == "rules" for option in fields(item)):
            return index
    raise ConfigError(
        f"pipeline '{pipeline.name}' cannot be tuned",
        expected="a prepare pass with placement rules ('assign-specs')",
        got="none",
    )


def _with(item: Pass, **options: Any) -> Pass:
    found: Pass = replace(item, **options)  # type: ignore[type-var]  # every pass is a dataclass
    return found.placed(vars(item)["place"]) if hasattr(found, "placed") and "place" in vars(item) else found
