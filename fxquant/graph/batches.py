"""One batch of a loader (a tensor, a tuple or list, a dict of keywords) as the arguments of a program."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx import _pytree as fx_pytree
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from fxquant.errors import FxquantError
from fxquant.graph.program import Program

Batch = torch.Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def as_arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as arguments: a tensor is one, a tuple or list several, a dict keywords."""
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    raise FxquantError(
        "batch",
        expected="a tensor, a tuple or list of tensors, or a dict of keywords",
        got=type(batch).__name__,
        remedy="Convert it to a tensor first.",
    )


def batches_digest(batches: Iterable[Batch]) -> str:
    """SHA-256 (hex) of batches, so that a run is not continued on others."""
    digest = hashlib.sha256()
    for batch in batches:
        for leaf in pytree.tree_leaves(batch):
            if not isinstance(leaf, torch.Tensor):
                digest.update(repr(leaf).encode())
                continue
            raw = leaf.detach().cpu().contiguous().flatten()
            digest.update(f"{leaf.dtype}:{tuple(leaf.shape)}:".encode())
            digest.update(raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
    return digest.hexdigest()


def placeholder_values(program: Program, batch: Batch) -> dict[str, Any]:
    """What each placeholder of the graph gets for `batch`, by placeholder name, in graph order.

    Raises FxquantError if the batch does not fit the program's signature, or a tensor its placeholder's dtype or rank.
    """
    args, kwargs = as_arguments(batch)
    return flat_arguments(program, args, kwargs)


def flat_arguments(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What each placeholder gets for `program.module(*args, **kwargs)`; errors as of placeholder_values."""
    signature = inspect.signature(program.module.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as err:
        remedy = "A batch is the model's arguments and nothing else: leave labels out, as in (x for x, _ in loader)."
        raise FxquantError("batch", expected=f"arguments {signature}", got=str(err), remedy=remedy) from err
    leaves = _flatten(program, list(bound.arguments.values()))
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    if len(leaves) != len(placeholders):
        remedy = "Give what the example inputs held, nested in the same way."
        raise FxquantError("batch", expected=f"{len(placeholders)} values", got=f"{len(leaves)}", remedy=remedy)
    for node, leaf in zip(placeholders, leaves, strict=True):
        _check(node, leaf)
    return {node.name: leaf for node, leaf in zip(placeholders, leaves, strict=True)}


def _flatten(program: Program, values: list[Any]) -> list[Any]:
    codegen = program.graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen) or codegen.pytree_info is None:
        return values
    spec = codegen.pytree_info.in_spec
    takes_keywords = spec.num_children == 2 and spec.child(0).type is tuple and spec.child(1).type is dict
    if not takes_keywords:
        return list(fx_pytree.tree_flatten_spec(values, spec))
    count = spec.child(0).num_children
    keywords = dict(zip(spec.child(1).context, values[count:], strict=True))
    return list(fx_pytree.tree_flatten_spec((tuple(values[:count]), keywords), spec))


def _check(node: fx.Node, leaf: Any) -> None:
    expected = node.meta.get("type")
    if expected is None or not isinstance(leaf, torch.Tensor):
        return
    if leaf.dtype != expected.dtype or leaf.ndim != len(expected.shape):
        got = f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
        raise _misfit(node, str(expected), got)
    fixed = [(axis, size) for axis, size in enumerate(expected.shape) if isinstance(size, int)]
    wrong = [axis for axis, size in fixed if leaf.shape[axis] != size]
    if wrong:
        raise _misfit(node, str(expected), f"{list(leaf.shape)} (axis {wrong[0]})")


def _misfit(node: fx.Node, expected: str, got: str) -> FxquantError:
    remedy = "Convert or reshape the batch, or capture the model with an example like it."
    return FxquantError(f"batch: input '{node.name}'", expected=expected, got=got, remedy=remedy)
