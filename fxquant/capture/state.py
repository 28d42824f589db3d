"""The tensors of a program: the model's module tree without its code, and one path for each tensor.

Containers are plain nn.Modules that share parameters and buffers with the private copy of the model; a module that
stands at two paths stands at both here too, so that `state_dict()` has the model's keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx, nn

from fxquant.errors import CaptureError
from fxquant.graph.module import ProgramModule
from fxquant.graph.program import FAKE_QUANTS

_PLAIN = frozenset(dir(nn.Module()))
_RESERVED = (frozenset(dir(ProgramModule(nn.Module(), fx.Graph()))) | {FAKE_QUANTS}) - _PLAIN


@dataclass
class State:
    """`root` is the module tree of the program to be; `model` the private copy that it shares tensors with."""

    root: nn.Module
    model: nn.Module
    paths: dict[int, str] = field(default_factory=dict)  # id of a tensor -> its first path


def build_state(model: nn.Module) -> State:
    """The tree of containers of `model`, which must not use names that a program's module needs for itself."""
    for name in (*model._modules, *model._parameters, *model._buffers):
        if name in _RESERVED:
            raise CaptureError(
                f"capture: {type(model).__name__}.{name}",
                expected="another name at the top level of the model",
                got=f"'{name}', which the captured module uses itself",
                remedy="Rename it, or wrap the model in a module that has it one level below.",
            )
    state = State(_container(model, {}), model)
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        state.paths.setdefault(id(tensor), path)
    return state


def _container(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    twin = memo[id(module)] = nn.Module()
    twin._parameters = dict(module._parameters)
    twin._buffers = dict(module._buffers)
    twin._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        if child is not None and (any(True for _ in child.parameters()) or any(True for _ in child.buffers())):
            twin._modules[name] = _container(child, memo)
    return twin


def resolve_tensors(state: State, exported: fx.GraphModule, graph: fx.Graph) -> None:
    """Point every get_attr node at its tensor's first path in the model, one node for each tensor.

    Literals that export lifted go under a child `constants`, tensors that the model keeps as plain attributes stay
    where they are; both become non-persistent buffers: they move with the module and leave the state_dict alone.
    """
    first: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        path = _path_of(state, exported, node)
        if path in first:
            node.replace_all_uses_with(first[path])
            graph.erase_node(node)
        else:
            node.target = path
            first[path] = node


def _path_of(state: State, exported: fx.GraphModule, node: fx.Node) -> str:
    tensor: object = exported
    for part in str(node.target).split("."):
        tensor = getattr(tensor, part)
    if not isinstance(tensor, torch.Tensor):
        raise CaptureError(
            f"capture: attribute '{node.target}'",
            expected="a tensor",
            got=type(tensor).__name__,
            remedy="A model that calls such an object cannot be captured; replace it by tensor operations.",
        )
    path = state.paths.get(id(tensor))
    if path is None:
        path = state.paths[id(tensor)] = _add_constant(state, str(node.target), tensor)
    return path


def _add_constant(state: State, path: str, tensor: torch.Tensor) -> str:
    owner, _, name = path.rpartition(".")
    if not _is_model_attribute(state.model, path) or (not owner and name in _RESERVED):
        owner = free_path(state.root, "constants") if "constants" in state.model._modules else "constants"
        name = name.replace(".", "_")
    place = ensure_module(state.root, owner)
    place.register_buffer(name, tensor.detach(), persistent=False)
    return f"{owner}.{name}" if owner else name


def _is_model_attribute(model: nn.Module, path: str) -> bool:
    owner: object = model
    for part in path.split("."):
        owner = getattr(owner, part, None)
    return owner is not None


def ensure_module(root: nn.Module, path: str) -> nn.Module:
    """The module at `path`, made of plain containers where there is none."""
    place = root
    for part in path.split(".") if path else ():
        place = place._modules.setdefault(part, nn.Module())  # type: ignore[assignment]  # containers hold no None
    return place


def free_path(root: nn.Module, path: str) -> str:
    """`path`, or the first of path_1, path_2, ... that is not taken in `root`."""
    owner, _, name = path.rpartition(".")
    place = ensure_module(root, owner)
    candidate, count = name, 0
    while hasattr(place, candidate) or (not owner and candidate in _RESERVED):
        count += 1
        candidate = f"{name}_{count}"
    return f"{owner}.{candidate}" if owner else candidate


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`, and wherever else the module that stood there stands."""
    owner, _, name = path.rpartition(".")
    place = ensure_module(root, owner)
    old = place._modules.get(name)
    place._modules[name] = module
    if old is None:
        return
    for holder in list(root.modules()):
        for key, child in holder._modules.items():
            if child is old:
                holder._modules[key] = module
