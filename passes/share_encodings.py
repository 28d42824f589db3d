"""Give values that must lie on one grid one FakeQuant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from fxquant.graph.constants import Constants
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage, input_spec, output_spec
from fxquant.graph.rewriter import Rewriter
from fxquant.ops.base import Role
from fxquant.spec import NO_LIMITS, QuantSpec

from .values import check_ops, definition_of, is_float_value, is_named, role_of, set_value_spec, wanted_specs


@dataclass(frozen=True)
class ShareEncodings(Pass):
    """Let grid-preserving operations pass codes on, and concatenations join them on one grid where asked to.

    1. Output of a grid-preserving operation (maximum pooling, reshape, slice ...): the input's FakeQuant, and its spec.
    2. Parts of a split, chunk or unbind: the FakeQuant of what was split.
    3. With `concat`: the inputs of a concatenation use the FakeQuant of its output (onnxruntime needs it not:
       QLinearConcat joins any grids; other runtimes do). What shared the grid of such an input follows it there.
    4. Where the target does not clip by grids (Target.clips_by_grid), the input of such a concatenation gives up the
       limits of a relu, and one that shares a grid takes all that are on it along.
    5. With `ops`: the output of these operations, too, uses the grid of their input (averages, which cannot leave it).

    Declines, with the reason, where a concatenation's input has another spec, other readers' limits or shares already.
    Contract: PRESERVES (it only annotates).

    Options:
        concat: share the grids of concatenations (case 3).
        ops: further operations (our names or ONNX operator types) whose output is on their input's grid (case 5).
    """

    name: ClassVar[str] = "share-encodings"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.ASSIGNED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    concat: bool = False
    ops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_ops(self.ops, "share-encodings: ops")

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Visit the graph in order, so that chains end at their first value."""
        constants = Constants(program)
        for node in program.graph.nodes:
            role = role_of(program, node)
            if self._keeps_grid(program, node) and input_spec(node, 0) is not None:
                of_weight = constants.is_constant(node.all_input_nodes[0])  # rows of an embedding, whose grid moves
                if not of_weight:
                    self._pass_on(rewriter, node)
            elif role is Role.CONCAT and self.concat and wanted_specs(node):
                self._join(program, rewriter, node)
        _follow_chains(program, rewriter)

    def _keeps_grid(self, program: Program, node: fx.Node) -> bool:
        definition = definition_of(program, node)
        if definition is None:
            return False
        return definition.role_for(node) is Role.GRID_PRESERVING or is_named(self.ops, node, definition)

    def _pass_on(self, rewriter: Rewriter, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        outputs = [node] if is_float_value(node) else [user for user in node.users if is_float_value(user)]
        source_specs = list(wanted_specs(source))
        if is_float_value(source) and len(source_specs) != 1:
            rewriter.miss(node, f"{node.name} shares nothing: {source.name} is wanted with {len(source_specs)} specs")
            return
        for output in outputs:  # cases 1 and 2
            own = output_spec(output)
            if not wanted_specs(output):
                continue
            for old in wanted_specs(output):
                if old == own or _without_limits(old) == _without_limits(source_specs[0]):  # a softmax's limits bind
                    set_value_spec(rewriter, output, old, source_specs[0])  # the readers of its transpose too
            rewriter.share_encoding(output, owner_of(source))

    def _join(self, program: Program, rewriter: Rewriter, node: fx.Node) -> None:
        spec = next(iter(wanted_specs(node)))
        values = [value for value in node.all_input_nodes if is_float_value(value)]
        if not program.target.clips_by_grid:  # case 4
            values = list(dict.fromkeys(_root(program, value) for value in values))
            _give_up_limits(program, rewriter, [*values, node], spec)
            spec = next(iter(wanted_specs(node)))
        constants = Constants(program)
        for value in values:
            specs = list(wanted_specs(value))
            if value is _root(program, node):  # joined before
                continue
            if constants.is_constant(value):
                rewriter.miss(node, f"{value.name} keeps its grid: it is a constant, whose grid follows it")
            elif "shares_encoding_with" in value.meta:
                rewriter.miss(node, f"{value.name} keeps its grid: it shares that of {owner_of(value)}")
            elif specs != [spec]:
                rewriter.miss(node, f"{value.name} keeps its grid: its spec is {specs[0] if specs else 'none'}")
            else:
                rewriter.share_encoding(value, owner_of(node))


def _follow_chains(program: Program, rewriter: Rewriter) -> None:
    """Case 3: let whoever shares with a value that shares itself share with the last one of that chain."""
    owners = {node.name: owner_of(node) for node in program.graph.nodes}
    for node in program.graph.nodes:
        owner = owners[node.name]
        while owners.get(owner, owner) != owner:
            owner = owners[owner]
        if owner != owners[node.name]:
            rewriter.share_encoding(node, owner)


def _give_up_limits(program: Program, rewriter: Rewriter, roots: list[fx.Node], spec: QuantSpec) -> None:
    """Case 4: take the limits off all values that share with one of `roots`, if only those keep them from `spec`."""
    bare = replace(spec, limits=NO_LIMITS)
    free = {root for root in roots if {replace(own, limits=NO_LIMITS) for own in wanted_specs(root)} == {bare}}
    for value in program.graph.nodes:
        if is_float_value(value) and _root(program, value) in free:
            for old in wanted_specs(value):
                set_value_spec(rewriter, value, old, replace(old, limits=NO_LIMITS))


def _root(program: Program, value: fx.Node) -> fx.Node:
    """The value at the end of a chain of values that share."""
    while owner_of(value) != value.name:
        value = program.node(owner_of(value))
    return value


def _without_limits(spec: QuantSpec) -> QuantSpec:
    return replace(spec, limits=NO_LIMITS, fixed=None)


def owner_of(value: fx.Node) -> str:
    """Name of the value whose FakeQuant this value uses: itself, unless it shares."""
    owner: str = value.meta.get("shares_encoding_with", value.name)
    return owner
