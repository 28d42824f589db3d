"""Supergroups: lines of operations that the hardware runs as one, so that nothing is quantized between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fxquant.placement.sections import Sections, Supergroup

from .placed_values import PlacedValues

_FOLDABLE = frozenset({"Conv", "ConvTranspose", "Gemm"})
_NORM = "BatchNormalization"
_MATMUL_ADD = Supergroup(("MatMul", "Add"))


@dataclass(frozen=True)
class Line:
    """The operations that one supergroup took, in order; `place` is the supergroup's in its file."""

    place: str
    group: Supergroup
    nodes: tuple[fx.Node, ...]

    @property
    def reason(self) -> str:
        """Why nothing is quantized inside: "supergroups[2]: Conv + Relu"."""
        return f"{self.place}: {self.group}"


def match_supergroups(values: PlacedValues, sections: Sections) -> list[Line]:
    """The lines in a program: longest first, of equals the group that names just these, then the earlier in the file.

    No operation is in two of them.

    1. Every operation but the last gives one value, which the next one alone reads.
    2. A batch norm behind a convolution or linear layer is passed over, as it can be folded, unless the group names it;
       a group that names it matches all the same where it has been folded. Of [Conv, BatchNormalization] nothing is
       left then: such a line has no inside and keeps its operation free for another one.
    3. "MatmulAdd" of the pass list takes a product and the constant that is added to it.
    """
    groups = [(f"supergroups[{index}]", group) for index, group in enumerate(sections.supergroups)]
    if "MatmulAdd" in sections.supergroup_pass_list:
        groups.append((f"supergroup_pass_list[{sections.supergroup_pass_list.index('MatmulAdd')}]", _MATMUL_ADD))
    starts = values.operations
    lines = [Line(place, group, _line(values, node, group.op_list)) for place, group in groups for node in starts]
    found: list[Line] = []
    taken: set[fx.Node] = set()
    for line in sorted(lines, key=lambda line: (-len(line.nodes), len(line.group.op_list) != len(line.nodes))):
        needed = line.nodes if len(line.nodes) > 1 else ()
        if line.nodes and not taken.intersection(needed) and not _adds_no_constant(values, line.group, line.nodes):
            taken.update(needed)
            found.append(line)
    return found


def _line(values: PlacedValues, node: fx.Node, types: Sequence[str]) -> tuple[fx.Node, ...]:
    if types[0] not in values.types(node):
        return ()
    nodes = [node]
    for wanted in types[1:]:
        ahead = _next(values, nodes[-1])
        if wanted == _NORM and _FOLDABLE.intersection(values.types(nodes[-1])) and not _is_norm(values, ahead):
            continue  # case 2: it has been folded
        if ahead is not None and wanted not in values.types(ahead) and _folds(values, nodes[-1], ahead):  # case 2
            nodes.append(ahead)
            ahead = _next(values, ahead)
        if ahead is None or wanted not in values.types(ahead):
            return ()
        nodes.append(ahead)
    return tuple(nodes)


def _next(values: PlacedValues, node: fx.Node) -> fx.Node | None:
    """Case 1: the operation that alone reads what `node` gives, as an activation."""
    reader = values.only_reader(node) if values.is_value(node) else None
    return reader if reader is not None and any(value is node for _, value in values.inputs(reader)) else None


def _folds(values: PlacedValues, node: fx.Node, ahead: fx.Node) -> bool:
    return bool(_FOLDABLE.intersection(values.types(node))) and _is_norm(values, ahead)


def _is_norm(values: PlacedValues, node: fx.Node | None) -> bool:
    return node is not None and _NORM in values.types(node)


def _adds_no_constant(values: PlacedValues, group: Supergroup, nodes: Sequence[fx.Node]) -> bool:
    """Case 3: whether a sum of two activations stands where "MatmulAdd" wants a constant."""
    return group is _MATMUL_ADD and all(values.is_value(value) for _, value in values.inputs(nodes[-1]))
