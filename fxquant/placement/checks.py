"""What is wrong with placement rules before they decide anything: names that the program, or the table, lacks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from fxquant.errors import ConfigError, nearest
from fxquant.graph.program import Program
from fxquant.ops.base import OpTable
from fxquant.placement.rules import Rule, rule_place

_SHOWN = 12  # names that a remedy lists


def check_rules(rules: Sequence[Rule], program: Program, table: OpTable) -> None:
    """Refuse rules that can match nothing: an unknown operation, or a module or node that the program lacks."""
    onnx_types = {name for definition in table for name in definition.onnx_types}
    accepted = {*table.names(), *onnx_types}
    nodes = [node.name for node in program.graph.nodes if node.op != "output"]
    calls = [node for node in program.graph.nodes if node.op in ("call_function", "call_module")]
    paths = list(dict.fromkeys(node.meta.get("module_path", "") for node in calls))
    for index, rule in enumerate(rules):
        thing = f"{rule_place(index)}: {rule}"
        if rule.op is not None and rule.op not in accepted:
            raise ConfigError(f"{thing} is unknown", place=rule.place, remedy=nearest(rule.op, accepted))
        if rule.node is not None and rule.node not in nodes:
            raise ConfigError(f"{thing} is not in the graph", place=rule.place, remedy=_near(rule.node, nodes))
        if rule.module is not None and not any(re.fullmatch(rule.module, path) for path in paths):
            remedy = f"{_near_path(rule.module, paths)} What an earlier pass folded away has no module any more."
            raise ConfigError(f"{thing} matches nothing", place=rule.place, remedy=remedy)


def _near_path(pattern: str, paths: Sequence[str]) -> str:
    """The module paths, and the containers on the way to them, that resemble what a regular expression spells."""
    containers = [path.rsplit(".", count)[0] for path in paths for count in range(1, path.count(".") + 1)]
    names = [path for path in dict.fromkeys((*paths, *containers)) if path]
    below = [name for name in names if re.match(rf"(?:{pattern})(?:\.|$)", name)]
    if below:
        return f"A rule is about whole paths: did you mean '{pattern}\\..*'?"
    spelled = re.sub(r"\(\?:|[\\^$()?]", "", re.sub(r"\\?\.[*+]\??", "", pattern))
    return _near(spelled, names)


def _near(name: str, names: Iterable[str]) -> str:
    """The nearest names, and the first of all."""
    known = list(names)
    close = [f"'{found}'" for found in get_close_matches(name, known, n=3, cutoff=0.5)]
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return f"{hint}Accepted: {', '.join(known[:_SHOWN])}{more} (print the program to see all)."
