"""Example inputs: what a user may hand in, where their batch axis is, and the same example at other batch sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from fxquant.errors import CaptureError


@dataclass(frozen=True)
class Example:
    """Arguments of one call of the model; lists, tuples, dicts and registered dataclasses may hold the tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors, in the order of the arguments."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]

    @property
    def batch(self) -> int | None:
        """Size of axis 0 of the first tensor; None when it has no axis."""
        first = self.tensors[0]
        return first.shape[0] if first.ndim else None

    def is_batched(self, tensor: torch.Tensor) -> bool:
        """Whether axis 0 of `tensor` counts as the batch: it is as long as the first tensor's."""
        return tensor.ndim > 0 and self.batch is not None and tensor.shape[0] == self.batch

    def at_batch(self, count: int) -> Example:
        """The same example with `count` rows, repeated in turn where it has fewer."""

        def resize(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or not self.is_batched(leaf):
                return leaf
            return leaf[torch.arange(count, device=leaf.device) % leaf.shape[0]]

        args, kwargs = pytree.tree_map(resize, (self.args, self.kwargs))
        return Example(args, kwargs)

    def clone(self) -> Example:
        """The same values in new tensors, for a model that writes to its inputs."""
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (self.args, self.kwargs)
        )
        return Example(args, kwargs)

    def dynamic_axes(self) -> ShapesCollection:
        """What torch.export wants to hear: axis 0 of every batched tensor is dynamic."""
        shapes = ShapesCollection()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        for tensor in self.tensors:
            if self.is_batched(tensor):
                shapes[tensor] = {0: Dim.DYNAMIC}
        return shapes


def as_example(example_inputs: Any, kwargs: Mapping[str, Any] | None) -> Example:
    """Read what the user passed: a tensor, a tuple or list of arguments, or a dict of keyword arguments."""
    keywords = dict(kwargs or {})
    if isinstance(example_inputs, torch.Tensor):
        args: tuple[Any, ...] = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        args, keywords = (), {**example_inputs, **keywords}
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    else:
        raise CaptureError(
            "capture: example_inputs",
            expected="a tensor, a tuple or list of arguments, or a dict of keyword arguments",
            got=type(example_inputs).__name__,
            remedy="Wrap a single argument of another type in a tuple.",
        )
    if any(not isinstance(key, str) for key in keywords):
        raise CaptureError("capture: keyword example inputs", expected="names as keys", got=str(list(keywords)))
    example = Example(args, keywords)
    if not example.tensors:
        raise CaptureError(
            "capture: example_inputs",
            expected="at least one tensor",
            got=f"{len(args)} positional and {len(keywords)} keyword arguments without one",
            remedy="Pass tensors of the shapes and dtypes that the model takes, e.g. torch.randn(2, 3, 224, 224).",
        )
    return example
