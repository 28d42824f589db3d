"""Placement: which node is quantized, and with which specs, by rules of rising specificity.

A rule names operations, module paths (regular expressions) or nodes; a node rule beats a module rule, which beats an
operation rule, which beats the defaults; of equals the later one wins. Each setting is decided on its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import fx

from fxquant.errors import ConfigError, nearest
from fxquant.graph.program import Program
from fxquant.ops.base import OpDef, OpTable
from fxquant.spec import QuantSpec


@dataclass(frozen=True)
class Rule:
    """What is wanted for the nodes that match; None leaves a setting to less specific rules.

    Arguments:
        op: our name of an operation, or an ONNX operator type ("linear", "Conv").
        module: regular expression for the whole module path ("layer4\\..*").
        node: a node's name.
        quantize: False leaves the node in float.
        activation: spec of its inputs and output.
        weight: spec of its weight.
    """

    op: str | None = None
    module: str | None = None
    node: str | None = None
    quantize: bool | None = None
    activation: QuantSpec | None = None
    weight: QuantSpec | None = None

    def __post_init__(self) -> None:
        named = [key for key in ("op", "module", "node") if getattr(self, key) is not None]
        if len(named) != 1:
            raise ConfigError(
                "placement rule", expected="exactly one of op, module, node", got=", ".join(named) or "none"
            )
        if self.module is not None:
            try:
                re.compile(self.module)
            except re.error as err:
                raise ConfigError(
                    "placement rule: module", expected="a regular expression", got=f"'{self.module}' ({err})"
                ) from err

    @property
    def specificity(self) -> int:
        """0 for an operation, 1 for a module, 2 for a node."""
        return 2 if self.node is not None else 1 if self.module is not None else 0

    def matches(self, node: fx.Node, definition: OpDef) -> bool:
        """Whether the rule is about this node."""
        if self.node is not None:
            return node.name == self.node
        if self.module is not None:
            return re.fullmatch(self.module, node.meta.get("module_path", "")) is not None
        return self.op == definition.name or self.op in definition.types_for(node)

    def __str__(self) -> str:
        key = "node" if self.node is not None else "module" if self.module is not None else "op"
        return f"{key} = '{getattr(self, key)}'"


@dataclass(frozen=True)
class Decision:
    """What the rules say of one node, and which of them decided."""

    quantize: bool
    activation: QuantSpec
    weight: QuantSpec
    rule: str


def decide(
    node: fx.Node, definition: OpDef, rules: tuple[Rule, ...], activation: QuantSpec, weight: QuantSpec
) -> Decision:
    """Apply the rules that match `node`, least specific first, to the defaults."""
    quantize, decided_by = True, "defaults"
    for rule in sorted((r for r in rules if r.matches(node, definition)), key=lambda r: r.specificity):
        quantize = quantize if rule.quantize is None else rule.quantize
        activation = activation if rule.activation is None else rule.activation
        weight = weight if rule.weight is None else rule.weight
        decided_by = str(rule)
    return Decision(quantize, activation, weight, decided_by)


def check_rules(rules: tuple[Rule, ...], program: Program, table: OpTable) -> None:
    """Refuse rules that can match nothing: an unknown operation, or a module or node that the program lacks."""
    onnx_types = {name for definition in table for name in definition.onnx_types}
    accepted = {*table.names(), *onnx_types}
    nodes = {node.name for node in program.graph.nodes}
    paths = {node.meta.get("module_path", "") for node in program.graph.nodes}
    for rule in rules:
        if rule.op is not None and rule.op not in accepted:
            raise ConfigError(f"placement rule: op '{rule.op}' is unknown", remedy=nearest(rule.op, accepted))
        if rule.node is not None and rule.node not in nodes:
            raise ConfigError(
                f"placement rule: node '{rule.node}' is not in the graph", remedy=nearest(rule.node, nodes)
            )
        if rule.module is not None and not any(re.fullmatch(rule.module, path) for path in paths):
            raise ConfigError(
                f"placement rule: module '{rule.module}' matches nothing", remedy=nearest(rule.module, paths)
            )
