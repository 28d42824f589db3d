"""Snapshot: a program as it stood, against which a pass's recorded edits are checked and to which a failed pass is
rolled back.

A snapshot holds references, not copies: node arguments are immutable in torch.fx, and of a tensor its identity,
version, requires_grad and a sum over its bits are kept: that values were overwritten in place is seen, but the old ones
cannot be given back. Taking one is linear in the graph, plus one read of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx, nn

from fxquant.errors import PassError
from fxquant.graph.bias_correction import CORRECTION
from fxquant.graph.module import ProgramModule
from fxquant.graph.program import Note, Program, Stage, describe
from fxquant.graph.statistics import STATISTICS
from fxquant.spec import QuantSpec, Target

if TYPE_CHECKING:
    from fxquant.graph.rewriter import Rewriter

META_KEYS = (
    "type",
    "module_path",
    "module_class",
    "source",
    "output_spec",
    "input_specs",
    "input_rules",
    "rule",
    "float_reason",
    "shares_encoding_with",
    STATISTICS,
    CORRECTION,
)
_WHOLE_SUBTREE = frozenset(
    ("add", "remove", "encode", "state", "edit")
)  # recorded actions that cover all that lies below their path
_SAME_SIZE_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SMALL = 4096  # elements; larger tensors are summed one by one, where they are
_DENSE = (torch.Tensor, nn.Parameter)
_PLAIN = (bool, int, float, str, Enum, QuantSpec)
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "_hooks" in name and isinstance(value, dict))
_HEADER_REMEDIES = {
    "stage": "Declare `leaves`; the manager sets the stage.",
    "target": "The pipeline sets the target (Pipeline(..., target=Target...)).",
    "name": "Name the program where it is captured.",
}


class NodeState(NamedTuple):
    """What a node says; two states are equal when a pass would see no difference."""

    node: fx.Node
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]


class ModuleState(NamedTuple):
    """What a module holds: shallow copies of its three tables, its plain attributes (mode, spec, eps ...) and those of
    its tables of hooks that are not empty.
    """

    module: nn.Module
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, torch.Tensor | None]
    modules: dict[str, nn.Module | None]
    attributes: dict[str, Any]
    hooks: dict[str, dict[int, Any]]


class TensorState(NamedTuple):
    """Which tensor stands at a path, and what shows that its values were overwritten."""

    tensor: torch.Tensor
    version: int
    bits: int
    requires_grad: bool


def node_state(node: fx.Node) -> NodeState:
    """The state of a node as it is now."""
    meta = dict(node.meta)
    for key in {"input_specs", "input_rules"} & meta.keys():
        meta[key] = dict(meta[key])  # the two mutable values
    return NodeState(node, node.op, node.target, node.args, node.kwargs, meta)


@dataclass(frozen=True)
class Snapshot:
    """A program at one moment."""

    graph: fx.Graph
    nodes: dict[str, NodeState]
    modules: dict[str, ModuleState]
    tensors: dict[str, TensorState]
    stage: Stage
    target: Target
    name: str
    notes: tuple[Note, ...]

    @classmethod
    def take(cls, program: Program) -> Snapshot:
        """The program as it is now; nodes that share a name are a PassError."""
        nodes: dict[str, NodeState] = {}
        for node in program.graph.nodes:
            if node.name in nodes:
                raise PassError(
                    f"node '{node.name}' is there twice",
                    place=describe(node),
                    remedy="Create nodes through the Rewriter.",
                )
            nodes[node.name] = node_state(node)
        modules = {path: _module_state(module) for path, module in _walk(program.module)}
        tensors = _tensor_states(modules)
        return cls(program.graph, nodes, modules, tensors, program.stage, program.target, program.name, program.notes)

    def changed(self, later: Snapshot) -> set[str]:
        """Names of the nodes that are new in `later` or say something else there."""
        return {name for name, state in later.nodes.items() if self.nodes.get(name) != state}

    def restore(self, program: Program) -> list[str]:
        """Roll `program` back; returns the paths of tensors whose overwritten values could not be brought back."""
        root = self.modules[""].module
        assert isinstance(root, ProgramModule)
        program.module = root
        for state in self.modules.values():
            _refill(state.module._parameters, state.parameters)
            _refill(state.module._buffers, state.buffers)
            _refill(state.module._modules, state.modules)
            for name, value in state.attributes.items():
                setattr(state.module, name, value)
            for name in _HOOKS:
                _refill(vars(state.module).get(name, {}), state.hooks.get(name, {}))
        for tensor_state in self.tensors.values():
            _restore_requires_grad(tensor_state)
        self.restore_header(program)
        program.notes = self.notes
        now = Snapshot.take(program) if program.graph is self.graph and _names_are_unique(program.graph) else None
        if now is None or list(now.nodes.items()) != list(self.nodes.items()):
            program.module.graph = self._rebuilt_graph()
            program.link_biases()
        return [path for path, state in _tensor_states(self.modules).items() if _overwritten(self.tensors[path], state)]

    def restore_header(self, program: Program) -> None:
        """Give `program` its stage, target and name back."""
        program.stage, program.target, program.name = self.stage, self.target, self.name

    def _rebuilt_graph(self) -> fx.Graph:
        graph = fx.Graph()
        graph._codegen = self.graph._codegen
        twins: dict[fx.Node, fx.Node] = {}
        for name, state in self.nodes.items():
            args, kwargs = fx.node.map_arg((state.args, state.kwargs), lambda old: twins[old])
            twin = graph.create_node(state.op, state.target, args, kwargs, name=name)
            twin.meta = dict(state.meta)
            twins[state.node] = twin
        return graph


def refuse_unrecorded(before: Snapshot, after: Snapshot, rewriter: Rewriter) -> None:
    """Raise PassError if anything differs between the two that the rewriter did not record."""
    for what, remedy in _HEADER_REMEDIES.items():
        old, new = getattr(before, what), getattr(after, what)
        if type(old) is not type(new) or old != new:
            raise _refusal(rewriter, f"{what} of the program was changed from {_shown(old)} to {_shown(new)}", remedy)
    if after.graph is not before.graph:
        raise _refusal(rewriter, "the graph was replaced by another one", "Edit `program.graph` through the Rewriter.")
    _refuse_node_edits(before, after, rewriter)
    _refuse_reordering(before, after, rewriter)
    _refuse_state_edits(before, after, rewriter)


def _refuse_node_edits(before: Snapshot, after: Snapshot, rewriter: Rewriter) -> None:
    for name, state in before.nodes.items():
        is_unconstrained = name in rewriter.touched and name not in rewriter.states
        if name not in after.nodes and not is_unconstrained and rewriter.states.get(name, state) is not None:
            place = describe(state.node)
            raise _refusal(rewriter, f"node '{name}' was erased", "Erase it with rewriter.erase.", place, name)
    for name, state in after.nodes.items():
        if name in rewriter.touched and name not in rewriter.states:
            continue
        expected = rewriter.states.get(name, before.nodes.get(name))
        if expected == state:
            continue
        place = describe(state.node)
        if expected is None:
            raise _refusal(rewriter, f"node '{name}' was created", "Create it with the Rewriter.", place, name)
        what = _what_differs(expected, state)
        if what and not (what == "meta" and name in rewriter.created):
            remedy = "Edit it with the Rewriter, which records what it does."
            raise _refusal(rewriter, f"{what} of node '{name}' was changed", remedy, place, name)


def _what_differs(expected: NodeState, got: NodeState) -> str:
    """The part of a node that differs; "" if only keys of its meta do that fxquant does not keep."""
    for field in ("op", "target", "args", "kwargs"):
        if getattr(expected, field) != getattr(got, field):
            return field
    if expected.node is not got.node:
        return "identity"
    is_ours = any(expected.meta.get(key) != got.meta.get(key) for key in META_KEYS)
    return "meta" if is_ours else ""  # other keys are the pass's own


def _refuse_reordering(before: Snapshot, after: Snapshot, rewriter: Rewriter) -> None:
    moved = {edit.subject for edit in rewriter.edits if edit.action == "move"}
    kept = {state.node for state in after.nodes.values()} & {state.node for state in before.nodes.values()}
    old = [name for name, state in before.nodes.items() if state.node in kept and name not in moved]
    new = [name for name, state in after.nodes.items() if state.node in kept and name not in moved]
    for expected, got in zip(old, new, strict=True):
        if expected != got:
            place = describe(after.nodes[got].node)
            found = f"node '{got}' stands where '{expected}' stood"
            raise _refusal(rewriter, found, "Move nodes with rewriter.move.", place, got)


def _refuse_state_edits(before: Snapshot, after: Snapshot, rewriter: Rewriter) -> None:
    recorded = _RecordedPaths(rewriter)
    for path in {**before.modules, **after.modules}:
        _refuse_module_edit(before.modules.get(path), after.modules.get(path), path, recorded)
    for path in {**before.tensors, **after.tensors}:
        old, new = before.tensors.get(path), after.tensors.get(path)
        if (old is None or new is None or _overwritten(old, new)) and not recorded.covers(path):
            what = f"tensor '{path}' was {_verb(old, new)}"
            raise _refusal(rewriter, what, "Use rewriter.set_tensor, add_tensor or editing.", node=path)
        if old is not None and new is not None and old.requires_grad is not new.requires_grad:
            if not recorded.covers(path):
                what = f"requires_grad of tensor '{path}' was changed from {old.requires_grad} to {new.requires_grad}"
                raise _refusal(rewriter, what, "Change it in `with rewriter.editing(<path of its module>)`.", node=path)


def _refuse_module_edit(old: ModuleState | None, new: ModuleState | None, path: str, recorded: _RecordedPaths) -> None:
    if old is not None and new is not None and old.module is new.module:
        names = [
            name
            for name in {**old.attributes, **new.attributes}
            if old.attributes.get(name) != new.attributes.get(name)
        ]
        if names and not recorded.covers(path):
            change = f"from {old.attributes.get(names[0])} to {new.attributes.get(names[0])}"
            what = f"'{names[0]}' of module '{path}' was changed {change}"
            raise _refusal(recorded.rewriter, what, "Use rewriter.set_mode or editing.", node=path)
        if old.hooks != new.hooks and not recorded.covers(path):
            kind = next(name for name in _HOOKS if old.hooks.get(name) != new.hooks.get(name))
            what = f"hooks ({kind.strip('_')}) of module '{path}' were changed"
            remedy = "A hook is no part of the graph and is neither saved nor exported: add a node instead."
            raise _refusal(recorded.rewriter, what, remedy, node=path)
    elif not recorded.covers(path) and path not in recorded.containers:
        what = f"module '{path}' was {_verb(old, new)}"
        raise _refusal(recorded.rewriter, what, "Use rewriter.add_module or remove_module.", node=path)


class _RecordedPaths:
    """Which paths of tensors and modules the recorded edits cover."""

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self.subtrees = {edit.subject for edit in rewriter.edits if edit.action in _WHOLE_SUBTREE}
        self.containers = {parent for path in self.subtrees for parent in _parents(path)}

    def covers(self, path: str) -> bool:
        """Whether an edit of this path, or of all that lies below a parent of it, was recorded."""
        return path in self.rewriter.touched or any(parent in self.subtrees for parent in _parents(path))


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def _verb(old: object | None, new: object | None) -> str:
    if old is None:
        return "added"
    return "removed" if new is None else "changed"


def _refusal(rewriter: Rewriter, what: str, remedy: str, place: str = "", node: str = "") -> PassError:
    err = PassError(f"{rewriter.pass_name}: unrecorded edit: {what}", place=place, remedy=remedy)
    err.node = node
    return err


def _walk(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every path to every submodule, the root ("") first; a shared module has several paths."""
    waiting: list[tuple[str, nn.Module]] = [("", root)]
    while waiting:
        path, module = waiting.pop()
        yield path, module
        prefix = f"{path}." if path else ""
        waiting.extend((prefix + name, child) for name, child in module._modules.items() if child is not None)


