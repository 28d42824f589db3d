"""Batch norm and dropout become modules again, at the paths where the model had them.

1. A batch norm module, stock or subclass, whatever else its forward does: a stock nn.BatchNormNd twin that shares its
   tensors, with eps from the operation and momentum (None included) and track_running_stats from the module.
2. Batch norm of something else (weights being standardised, F.batch_norm with the caller's own tensors): kept as an
   operation, noted.
3. A dropout module: the stock class of its operation, p from the operation, at its path.
4. Functional dropout: a new dropout module beside its caller.
5. Dropout that is active in eval mode too (p > 0 and switched on): kept as an operation, noted.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fxquant.capture.normal_form import aten, bound, rank
from fxquant.capture.places import place_of
from fxquant.capture.state import State, free_path, replace_module
from fxquant.graph.program import Note, NoteKind

_NORMS: dict[int, type[_BatchNorm]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_CHANNELWISE: dict[int, type[_DropoutNd]] = {2: nn.Dropout1d, 3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}
_DROPOUTS: dict[Any, type[_DropoutNd] | None] = {
    aten.dropout.default: nn.Dropout,
    aten.alpha_dropout.default: nn.AlphaDropout,
    aten.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
    aten.feature_dropout.default: None,
}


def restore_modules(graph: fx.Graph, state: State, notes: list[Note]) -> None:
    """Replace batch_norm and dropout operations by call_module nodes; see the cases above."""
    twins: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        if node.target is aten.batch_norm.default:
            _restore_norm(graph, node, state, twins, notes)
        elif node.target in _DROPOUTS:
            _restore_dropout(graph, node, state, twins, notes)


def _call(graph: fx.Graph, node: fx.Node, path: str) -> None:
    with graph.inserting_before(node):
        made = graph.create_node("call_module", path, (node.args[0],), {})
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _module_at(state: State, path: str) -> nn.Module | None:
    try:
        return state.model.get_submodule(path)
    except AttributeError:
        return None


def _restore_norm(graph: fx.Graph, node: fx.Node, state: State, twins: dict[str, nn.Module], notes: list[Note]) -> None:
    a = bound(node)
    path = _norm_path(state, node, a)
    if path is None:
        notes.append(_functional_norm_note(node, a))
        return
    if path not in twins:
        twins[path] = _build_norm(state, path, a)
        replace_module(state.root, path, twins[path])
    _call(graph, node, path)


def _norm_path(state: State, node: fx.Node, a: dict[str, Any]) -> str | None:
    """Path of the module that a batch_norm came from, by its tensors first (aliases) and its call stack second."""
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = {name: a[name] for name in names if a[name] is not None}
    if any(not isinstance(t, fx.Node) or t.op != "get_attr" for t in tensors.values()):
        return None
    if "running_mean" in tensors:
        path, _, attribute = str(tensors["running_mean"].target).rpartition(".")
    else:
        path, attribute = place_of(node).path, "running_mean"
    module = _module_at(state, path)
    if not path or module is None or attribute != "running_mean" or not _is_norm(module):
        return None
    same = all(state.paths.get(id(getattr(module, name, None))) == tensor.target for name, tensor in tensors.items())
    absent = all(getattr(module, name, None) is None for name in names if name not in tensors)
    return path if same and absent and ("weight" in tensors) == ("bias" in tensors) else None


def _is_norm(module: nn.Module) -> bool:
    """A batch norm module, or what an ExportedProgram leaves of one: its tensors."""
    return isinstance(module, _BatchNorm) or "num_batches_tracked" in module._buffers


def _build_norm(state: State, path: str, a: dict[str, Any]) -> _BatchNorm:
    module = state.model.get_submodule(path)
    momentum = module.momentum if isinstance(module, _BatchNorm) else (a["momentum"] or None)
    channels = int(a["input"].meta["val"].shape[1])
    kind = next((c for c in _NORMS.values() if isinstance(module, c)), _NORMS[rank(a["input"])])
    old = state.root
    for part in path.split("."):
        old = old._modules.get(part) or nn.Module()
    tracks = "running_mean" in a and a["running_mean"] is not None
    twin = kind(channels, eps=a["eps"], momentum=momentum, affine=a["weight"] is not None, track_running_stats=tracks)
    twin._parameters.update(old._parameters)
    twin._buffers.update(old._buffers)
    twin._modules.update(old._modules)
    twin._non_persistent_buffers_set.update(old._non_persistent_buffers_set)
    return twin


def _functional_norm_note(node: fx.Node, a: dict[str, Any]) -> Note:
    place = place_of(node)
    if a["training"]:
        text = "batch_norm that normalises by its own input's statistics in eval mode too stays an operation"
    else:
        text = "functional batch_norm stays an operation, with its running statistics frozen in train mode too"
    return Note(NoteKind.FROZEN_STATE, place.path, f"{place.source}: {text}" if place.source else text)


def _restore_dropout(
    graph: fx.Graph, node: fx.Node, state: State, twins: dict[str, nn.Module], notes: list[Note]
) -> None:
    a = bound(node)
    place = place_of(node)
    if a["train"] and a["p"]:
        text = "dropout that is active in eval mode stays an operation"
        notes.append(Note(NoteKind.OTHER, place.path, f"{place.source}: {text}"))
        return
    module = _module_at(state, place.path)
    is_module = isinstance(module, _DropoutNd) or place.module_class in _STOCK
    path = place.path if is_module and place.path else free_path(state.root, f"{place.path}.dropout".lstrip("."))
    if path not in twins:
        twins[path] = _dropout_class(node, module)(a["p"])
        replace_module(state.root, path, twins[path])
    _call(graph, node, path)


_STOCK = frozenset(
    c.__name__ for c in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
)


def _dropout_class(node: fx.Node, module: nn.Module | None) -> type[_DropoutNd]:
    for kind in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d):
        if isinstance(module, kind):
            return kind
    return _DROPOUTS[node.target] or _CHANNELWISE[rank(node.args[0])]
