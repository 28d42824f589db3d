"""Coverage: how each float value of a program is quantized and by which rule, or why it stays in float.

One row for each quantizer of a value, and one for each value without any. Before insertion the quantizers are those
that the specs ask for; before calibration they have no grid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from torch import fx

from fxquant.graph.constants import Constants
from fxquant.graph.float_reasons import FOLLOWS, float_reason, operation_reason
from fxquant.graph.islands import Island, IslandMap
from fxquant.graph.program import FAKE_QUANTS, Program, Stage, input_slots, input_spec, output_spec, value_type
from fxquant.numerics.fake_quant import BiasFakeQuant, FakeQuant, Mode
from fxquant.ops.base import OpDef
from fxquant.ops.table import TABLE
from fxquant.spec import BIAS_SPEC, PER_TENSOR, Encoding, QuantSpec

NOT_YET = "not yet"
NO_RULE = "no rule recorded"
_NAMED = 6  # islands that the summary names


class ValueKind(Enum):
    """What a value is to the operations that read it."""

    INPUT = "input"
    WEIGHT = "weight"
    BIAS = "bias"
    CONSTANT = "constant"  # another parameter or buffer, or what is computed from such alone
    ACTIVATION = "activation"


@dataclass(frozen=True)
class GridSummary:
    """An encoding in numbers: how many scales, their extremes, and the real range that they cover."""

    scales: int
    scale_low: float
    scale_high: float
    zero_point_low: int
    zero_point_high: int
    min: float
    max: float

    @classmethod
    def of(cls, encoding: Encoding) -> GridSummary:
        """The summary of an encoding."""
        scale, zero_point = encoding.scale, encoding.zero_point
        return cls(
            scale.numel(),
            float(scale.min()),
            float(scale.max()),
            int(zero_point.min()),
            int(zero_point.max()),
            float(encoding.min.min()),
            float(encoding.max.max()),
        )

    def __str__(self) -> str:
        one = self.scales == 1
        scale = (
            f"scale={self.scale_low:.4g}"
            if one
            else f"{self.scales} scales {self.scale_low:.4g}..{self.scale_high:.4g}"
        )
        single = self.zero_point_low == self.zero_point_high
        zero_point = f"{self.zero_point_low}" if single else f"{self.zero_point_low}..{self.zero_point_high}"
        return f"{scale} zp={zero_point} [{self.min:.4g}, {self.max:.4g}]"


@dataclass(frozen=True)
class CoverageRow:
    """One value, and one of its quantizers or none.

    Arguments:
        value: the value's node.
        kind: what it is to those who read it.
        module: the module path that it belongs to.
        spec: how it is quantized; None: it is not.
        grid: its encoding; None: it is not known yet, or there is none.
        mode: the quantizer's mode ("fake"); "" where there is none yet.
        rule: the rule that decided it.
        shares: the value whose quantizer it uses; "" if it has its own.
        reason: why it stays in float; "" where it is quantized.
    """

    value: str
    kind: ValueKind
    module: str
    spec: QuantSpec | None = None
    grid: GridSummary | None = None
    mode: str = ""
    rule: str = ""
    shares: str = ""
    reason: str = ""

    @property
    def is_quantized(self) -> bool:
        """Whether it has, or is to have, a quantizer that is on."""
        return not self.reason

    @property
    def why(self) -> str:
        """The rule that decided, or the reason for float."""
        if self.reason:
            return f"float: {self.reason}"
        return f"{self.rule}; range of {self.shares}" if self.shares else self.rule

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "value": self.value,
            "kind": self.kind.value,
            "module": self.module,
            "quantized": self.is_quantized,
            "spec": None if self.spec is None else str(self.spec),
            "encoding": None if self.grid is None else asdict(self.grid),
            "mode": self.mode,
            "rule": self.rule,
            "shares": self.shares,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class FloatIsland:
    """Operations in float that feed each other without a quantizer between them, in graph order, and why."""

    nodes: tuple[str, ...]
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        first, last = self.nodes[0], self.nodes[-1]
        return first if first == last else f"{first}..{last}"


@dataclass(frozen=True)
class CoverageReport:
    """What is quantized, by which rule, and what is not and why; `print(report)` gives a summary and a table.

    `operations` run on integers as far as the graph says (check_parity reads what the runtime made of it); it and
    `float_islands` are None before fake quantizers are inserted.
    """

    program: str
    stage: Stage
    rows: tuple[CoverageRow, ...]
    operations: tuple[str, ...] | None
    float_islands: tuple[FloatIsland, ...] | None

    @property
    def quantized(self) -> tuple[CoverageRow, ...]:
        """The rows of quantized values."""
        return tuple(row for row in self.rows if row.is_quantized)

    @property
    def in_float(self) -> tuple[CoverageRow, ...]:
        """The rows of values in float."""
        return tuple(row for row in self.rows if not row.is_quantized)

    @property
    def summary(self) -> str:
        """One line: quantized values (inputs are activations, constants are weights), integer operations, islands."""
        values = {row.value: row.kind for row in self.quantized}
        kinds = Counter(values.values())
        activations = kinds[ValueKind.ACTIVATION] + kinds[ValueKind.INPUT]
        weights = kinds[ValueKind.WEIGHT] + kinds[ValueKind.CONSTANT]
        counts = f"{_counted(activations, 'activation')}, {_counted(weights, 'weight')}"
        biases = f"{kinds[ValueKind.BIAS]} bias{'' if kinds[ValueKind.BIAS] == 1 else 'es'}"
        grids = sum(row.kind is ValueKind.BIAS for row in self.quantized)
        biases += f" in {grids} grids" if grids > kinds[ValueKind.BIAS] else ""
        line = f"{_counted(len(values), 'value')} quantized ({counts}, {biases})"
        if self.operations is None or self.float_islands is None:
            return f"{line}; operations are known once fake quantizers are inserted (stage {self.stage})"
        inside = sum(len(island.nodes) for island in self.float_islands)
        runs = "runs" if len(self.operations) == 1 else "run"
        line += f", {_counted(len(self.operations), 'operation')} {runs} on integers"
        return f"{line}, {inside} in float islands{_named(self.float_islands)}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as values that JSON can hold."""
        return {
            "program": self.program,
            "stage": str(self.stage),
            "summary": self.summary,
            "values": [row.to_dict() for row in self.rows],
            "integer_operations": None if self.operations is None else list(self.operations),
            "float_islands": None
            if self.float_islands is None
            else [{"nodes": list(item.nodes), "reasons": list(item.reasons)} for item in self.float_islands],
        }

    def __str__(self) -> str:
        head = ("value", "kind", "spec", "encoding", "mode", "why")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        lines.insert(1, tuple("-" * width for width in widths))
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        title = f"coverage of '{self.program}' (stage {self.stage}): {self.summary}"
        return "\n".join([title, "", *table])


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _named(found: Sequence[FloatIsland]) -> str:
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    names = ", ".join(map(str, found[:_NAMED]))
    return f" ({_counted(len(found), 'island')}: {names}{more})" if found else ""