def _module_state(module: nn.Module) -> ModuleState:
    attributes = {}
    if type(module) is not nn.Module and not isinstance(module, fx.GraphModule):
        attributes = {
            name: value
            for name, value in vars(module).items()
            if name[0] != "_" and name != "training" and isinstance(value, _PLAIN)
        }
    hooks = {name: dict(table) for name in _HOOKS if (table := vars(module).get(name))}
    tables = dict(module._parameters), dict(module._buffers), dict(module._modules)
    return ModuleState(module, *tables, attributes, hooks)


def _tensor_states(modules: dict[str, ModuleState]) -> dict[str, TensorState]:
    found: dict[str, torch.Tensor] = {}
    for path, state in modules.items():
        prefix = f"{path}." if path else ""
        for name, tensor in (*state.parameters.items(), *state.buffers.items()):
            if tensor is not None:
                found[prefix + name] = tensor
    distinct = {id(tensor): tensor for tensor in found.values()}
    bits = dict(zip(distinct, _sums_of_bits(list(distinct.values())), strict=True))
    return {
        path: TensorState(tensor, _version(tensor), bits[id(tensor)], tensor.requires_grad)
        for path, tensor in found.items()
    }


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _sums_of_bits(tensors: list[torch.Tensor]) -> list[int]:
    """For each tensor the sum of its elements' bits as integers, modulo 2^64: `.data` edits leave no version behind.

    Small tensors of one kind (the scales of thousands of quantizers) are stacked and summed by one call.
    """
    groups: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.layout is torch.strided and tensor.device.type != "meta" and type(tensor) in _DENSE:
            kind = (tensor.device, tensor.dtype, tensor.shape)
            groups.setdefault(kind if tensor.numel() <= _SMALL else index, []).append(index)
    sums = [0] * len(tensors)
    with torch.no_grad():
        for indices in groups.values():
            stacked = (
                torch.stack([tensors[index] for index in indices]) if len(indices) > 1 else tensors[indices[0]][None]
            )
            for index, value in zip(indices, _sum_of_bits(stacked).tolist(), strict=True):
                sums[index] = value
    return sums


