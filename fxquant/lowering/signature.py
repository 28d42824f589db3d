"""Names of a model's inputs and outputs: placeholders keep theirs, outputs take dict keys and dataclass fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from fxquant.graph.program import Program, value_type


@dataclass(frozen=True)
class OutputLeaf:
    """One tensor (or size) that the model returns, and its name in ONNX."""

    name: str
    value: fx.Node | int | float | bool


def input_nodes(program: Program) -> list[fx.Node]:
    """The placeholders that become graph inputs: all tensors, and what else is read."""
    return [node for node in program.graph.nodes if node.op == "placeholder" and (value_type(node) or node.users)]


def output_leaves(program: Program, reserved: set[str]) -> list[OutputLeaf]:
    """The leaves that the model returns, in order, with unique names that are not in `reserved`; None is left out.

    A leaf is named by the dict keys, dataclass fields and positions that lead to it ("logits", "states_0"); where there
    are no keys or fields: output, output_1 ...
    """
    output = program.graph.output_node()
    leaves = pytree.tree_leaves(output.args[0], is_leaf=lambda item: isinstance(item, fx.Node))
    paths = _paths(program, output.args[0], len(leaves))
    taken = set(reserved)
    found = []
    for leaf, path in zip(leaves, paths, strict=True):
        if leaf is not None:
            name = _unique(path, taken)
            taken.add(name)
            found.append(OutputLeaf(name, leaf))
    return found


def _paths(program: Program, returned: Any, count: int) -> list[str]:
    codegen = program.graph._codegen
    spec = codegen.pytree_info.out_spec if isinstance(codegen, _PyTreeCodeGen) else None
    tree = (
        pytree.tree_unflatten(list(range(count)), spec) if spec is not None and spec.num_leaves == count else returned
    )
    flat, _ = pytree.tree_flatten_with_path(tree, is_leaf=lambda item: isinstance(item, fx.Node))
    if len(flat) != count or not any(isinstance(key, _NAMED) for path, _ in flat for key in path):
        return ["output"] * count
    return ["_".join(_part(key) for key in path) or "output" for path, _ in flat]


_NAMED = (pytree.MappingKey, pytree.GetAttrKey)


def _part(key: Any) -> str:
    if isinstance(key, pytree.MappingKey):
        return str(key.key)
    if isinstance(key, pytree.GetAttrKey):
        return str(key.name)
    return str(getattr(key, "idx", key))


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate
