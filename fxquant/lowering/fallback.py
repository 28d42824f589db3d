"""Operations that the table does not know: exported by torch.onnx as a model of one node, inlined under its name."""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxquant.errors import ExportError
from fxquant.graph.program import ValueType, describe, value_type
from fxquant.lowering.writer import GraphWriter
from fxquant.ops.base import Emitted

SMALLEST_EXAMPLE_SIZE = 4  # torch.export makes constants of sizes 0 and 1
REGISTER = (
    "Register the operation: fxquant.ops.table.TABLE.register(OpDef(name, targets=({target},), role=Role.FLOAT, "
    "emit=...)); ARCHITECTURE.md, 'Adding an operation', has an example."
)


def emit_unknown(node: fx.Node, writer: Any) -> Emitted:
    """Emit `node` through torch.onnx; ExportError says how to register the operation where that fails."""
    assert isinstance(writer, GraphWriter)
    inputs = _runtime_inputs(node, writer)
    model = _export(node, inputs, writer)
    values = _values_of(inputs, writer)
    outputs = _inline(model, values, node, writer)
    several = isinstance(node.meta.get("type"), tuple)
    return tuple(outputs) if several else outputs[0]


def _runtime_inputs(node: fx.Node, writer: GraphWriter) -> list[fx.Node]:
    """What the node reads that is not known before the model runs."""
    return [source for source in node.all_input_nodes if not writer.constants.is_constant(source)]


def _values_of(inputs: list[fx.Node], writer: GraphWriter) -> list[ir.Value]:
    """The ONNX values of the inputs; a size is handed over as the length of a tensor."""
    found = []
    for source in inputs:
        value = writer.value(source)
        if value_type(source) is None:
            zero = ir.tensor(np.zeros(1, np.int64))
            node = ir.Node("", "ConstantOfShape", [value], [ir.AttrTensor("value", zero)])
            writer.append(node)
            value = node.outputs[0]
        found.append(value)
    return found


class _OneNode(nn.Module):
    """Calls one node's target; constants are buffers, sizes are lengths of tensors, tensors are inputs."""

    def __init__(self, node: fx.Node, inputs: list[fx.Node], writer: GraphWriter) -> None:
        super().__init__()
        self.call = copy.deepcopy(writer.program.submodule(node)) if node.op == "call_module" else None
        self.target = node.target
        self.is_size = [value_type(source) is None for source in inputs]
        positions = {source: index for index, source in enumerate(inputs)}
        for index, source in enumerate(node.all_input_nodes):
            if source not in positions:
                self.register_buffer(f"constant_{index}", writer.constants.tensor(source).clone())
                positions[source] = -1 - index
        self.arguments = pytree.tree_map_only(fx.Node, lambda leaf: _Slot(positions[leaf]), (node.args, node.kwargs))

    def forward(self, *inputs: torch.Tensor) -> Any:
        def fill(slot: _Slot) -> Any:
            if slot.position < 0:
                return getattr(self, f"constant_{-1 - slot.position}")
            given = inputs[slot.position]
            return given.shape[0] if self.is_size[slot.position] else given

        args, kwargs = pytree.tree_map_only(_Slot, fill, self.arguments)
        result = self.call(*args, **kwargs) if self.call is not None else self.target(*args, **kwargs)  # type: ignore[operator]
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)


class _Slot:
    def __init__(self, position: int) -> None:
        self.position = position


def _export(node: fx.Node, inputs: list[fx.Node], writer: GraphWriter) -> ir.Model:
    if not _is_tensor_valued(node):
        raise _unknown(node, "its result is not a tensor")
    try:
        sizes = _example_sizes(inputs)
        examples = [_example(source, sizes) for source in inputs]
        shapes = [_dynamic_axes(source) for source in inputs]
        module = _OneNode(node, inputs, writer).eval()
        with _quiet():
            exported = torch.onnx.export(
                module,
                tuple(examples),
                dynamo=True,
                opset_version=writer.opset,
                dynamic_shapes={"inputs": tuple(shapes)},
                verbose=False,
            )
        assert exported is not None
        model = exported.model
        common.InlinePass()(model)
    except Exception as err:
        raise _unknown(node, f"torch.onnx: {_innermost(err)}") from err
    if model.opset_imports.get("") != writer.opset:
        got = f"opset {model.opset_imports.get('')}, where the export is at opset {writer.opset}"
        raise _unknown(node, f"torch.onnx wrote {got}; opset 18 or later may do")
    return model


