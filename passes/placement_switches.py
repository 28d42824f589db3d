"""Which values the sections of a placement file turn on: written section by section, the later one overriding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import fx

from fxquant.errors import ConfigError
from fxquant.graph.program import describe
from fxquant.placement.sections import OpType, Sections

from .placed_values import PlacedValues
from .supergroups import Line

Write = tuple[fx.Node, bool, str]  # a value, whether it is on, and the place in the file that says so


@dataclass(frozen=True)
class Verdict:
    """One setting of one value, and what decided it."""

    value: bool
    place: str

    @property
    def reason(self) -> str:
        """Why a value is off: the place, or what stands in its stead in words."""
        return self.place if " " in self.place else f"{self.place} is false"


OFF = Verdict(False, "no section turns it on")
ONLY_MOVES = Verdict(False, "it only moves what it reads, which is no quantized activation")


@dataclass
class Board:
    """One setting of every value."""

    setting: str
    file: str
    verdicts: dict[fx.Node, Verdict] = field(default_factory=dict)

    def write(self, writes: Iterable[Write]) -> None:
        """Take over what one section says; raises ConfigError where it contradicts itself at a value."""
        said: dict[fx.Node, Verdict] = {}
        for node, value, place in writes:
            other = said.setdefault(node, Verdict(value, place))
            if other.value is not value:
                raise self._contradiction(node, other, Verdict(value, place))
        self.verdicts.update(said)

    def _contradiction(self, node: fx.Node, one: Verdict, other: Verdict) -> ConfigError:
        return ConfigError(
            f"{other.place} contradicts {one.place} at the value of node '{node.name}'",
            place=self.file or describe(node),
            expected=f"one value for '{self.setting}'",
            got=f"{one.value} by {one.place} and {other.value} by {other.place}",
            remedy="Take one of them out: what an operation reads is what another one makes.",
        )


def place_values(values: PlacedValues, sections: Sections, lines: Iterable[Line], file: str) -> Board:
    """Whether each value is quantized, and which place of the file decided; values that nothing speaks of are left out.

    1. `is_output_quantized` speaks of the values that an operation makes; defaults leave out what only moves codes.
    2. `is_input_quantized` speaks of the values that an operation reads, so of their makers and of all other readers;
       through what only moves codes.
    3. A supergroup turns off all values between its operations.
    4. A model output that only moves codes is on with their owner; off it turns nothing, as the owner is no output.
    """
    board = Board("quantized", file)
    board.write(_defaults(values, sections))
    board.write(_op_types(values, sections))
    board.write(_supergroups(lines))
    board.write(_model_inputs(values, sections))
    board.write(_model_outputs(values, sections))
    return board


def symmetric_values(values: PlacedValues, sections: Sections, file: str) -> Board:
    """What op_type says of the symmetry of each value: of what the operation makes, and of what it turns on."""
    board = Board("is_symmetric", file)
    board.write(_symmetries(values, sections))
    return board


def input_verdict(sections: Sections, types: Iterable[str]) -> Verdict:
    """Whether the constants that an operation reads are quantized."""
    ops, (name, entry) = sections.defaults.ops, entry_of(sections, types)
    if entry.is_input_quantized is not None:
        return Verdict(entry.is_input_quantized, f"op_type.{name}.is_input_quantized")
    return Verdict(bool(ops.is_input_quantized), "defaults.ops.is_input_quantized")


def entry_of(sections: Sections, types: Iterable[str]) -> tuple[str, OpType]:
    """The entry of op_type for an operation: that of the first of its types that the file lists; and the type."""
    for name in types:
        if name in sections.op_type:
            return name, sections.op_type[name]
    return "", OpType()


def _defaults(values: PlacedValues, sections: Sections) -> Iterator[Write]:
    ops = sections.defaults.ops
    for value in values.values:
        if value.op != "placeholder" and ops.is_output_quantized is not None and not values.moves_codes(value):
            yield value, ops.is_output_quantized, "defaults.ops.is_output_quantized"
    if ops.is_input_quantized is not None:
        for node in values.operations:
            yield from _reads(values, node, ops.is_input_quantized, "defaults.ops.is_input_quantized")


def _op_types(values: PlacedValues, sections: Sections) -> Iterator[Write]:
    for value in values.values:
        name, entry = entry_of(sections, values.types(values.operation(value)))
        if entry.is_output_quantized is not None:
            yield value, entry.is_output_quantized, f"op_type.{name}.is_output_quantized"
    for node in values.operations:
        name, entry = entry_of(sections, values.types(node))
        if entry.is_input_quantized is not None:
            yield from _reads(values, node, entry.is_input_quantized, f"op_type.{name}.is_input_quantized")


def _reads(values: PlacedValues, node: fx.Node, is_on: bool, place: str) -> Iterator[Write]:
    for _, value in values.inputs(node):
        if values.is_value(value):
            yield values.owner(value), is_on, place


def _supergroups(lines: Iterable[Line]) -> Iterator[Write]:
    for line in lines:
        yield from ((node, False, line.reason) for node in line.nodes[:-1])


def _model_inputs(values: PlacedValues, sections: Sections) -> Iterator[Write]:
    is_on = sections.model_input.is_input_quantized
    if is_on is not None:
        inputs = (value for value in values.values if value.op == "placeholder")
        yield from ((value, is_on, "model_input.is_input_quantized") for value in inputs)


def _model_outputs(values: PlacedValues, sections: Sections) -> Iterator[Write]:
    is_on = sections.model_output.is_output_quantized
    if is_on is not None:
        outputs = (value for value in values.values if any(user.op == "output" for user in value.users))
        for value in outputs:
            owner = values.owner(value)
            if is_on or owner is value:  # case 4
                yield owner, is_on, "model_output.is_output_quantized"


def _symmetries(values: PlacedValues, sections: Sections) -> Iterator[Write]:
    for value in values.values:
        name, entry = entry_of(sections, values.types(values.operation(value)))
        if entry.is_symmetric is not None:
            yield value, entry.is_symmetric, f"op_type.{name}.is_symmetric"
    for node in values.operations:
        name, entry = entry_of(sections, values.types(node))
        if entry.is_symmetric is not None and entry.is_input_quantized:
            yield from _reads(values, node, entry.is_symmetric, f"op_type.{name}.is_symmetric")
