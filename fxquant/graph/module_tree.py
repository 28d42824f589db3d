"""The module tree of a program as plain values: which module and which tensor stands where, ties and shared modules
included.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxquant.errors import StorageError
from fxquant.graph.options import decode, encode
from fxquant.graph.program import Program
from fxquant.numerics.estimators import Estimator
from fxquant.numerics.fake_quant import BiasFakeQuant, FakeQuant, Mode
from fxquant.numerics.live_batch_norm import BatchNormRatio, BatchNormShift, LiveBatchNorm
from fxquant.numerics.synchronised_batch_norm import plain_kind
from fxquant.numerics.trained_ranges import TrainedRange
from fxquant.spec import QuantSpec

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, LiveBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_BATCH_NORM_OPTIONS = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_LEGAL_NAME = re.compile(r"[^'\"\\\n\r{}.]+")  # torch.fx writes paths into code


def describe_tree(program: Program) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """One record for each path to a submodule, parents first, and each distinct tensor by the first path it stands at.

        {"path": "bn1", "kind": "BatchNorm2d", "options": {...}, "training": false,
         "parameters": [["weight", "bn1.weight", true], ...], "buffers": [["running_mean", "bn1.running_mean", true],
         ...]}

    A parameter's third entry is requires_grad, a buffer's whether it is persistent. A module that stands at several
    paths is {"path": ..., "same_as": <the first one>}. Raises StorageError for a called module of a kind that a file
    cannot hold.
    """
    called = {node.target: node.name for node in program.graph.nodes if node.op == "call_module"}
    records: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    first_path: dict[int, str] = {}
    first_module: dict[int, str] = {}
    for path, module in program.module.named_modules(remove_duplicate=False):
        if id(module) in first_module:
            records.append({"path": path, "same_as": first_module[id(module)]})
            continue
        first_module[id(module)] = path
        kind, options = _kind_of(module, path, called.get(path))
        record = {"path": path, "kind": kind, "options": options, "training": module.training}
        record["parameters"] = [
            [name, _key(path, name, tensor, tensors, first_path), tensor is not None and tensor.requires_grad]
            for name, tensor in module._parameters.items()
        ]
        record["buffers"] = [
            [name, _key(path, name, tensor, tensors, first_path), name not in module._non_persistent_buffers_set]
            for name, tensor in module._buffers.items()
        ]
        records.append(record)
    return records, tensors


def build_tree(records: list[dict[str, Any]], tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The module tree that `describe_tree` described."""
    modules: dict[str, nn.Module] = {}
    parameters: dict[str, nn.Parameter] = {}
    for record in records:
        path = record["path"]
        owner_path, _, name = path.rpartition(".")
        if path and not _LEGAL_NAME.fullmatch(name):
            raise StorageError("module tree", expected="legal module names", got=repr(path))
        module = _module(record, modules, path)
        modules[path] = module
        if path:
            modules[owner_path]._modules[name] = module
        if "same_as" not in record:
            _fill(module, record, tensors, parameters)
    return modules[""]


def _kind_of(module: nn.Module, path: str, caller: str | None) -> tuple[str, dict[str, Any]]:
    kind = plain_kind(module)
    if kind in _BATCH_NORMS:
        return kind.__name__, {key: getattr(module, key) for key in _BATCH_NORM_OPTIONS}
    if kind in _DROPOUTS:
        return kind.__name__, {"p": module.p, "inplace": module.inplace}
    if isinstance(module, BatchNormRatio):
        return "BatchNormRatio", {"eps": module.eps}
    if isinstance(module, BatchNormShift):
        return "BatchNormShift", {}
    if isinstance(module, FakeQuant):
        quantizer = {
            "spec": encode(module.spec),
            "shape": list(module.scale.shape),
            "follows": module.follows,
            "mode": module.mode.value,
        }
        return "FakeQuant", quantizer
    if isinstance(module, BiasFakeQuant):
        return "BiasFakeQuant", {}
    if isinstance(module, (Estimator, TrainedRange)):
        return "part", {}
    if caller is not None:
        raise StorageError(
            f"module '{path}' cannot be saved",
            place=f"called by node '{caller}'",
            expected="batch norm, dropout, FakeQuant or BiasFakeQuant",
            got=kind.__name__,
            remedy="Register an operation and call that, so that the graph says what is computed.",
        )
    return "container", {}


def _key(
    path: str, name: str, tensor: torch.Tensor | None, tensors: dict[str, torch.Tensor], first_path: dict[int, str]
) -> str | None:
    if tensor is None:
        return None
    key = first_path.setdefault(id(tensor), f"{path}.{name}" if path else name)
    tensors[key] = tensor
    return key


def _module(record: dict[str, Any], modules: dict[str, nn.Module], path: str) -> nn.Module:
    if "same_as" in record:
        return modules[record["same_as"]]
    kind = record["kind"]
    if kind == "part":  # its owner, a FakeQuant, has made it
        owner_path, _, name = path.rpartition(".")
        return modules[owner_path].get_submodule(name)
    if kind not in _BUILDERS:
        raise StorageError(f"module '{path}'", expected=f"one of {', '.join(_BUILDERS)}", got=f"kind '{kind}'")
    return _BUILDERS[kind](record["options"])


def _fake_quant(options: dict[str, Any]) -> nn.Module:
    spec = decode(QuantSpec, options["spec"], "spec")
    module = FakeQuant(spec, tuple(options["shape"]), follows=options["follows"])
    module.mode = Mode(options["mode"])
    return module


def _builder(kind: type[nn.Module]) -> Callable[[dict[str, Any]], nn.Module]:
    return lambda options: kind(**options)


_BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "container": lambda _: nn.Module(),
    "FakeQuant": _fake_quant,
    "BiasFakeQuant": lambda _: BiasFakeQuant(),
    "BatchNormRatio": lambda options: BatchNormRatio(**options),
    "BatchNormShift": lambda _: BatchNormShift(),
    **{kind.__name__: _builder(kind) for kind in (*_BATCH_NORMS, *_DROPOUTS)},
}


def _fill(
    module: nn.Module, record: dict[str, Any], tensors: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter]
) -> None:
    """Put the tensors of a record into its module, in the saved order; a tied parameter is one object at all its
    paths.
    """
    module.training = record["training"]
    module._parameters.clear()
    module._buffers.clear()
    for name, key, requires_grad in record["parameters"]:
        if key is not None and key not in parameters:
            parameters[key] = nn.Parameter(tensors[key], requires_grad)
        module.register_parameter(_legal(name), None if key is None else parameters[key])
    for name, key, persistent in record["buffers"]:
        module.register_buffer(_legal(name), None if key is None else tensors[key], persistent)


def _legal(name: str) -> str:
    if not _LEGAL_NAME.fullmatch(name):
        raise StorageError("module tree", expected="legal tensor names", got=repr(name))
    return name