def _inline(model: ir.Model, values: list[ir.Value], node: fx.Node, writer: GraphWriter) -> list[ir.Value]:
    """Move the nodes and initializers of `model` into the writer's graph; returns the values of its outputs."""
    graph = model.graph
    swap: dict[ir.Value, ir.Value] = {}
    if len(graph.inputs) != len(values):
        raise _unknown(node, f"torch.onnx wrote {len(graph.inputs)} inputs where {len(values)} are read")
    for theirs, ours in zip(graph.inputs, values, strict=True):
        swap[theirs] = ours
    for name, theirs in graph.initializers.items():
        assert theirs.const_value is not None
        swap[theirs] = writer.initializer(f"{node.name}.{name}", theirs.const_value)
    outputs = [swap.get(value, value) for value in graph.outputs]
    for theirs, ours in swap.items():
        theirs.replace_all_uses_with(ours, replace_graph_outputs=True)
    _prefix(graph, node.name, writer)
    graph.outputs.clear()
    for inner in list(graph):
        graph.remove(inner)
        writer.append(inner)
    for domain, opset in model.opset_imports.items():
        writer.opset_imports.setdefault(domain, opset)
    for value in outputs:
        _leave_unnamed(value, values)
    return outputs


def _prefix(graph: ir.Graph, name: str, writer: GraphWriter) -> None:
    """Prefix every name, subgraphs included; symbolic shapes are inferred anew, in the program's symbols."""
    for inner in ir.traversal.RecursiveGraphIterator(graph):
        inner.name = writer.fresh_node(f"{name}.{inner.name or inner.op_type.lower()}")
        inner.metadata_props.clear()
        for value in inner.outputs:
            if value.name != "":
                value.name = writer.fresh(f"{name}.{value.name or inner.op_type.lower()}")
            value.metadata_props.clear()
            if value.shape is not None and not value.shape.is_static():
                value.shape = None


def _leave_unnamed(value: ir.Value, given: list[ir.Value]) -> None:
    """The node's own value, and what computes it, take the FX node's name when the emission ends."""
    producer = value.producer()
    if producer is not None and value not in given:
        value.name, value.shape, producer.name = None, None, None


def _is_tensor_valued(node: fx.Node) -> bool:
    kinds = node.meta.get("type")
    return bool(kinds) and all(
        isinstance(kind, ValueType) for kind in (kinds if isinstance(kinds, tuple) else (kinds,))
    )


def _example(source: fx.Node, sizes: dict[str, int]) -> torch.Tensor:
    kind = value_type(source)
    if kind is None:
        return torch.zeros(SMALLEST_EXAMPLE_SIZE, dtype=torch.int64)
    shape = [size if isinstance(size, int) else evaluate(size, sizes) for size in kind.shape]
    return torch.zeros(shape, dtype=kind.dtype)


def _dynamic_axes(source: fx.Node) -> dict[int, Any]:
    kind = value_type(source)
    if kind is None:
        return {0: torch.export.Dim.DYNAMIC}
    return {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(kind.shape) if isinstance(size, str)}


def _example_sizes(inputs: list[fx.Node]) -> dict[str, int]:
    """A size for each symbol; the same for all, because a size node's value and a shape's may be equal."""
    symbols: set[str] = set()
    for source in inputs:
        kind = value_type(source)
        for size in kind.shape if kind is not None else ():
            if isinstance(size, str):
                symbols |= {part.id for part in ast.walk(ast.parse(size, mode="eval")) if isinstance(part, ast.Name)}
    return dict.fromkeys(symbols, SMALLEST_EXAMPLE_SIZE)


_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b),
}


def evaluate(expression: str, sizes: dict[str, int]) -> int:
    """The value of a symbolic size ("2*s0") when its symbols are `sizes`; ValueError if it is more than arithmetic."""
    return _evaluate(ast.parse(expression, mode="eval").body, sizes)


def _evaluate(part: ast.expr, sizes: dict[str, int]) -> int:
    if isinstance(part, ast.Constant) and isinstance(part.value, int):
        return part.value
    if isinstance(part, ast.Name) and part.id in sizes:
        return sizes[part.id]
    if isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.USub):
        return -_evaluate(part.operand, sizes)
    if isinstance(part, ast.BinOp) and type(part.op) in _OPERATORS:
        return _OPERATORS[type(part.op)](_evaluate(part.left, sizes), _evaluate(part.right, sizes))
    if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in _FUNCTIONS:
        return _FUNCTIONS[part.func.id](*(_evaluate(item, sizes) for item in part.args))
    raise ValueError(f"size '{ast.unparse(part)}' is not arithmetic on {sorted(sizes)}")


def _unknown(node: fx.Node, reason: str) -> ExportError:
    return ExportError(
        f"export: node '{node.name}' calls '{node.target}', which the operation table does not know",
        place=describe(node),
        expected="an operation of the table, or one that torch.onnx can export",
        got=reason,
        remedy=REGISTER.format(target=f"torch.ops.{node.target}" if node.op == "call_function" else node.target),
    )


def _innermost(err: BaseException) -> str:
    """The first line of the error that torch.onnx's others were raised from."""
    while err.__cause__ is not None:
        err = err.__cause__
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return f"{type(err).__name__}: {lines[0] if lines else ''}"[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx prints, logs and warns about itself; what it raises is reported."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
