"""Aliases: every path at which each tensor and submodule of a program stands, found once and kept up to date.

Ties (one tensor at two paths) and shared submodules must change everywhere at once, and a pass may change thousands:
looking all of them up each time would cost too much.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


class Aliases:
    """The paths of `root`'s tensors and submodules, by identity."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._modules: dict[int, list[str]] | None = None
        self._tensors: dict[int, list[tuple[torch.Tensor, str]]] | None = None

    def of_module(self, module: nn.Module) -> list[str]:
        """Every path of a submodule."""
        return self._all_modules().get(id(module), [])

    def replace_tensor(self, old: torch.Tensor, new: torch.Tensor) -> list[str]:
        """Let `new` stand wherever `old` did; returns the paths."""
        tensors = self._all_tensors()
        paths = [path for _, path in tensors.pop(id(old))]
        tensors[id(new)] = [(new, path) for path in paths]
        return paths

    def add_tensor(self, tensor: torch.Tensor, paths: Iterable[str]) -> None:
        """A tensor that was added."""
        self._all_tensors().setdefault(id(tensor), []).extend((tensor, path) for path in paths)

    def add_module(self, path: str, module: nn.Module) -> None:
        """A submodule that was added at `path`, with all below it."""
        if self._tensors is not None:
            for name, tensor in (*module.named_parameters(path), *module.named_buffers(path)):
                self._tensors.setdefault(id(tensor), []).append((tensor, name))
        if self._modules is not None:
            for name, found in module.named_modules(remove_duplicate=False):
                self._modules.setdefault(id(found), []).append(f"{path}.{name}" if name else path)

    def forget_module(self, removed: nn.Module, gone: list[str]) -> None:
        """Strike the paths `gone`, at which `removed` stood, and all below them."""
        for name, module in removed.named_modules(remove_duplicate=False):
            _strike(self._modules, module, {f"{path}.{name}" if name else path for path in gone})
        for name, tensor in _named_tensors(removed):
            _strike(self._tensors, tensor, {(tensor, f"{path}.{name}") for path in gone})

    def refresh(self) -> None:
        """Look everything up again when it is next asked for."""
        self._modules = self._tensors = None

    def _all_modules(self) -> dict[int, list[str]]:
        if self._modules is None:
            self._modules = {}
            for path, module in self.root.named_modules(remove_duplicate=False):
                self._modules.setdefault(id(module), []).append(path)
        return self._modules

    def _all_tensors(self) -> dict[int, list[tuple[torch.Tensor, str]]]:
        if self._tensors is None:
            self._tensors = {}
            for path, tensor in _named_tensors(self.root):
                self._tensors.setdefault(id(tensor), []).append((tensor, path))
        return self._tensors


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _strike(lists: dict[int, list[Any]] | None, key: object, gone: set[Any]) -> None:
    """Take out of `key`'s list what is gone; an empty list goes too, as the id may be another object's soon."""
    if lists is None or id(key) not in lists:
        return
    lists[id(key)] = [item for item in lists[id(key)] if item not in gone]
    if not lists[id(key)]:
        del lists[id(key)]