def _cells(row: CoverageRow) -> tuple[str, ...]:
    spec = "-" if row.spec is None else str(row.spec).replace(f" {PER_TENSOR}", "")
    grid = str(row.grid) if row.grid is not None else "-" if row.spec is None else NOT_YET
    return row.value, row.kind.value, spec, grid, row.mode or "-", row.why


def coverage(program: Program) -> CoverageReport:
    """The coverage of a program as it is now, at any stage; nothing is changed."""
    reading = _Reading(program)
    rows = tuple(row for node in program.graph.nodes if reading.is_value(node) for row in reading.rows(node))
    if program.stage < Stage.INSERTED:
        return CoverageReport(program.name, program.stage, rows, None, None)
    known = IslandMap(program)
    operations = tuple(node.name for node, island in known.found.items() if island is Island.INTEGER)
    return CoverageReport(program.name, program.stage, rows, operations, tuple(_connected(program, known)))


def _connected(program: Program, known: IslandMap) -> Iterator[FloatIsland]:
    """Groups of nodes in float that read each other."""
    nodes = [node for node, island in known.found.items() if island is Island.FLOAT]
    group_of: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        merged = [node]
        for group in {
            id(group_of[source]): group_of[source] for source in node.all_input_nodes if source in group_of
        }.values():
            merged = [*group, *merged]
        group_of.update(dict.fromkeys(merged, merged))
    order = {node: index for index, node in enumerate(nodes)}
    for group in {id(group): group for group in group_of.values()}.values():
        members = sorted(group, key=order.__getitem__)
        reasons = [operation_reason(program, known, node) for node in members]
        yield FloatIsland(tuple(node.name for node in members), tuple(dict.fromkeys(reasons)))