def _sum_of_bits(stacked: torch.Tensor) -> torch.Tensor:
    if stacked.is_complex():
        stacked = torch.view_as_real(stacked.resolve_conj())
    stacked = stacked.detach()
    if stacked[0].numel() > _SMALL and stacked.is_contiguous() and stacked.nbytes % 8 == 0:
        return stacked.view(-1).view(torch.int64).sum()[None]  # several times as fast: no conversion to 64 bits
    bits = stacked.view(_SAME_SIZE_INTEGER[stacked.element_size()])
    return bits.sum(dim=list(range(1, bits.ndim)), dtype=torch.int64) if bits.ndim > 1 else bits.to(torch.int64)


def _overwritten(old: TensorState, new: TensorState) -> bool:
    return old.tensor is not new.tensor or old.version != new.version or old.bits != new.bits


def _restore_requires_grad(state: TensorState) -> None:
    tensor = state.tensor
    if tensor.requires_grad is state.requires_grad:
        return
    if tensor.is_leaf:
        tensor.requires_grad_(state.requires_grad)
    else:  # a buffer into which a differentiable value was written
        tensor.detach_()


def _refill(table: dict[Any, Any], content: Mapping[Any, Any]) -> None:
    table.clear()
    table.update(content)


def _names_are_unique(graph: fx.Graph) -> bool:
    names = [node.name for node in graph.nodes]
    return len(names) == len(set(names))


def _parents(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path
