"""What a pass tells of its placement rules when it has applied them: which decided nothing, and why."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxquant.graph.program import Note, NoteKind, Program
from fxquant.ops.base import Role
from fxquant.placement import Rule
from fxquant.placement.rules import rule_place

from .values import role_of
from .wishes import Wishes

_NAMED = 6  # nodes that a report names


def report_rules(wishes: Wishes) -> None:
    """Tell which rules decided nothing, and which wanted quantized what cannot be."""
    heard = wishes.heard.union(*(choice.by.rules for choice in wishes.choices.values()))
    for index, rule in enumerate(wishes.rules):
        matched = [node for node in wishes.program.graph.nodes if wishes.is_matched(node, rule)]
        in_float = [node for node in matched if _is_in_float_anyway(node)]
        if index not in heard:
            _tell(wishes, index, _unheard(wishes, index, rule, matched))
        elif rule.quantize and in_float:
            _tell(wishes, index, f"{rule} cannot quantize {_because(in_float)}")


def _tell(wishes: Wishes, index: int, reason: str) -> None:
    """In the trace of this run, and in the program for whoever has no trace."""
    place = wishes.rules[index].place
    wishes.rewriter.miss_option(rule_place(index), place, reason)
    wishes.rewriter.note(Note(NoteKind.OTHER, place or rule_place(index), reason))


def _unheard(wishes: Wishes, index: int, rule: Rule, matched: Sequence[fx.Node]) -> str:
    if not matched:
        return f"{rule} matches no operation of this program"
    is_of_output = any(said is not None for said in (rule.quantize, rule.activation, rule.output))
    if all(_is_in_float(node) or (is_of_output and "float_reason" in node.meta) for node in matched):
        return f"{rule} decides nothing: in float stays {_because(matched)}"
    beaten = any(_is_beaten(wishes, rule, node) for node in matched if _could_be_decided(wishes.program, node))
    if index in wishes.won or not beaten:
        return f"{rule} decides nothing: what it sets has no spec of its own at {_names(matched)}"
    return f"{rule} decides nothing: more specific rules decide all that it says of {_names(matched)}"


def _is_beaten(wishes: Wishes, rule: Rule, node: fx.Node) -> bool:
    return any(other.specificity > rule.specificity and wishes.is_matched(node, other) for other in wishes.rules)


def _is_in_float_anyway(node: fx.Node) -> bool:
    return not str(node.meta.get("float_reason", "excluded")).startswith("excluded")


def _is_in_float(node: fx.Node) -> bool:
    """Whether nothing of a node is quantized; inside a supergroup its inputs and weight are."""
    is_excluded = "float_reason" in node.meta and not _is_in_float_anyway(node)
    return is_excluded or ("float_reason" in node.meta and not node.meta.get("input_specs"))


def _could_be_decided(program: Program, node: fx.Node) -> bool:
    return role_of(program, node) is not Role.GRID_PRESERVING


def _because(nodes: Sequence[fx.Node]) -> str:
    return f"{_names(nodes)} ({nodes[0].meta['float_reason']})"


def _names(nodes: Sequence[fx.Node]) -> str:
    more = f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else ""
    return ", ".join(f"'{node.name}'" for node in nodes[:_NAMED]) + more
