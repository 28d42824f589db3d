"""What holds of every graph after every pass: the manager's lint."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxquant.errors import PassError
from fxquant.graph.program import Program, ValueType, describe
from fxquant.graph.snapshot import Snapshot
from fxquant.numerics.fake_quant import BiasFakeQuant, FakeQuant


def check_graph(program: Program, snapshot: Snapshot) -> None:
    """Raise PassError unless the graph, of which `snapshot` was just taken, is well formed.

    Every get_attr reads a tensor and every call_module calls a module of the program; tensor nodes say their type;
    each FakeQuant that several nodes call has one owner; a BiasFakeQuant names the two FakeQuants that its grid
    follows from; and torch.fx's own lint: definitions before uses, nodes of this graph only.
    """
    owners: dict[str, str] = {}
    for name, state in snapshot.nodes.items():
        node = state.node
        if node.op == "get_attr" and node.target not in snapshot.tensors:
            raise _fault(name, node, "the path of a parameter or buffer", f"'{node.target}', which is none")
        if node.op == "get_attr":
            _check_shape(node, snapshot.tensors[str(node.target)].tensor)
        if node.op == "call_module":
            if node.target not in snapshot.modules:
                raise _fault(name, node, "the path of a submodule", f"'{node.target}', which is none")
            _check_quantizer(program, node, owners)
        _check_type(node)
    try:
        program.graph.lint()
    except (RuntimeError, ValueError) as err:
        raise PassError("graph", expected="definitions before uses and nodes of one graph", got=str(err)) from err


def _fault(name: str, node: fx.Node, expected: str, got: str, remedy: str = "") -> PassError:
    err = PassError(f"node '{name}'", place=describe(node), expected=expected, got=got, remedy=remedy)
    err.node = name
    return err


def _check_quantizer(program: Program, node: fx.Node, owners: dict[str, str]) -> None:
    module = program.submodule(node)
    if isinstance(module, FakeQuant) and _observes(node):
        path = str(node.target)
        if path in owners:
            got = f"two: '{owners[path]}' and '{node.name}'"
            raise _fault(
                node.name, node, f"one owner of the range of '{path}'", got, "Call the others with observe=False."
            )
        owners[path] = node.name
    if isinstance(module, BiasFakeQuant):
        sources = list(node.args[1:])
        if len(sources) != 2 or not all(_calls_fake_quant(program, source) for source in sources):
            got = f"arguments {node.args}"
            raise _fault(node.name, node, "a bias, and the FakeQuant nodes of input and weight", got)


def _check_shape(node: fx.Node, tensor: torch.Tensor) -> None:
    found = node.meta.get("type")
    if isinstance(found, ValueType) and (found.shape, found.dtype) != (tuple(tensor.shape), tensor.dtype):
        got = f"{ValueType(tuple(tensor.shape), tensor.dtype)} in tensor '{node.target}'"
        raise _fault(node.name, node, str(found), got, "Set the node's type with rewriter.set_type.")


def _observes(node: fx.Node) -> bool:
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("observe", True)
    return bool(given)


def _calls_fake_quant(program: Program, node: Any) -> bool:
    return isinstance(node, fx.Node) and program.fake_quant(node) is not None


def _check_type(node: fx.Node) -> None:
    expected = _expected_type(node)
    found = node.meta.get("type")
    if expected is ValueType and not isinstance(found, ValueType):
        raise _fault(node.name, node, "meta 'type', a ValueType", str(found), "Pass `type` or `like` to the Rewriter.")
    is_tuple = isinstance(found, tuple) and all(isinstance(item, ValueType) for item in found)
    if expected is tuple and not is_tuple:
        raise _fault(node.name, node, "meta 'type', a tuple of ValueTypes", str(found), "Pass `type` to the Rewriter.")


def _expected_type(node: fx.Node) -> type | None:
    if node.op in ("get_attr", "call_module"):
        return ValueType
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    returns = [str(result.type) for result in node.target._schema.returns]
    if returns == ["Tensor"]:
        return ValueType
    if returns == ["List[Tensor]"] or len(returns) > 1 and set(returns) == {"Tensor"}:
        return tuple
    return None
