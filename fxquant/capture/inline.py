"""Inline the bodies that torch.export wraps: regions of `torch.no_grad()` and of `torch.autocast(enabled=False)`."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxquant.capture.places import describe_raw
from fxquant.errors import CaptureError
from fxquant.graph.program import Note, NoteKind

_NO_GRAD = "wrap_with_set_grad_enabled"
_AUTOCAST = "wrap_with_autocast"


def inline_regions(module: fx.GraphModule, notes: list[Note]) -> None:
    """Inline every wrapped body in `module`'s graph, nested ones too; other higher-order operations raise."""
    for node in list(module.graph.nodes):
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            _inline(module, node, notes)


def _inline(module: fx.GraphModule, node: fx.Node, notes: list[Note]) -> None:
    assert isinstance(node.target, torch._ops.HigherOrderOperator)
    name = str(node.target)
    if name == _NO_GRAD:
        body_node, inputs = node.args[1], node.args[2:]
    elif name == _AUTOCAST:
        body_node, inputs = node.args[4], node.args[5:]
        _judge_autocast(module, node, notes)
    else:
        raise CaptureError(
            f"capture: higher-order operation '{name}'",
            place=describe_raw(node),
            expected="a model whose control flow does not depend on tensor values",
            got=f"a call of {name}",
            remedy="Replace it by torch.where, or capture the parts of the model before and after it.",
        )
    assert isinstance(body_node, fx.Node)
    body = module.get_submodule(str(body_node.target))
    assert isinstance(body, fx.GraphModule)
    inline_regions(body, notes)
    outputs = _copy_body(module.graph, node, body, inputs)
    _replace_results(module.graph, node, outputs)
    if not body_node.users:
        module.graph.erase_node(body_node)


def _judge_autocast(module: fx.GraphModule, node: fx.Node, notes: list[Note]) -> None:
    device, _, enabled = node.args[:3]
    assert isinstance(node.args[4], fx.Node)
    body = module.get_submodule(str(node.args[4].target))
    assert isinstance(body, fx.GraphModule)
    first = next((inner for inner in body.graph.nodes if inner.op == "call_function"), node)
    place = describe_raw(first)  # the wrapping node itself has no source line
    if enabled:
        raise CaptureError(
            "capture: torch.autocast(enabled=True) inside the model",
            place=place,
            expected="a model in one precision",
            got=f"an autocast region for {device}",
            remedy="Remove the region (quantization chooses the precision), or capture the model without it.",
        )
    text = f"torch.autocast('{device}', enabled=False) region is inlined: do not run the program under autocast"
    notes.append(Note(NoteKind.OTHER, first.meta["module_path"], text))


def _copy_body(graph: fx.Graph, node: fx.Node, body: fx.GraphModule, inputs: tuple[Any, ...]) -> Any:
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                values[inner] = next(given)
            elif inner.op == "output":
                return fx.node.map_arg(inner.args[0], lambda leaf: values[leaf])
            else:
                values[inner] = graph.node_copy(inner, lambda leaf: values[leaf])
    raise AssertionError("a graph has an output")


def _replace_results(graph: fx.Graph, node: fx.Node, outputs: Any) -> None:
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(outputs[0] if isinstance(outputs, (tuple, list)) else outputs)
    graph.erase_node(node)
