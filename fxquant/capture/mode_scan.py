"""Whether a model can compute otherwise in train mode, read from its code without running it.

Exporting a model a second time, in train mode, costs as much as the first; most models need not be. The answer errs
on one side: False only where every function that forward reaches was read and none asks for the mode.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

# torch's own modules that do more in train mode than capture restores (batch norm and dropout it does).
_MODE_AWARE = (
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
    nn.RReLU,
    nn.modules.instancenorm._InstanceNorm,
    nn.SyncBatchNorm,
)
_PLAIN = (int, float, complex, str, bytes, tuple, type(None), torch.dtype, torch.device, torch.Size, torch.Tensor)
_OUTSIDE = ("torch", "math", "operator", "typing", "builtins", "functools", "itertools", "collections")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


def may_depend_on_mode(model: nn.Module) -> bool:
    """Whether some module of `model` may compute otherwise in train mode, dropout and batch norm aside."""
    seen: set[Any] = set()
    return any(_module_may(module, seen) for module in model.modules())


def _module_may(module: nn.Module, seen: set[Any]) -> bool:
    if "forward" in vars(module) or any(vars(module).get(hooks) for hooks in _HOOKS):
        return True
    kind = type(module)
    if kind.__module__.startswith("torch.nn.modules."):
        return isinstance(module, _MODE_AWARE)
    if kind in seen:
        return False
    seen.add(kind)
    return _function_may(kind.forward, kind, seen)


def _function_may(found: Any, kind: type, seen: set[Any]) -> bool:
    """Whether a function, method or property of class `kind`, or what it calls, may ask for the mode."""
    if isinstance(found, property):
        return _function_may(found.fget, kind, seen)
    if isinstance(found, (staticmethod, classmethod)):
        found = found.__func__
    if isinstance(found, BuiltinFunctionType):
        return False
    if not isinstance(found, FunctionType):
        return True
    if found in seen or _is_outside(found.__module__):
        return False
    seen.add(found)
    cells = [cell.cell_contents for cell in found.__closure__ or ()]
    if any(_object_may(cell, kind, seen) for cell in cells if cell is not kind):
        return True
    return any(_name_may(name, found, kind, seen) for name in _names(found.__code__))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _name_may(name: str, found: FunctionType, kind: type, seen: set[Any]) -> bool:
    """Whether a name in a function's code, global or attribute, leads to the mode."""
    if name == "training":
        return True
    own = inspect.getattr_static(kind, name, None)
    if own is not None and not hasattr(nn.Module, name) and _function_may(own, kind, seen):
        return True
    if name in found.__globals__:
        return _object_may(found.__globals__[name], kind, seen)
    return False


def _object_may(item: Any, kind: type, seen: set[Any]) -> bool:
    if isinstance(item, ModuleType):
        return not _is_outside(item.__name__)
    if isinstance(item, type):
        return not (issubclass(item, nn.Module) or _is_outside(item.__module__) or item.__module__ == "builtins")
    if isinstance(item, _PLAIN) or any(item is known for known in vars(builtins).values()):
        return False
    if _is_outside(getattr(item, "__module__", None) or ""):
        return False
    return _function_may(item, kind, seen)


def _is_outside(module: str | None) -> bool:
    return module is not None and module.split(".")[0] in _OUTSIDE