class _Reading:
    """What the graph says of each value."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.constants = Constants(program)

    def is_value(self, node: fx.Node) -> bool:
        """Whether a node gives a float tensor of its own; quantizers give another's."""
        found = value_type(node)
        is_quantizer = self.program.fake_quant(node) is not None or self.program.bias_fake_quant(node) is not None
        return node.op != "output" and found is not None and found.is_float and not is_quantizer

    def rows(self, value: fx.Node) -> Iterator[CoverageRow]:
        """The rows of one value: of its quantizers, of the specs that ask for some, or of its reason for float."""
        kind, module = self._kind(value), value.meta.get("module_path", "")
        quantized = [*self._quantizers(value, kind, module)]
        if not quantized and self.program.stage < Stage.INSERTED:
            quantized = [*self._wanted(value, kind, module)]
        yield from quantized or [
            CoverageRow(value.name, kind, module, reason=float_reason(self.program, value, self.constants))
        ]

    def _kind(self, value: fx.Node) -> ValueKind:
        if value.op == "placeholder":
            return ValueKind.INPUT
        if not self.constants.is_constant(value):
            return ValueKind.ACTIVATION
        for user, position in _readers(value):
            definition = self._definition(user)
            if definition is not None and position == definition.bias:
                return ValueKind.BIAS
            if definition is not None and position == definition.weight_for(user):
                return ValueKind.WEIGHT
        return ValueKind.CONSTANT

    def _definition(self, node: fx.Node) -> OpDef | None:
        module = self.program.submodule(node) if node.op == "call_module" else None
        return TABLE.find(node, module) if node.op in ("call_function", "call_module") else None

    def _quantizers(self, value: fx.Node, kind: ValueKind, module: str) -> Iterator[CoverageRow]:
        for user in value.users:
            called = self.program.submodule(user) if user.op == "call_module" else None
            if user.args[:1] != (value,):
                continue
            if isinstance(called, BiasFakeQuant):
                spec, grid = _bias_grid(called)
                yield CoverageRow(value.name, kind, module, spec, grid, "follows", _bias_rule(value, user))
            elif isinstance(called, FakeQuant):
                grid = GridSummary.of(called.encoding) if called.has_encoding else None
                owner = str(user.target).removeprefix(f"{FAKE_QUANTS}.") if not user.kwargs.get("observe", True) else ""
                reason = "its quantizer is switched off (mode off)" if called.mode is Mode.OFF else ""
                rule = _rule_of(value, user)
                yield CoverageRow(value.name, kind, module, called.spec, grid, called.mode.value, rule, owner, reason)

    def _wanted(self, value: fx.Node, kind: ValueKind, module: str) -> Iterator[CoverageRow]:
        owner = value.meta.get("shares_encoding_with", "")
        for spec in _wanted_specs(value):
            rule = _rule_of(value, value, spec)
            yield CoverageRow(value.name, kind, module, spec, rule=rule, shares=owner)


def _bias_grid(module: BiasFakeQuant) -> tuple[QuantSpec, GridSummary | None]:
    if not all(source.has_encoding for source in module.sources):
        return BIAS_SPEC, None
    encoding = module.encoding
    return encoding.spec, GridSummary.of(encoding)


def _bias_rule(bias: fx.Node, quantizer: fx.Node) -> str:
    """What gave a bias its grid; a layer that is called several times, or a shared bias, has one for each call."""
    calls = dict.fromkeys(user.name for user in quantizer.users)
    return "its layer's input and weight" if len(bias.users) == 1 else f"input and weight of {', '.join(calls)}"


def _readers(value: fx.Node) -> Iterator[tuple[fx.Node, int]]:
    """Who reads a value and as which argument, also through quantizers and what only moves it."""
    pending, seen = [value], {value}
    while pending:
        node = pending.pop(0)
        for user in node.users:
            yield from ((user, position) for position, argument in enumerate(user.args) if argument is node)
            if user not in seen and user.args[:1] == (node,):
                seen.add(user)
                pending.append(user)


def _wanted_specs(value: fx.Node) -> list[QuantSpec]:
    own = output_spec(value)
    asked = (input_spec(user, slot) for user, slot in _slots(value))
    return list(dict.fromkeys(spec for spec in (own, *asked) if spec is not None))


def _slots(value: fx.Node) -> list[tuple[fx.Node, int]]:
    return [(user, slot) for user in value.users for slot, node in enumerate(input_slots(user)) if node is value]


def _rule_of(value: fx.Node, read: fx.Node, spec: QuantSpec | None = None) -> str:
    """The rule that wants `value` (with `spec`, if given): for its own output, else by those who read it as `read`.

    What follows an input that is in float, or is read by what follows it, is quantized because of those who read on.
    """
    own, said = output_spec(value), str(value.meta.get("rule", NO_RULE))
    is_own = own is not None and spec in (None, own)
    if is_own and not (said.startswith(FOLLOWS) and _follows_float(value)):
        return said
    asked = _asked_by(read, spec)
    return ", ".join(asked) or (said if is_own else NO_RULE)


def _follows_float(value: fx.Node) -> bool:
    """Whether what `value` is made of was left in float, so that there is nothing to follow."""
    return all(source.meta.get("float_reason") for source in input_slots(value))


def _asked_by(read: fx.Node, spec: QuantSpec | None = None) -> list[str]:
    """The rules of those who read a value (with `spec`, if given); where all only follow it, of those who read them."""
    asked = [(user, slot) for user, slot in _slots(read) if spec in (None, input_spec(user, slot))]
    rules = {(user, slot): user.meta.get("input_rules", {}).get(slot, "") for user, slot in asked}
    firm = [rule.removeprefix(f"{FOLLOWS}: ") for rule in rules.values() if rule not in ("", FOLLOWS)]
    behind = (rule for user, _ in rules if not firm for value in _made_by(user) for rule in _asked_by(value))
    return list(dict.fromkeys((*firm, *behind))) or list(dict.fromkeys(filter(None, rules.values())))


def _made_by(operation: fx.Node) -> Iterator[fx.Node]:
    """What an operation's readers read: its value or the quantizers of that, also in parts."""
    if value_type(operation) is None:
        for part in operation.users:
            yield from _made_by(part)
        return
    yield operation
    yield from (user for user in operation.users if str(user.target).startswith(f"{FAKE_QUANTS}."))
