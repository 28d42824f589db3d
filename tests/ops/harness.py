"""assert_emits_like_torch: an operation's ONNX form computes in onnxruntime (no optimisations) what torch computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxquant.graph.module import ProgramModule, copy_graph
from fxquant.graph.program import Program, ValueType
from fxquant.lowering.lower import lower
from fxquant.numerics.runtime import Level, RuntimeOptions, open_session

aten = torch.ops.aten
Function = Callable[..., Any]


def assert_emits_like_torch(
    function: Function | nn.Module,
    example_inputs: Sequence[Any],
    *,
    opset: int = 21,
    atol: float = 1e-6,
    rtol: float = 1e-5,
    dynamic: bool | Sequence[bool] = True,
    batches: Sequence[int] = (3, 5),
    only: str | None = None,
) -> ir.Model:
    """Lower `function`, run it at the example's batch and at `batches`, compare with torch; returns the model.

    Arguments:
        function: an nn.Module (its parameters become initializers) or a function of tensors. Call the exact overload
            (`torch.ops.aten.relu.default(x)`) to test one spelling.
        example_inputs: its positional inputs; tensors are graph inputs, everything else is baked in. Use a batch of at
            least 2.
        opset: ONNX opset to lower at.
        atol, rtol: tolerances of float outputs; integers and booleans, dtypes and shapes must be equal.
        dynamic: True: axis 0 of every input whose axis 0 equals the first one's is the batch; False: none; or a flag an
            input.
        batches: the other batch sizes to run at.
        only: an ONNX operator type that must be in the model.
    """
    module = function if isinstance(function, nn.Module) else _Call(function)
    batched = _batched(example_inputs, dynamic)
    program = capture_for_test(module.eval(), example_inputs, batched)
    model = lower(program, opset)
    if only is not None:
        found = [node.op_type for node in model.graph]
        assert only in found, f"no {only} among {found}"
    sizes = [len(example_inputs[batched.index(True)]), *batches] if any(batched) else [0]
    for size in sizes:
        inputs = [_resize(x, size) if flag else x for x, flag in zip(example_inputs, batched, strict=True)]
        compare(module, model, inputs, atol=atol, rtol=rtol)
    return model


def compare(module: nn.Module, model: ir.Model, inputs: Sequence[Any], *, atol: float, rtol: float) -> None:
    """Run both on `inputs` and compare every output."""
    with torch.no_grad():
        expected = [leaf for leaf in pytree.tree_leaves(module(*_clone(inputs))) if leaf is not None]
    actual = run_onnx(model, [x for x in inputs if isinstance(x, torch.Tensor)])
    assert len(actual) == len(expected), f"{len(actual)} outputs, torch gives {len(expected)}"
    for index, (got, want) in enumerate(zip(actual, expected, strict=True)):
        array = want.detach().numpy() if isinstance(want, torch.Tensor) else np.array([want])
        assert got.dtype == array.dtype, f"output {index}: dtype {got.dtype}, torch gives {array.dtype}"
        assert got.shape == array.shape, f"output {index}: shape {got.shape}, torch gives {array.shape}"
        is_float = array.dtype.kind == "f"
        np.testing.assert_allclose(
            got, array, rtol=rtol if is_float else 0, atol=atol if is_float else 0, err_msg=f"output {index}"
        )


def run_onnx(model: ir.Model, inputs: Sequence[torch.Tensor], level: Level = Level.DISABLED) -> list[Any]:
    """Outputs of onnxruntime (CPU, one thread), with optimisations off unless asked for."""
    session = open_session(ir.serde.serialize_model(model).SerializeToString(), RuntimeOptions(level, threads=1))
    names = session.input_names
    assert len(names) == len(inputs), f"the model has inputs {names}, {len(inputs)} tensors were given"
    feed = {name: tensor.detach().numpy() for name, tensor in zip(names, inputs, strict=True)}
    return list(session.run(feed).values())


def capture_for_test(module: nn.Module, example_inputs: Sequence[Any], batched: Sequence[bool]) -> Program:
    """A program with the graph that torch.export gives, in the spelling of the normal form where that matters.

    Smaller than fxquant.capture on purpose: it keeps the overload that the test calls, and does not fold no-ops.
    """
    shapes = tuple({0: torch.export.Dim.DYNAMIC} if flag else None for flag in batched)
    exported = torch.export.export(module, tuple(example_inputs), dynamic_shapes=_shapes(module, shapes), strict=False)
    graph_module = exported.module(check_guards=False)
    assert isinstance(graph_module, GraphModule)
    _normalize(graph_module)
    program_module = ProgramModule(graph_module, copy_graph(graph_module.graph))
    return Program(program_module, name="test")


def _shapes(module: nn.Module, shapes: tuple[Any, ...]) -> Any:
    return (shapes,) if isinstance(module, _Call) else shapes


class _Call(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def _batched(inputs: Sequence[Any], dynamic: bool | Sequence[bool]) -> list[bool]:
    if not isinstance(dynamic, bool):
        return list(dynamic)
    tensors = [x for x in inputs if isinstance(x, torch.Tensor) and x.ndim]
    batch = len(tensors[0]) if tensors else None
    return [dynamic and isinstance(x, torch.Tensor) and x.ndim > 0 and len(x) == batch for x in inputs]


def _resize(x: torch.Tensor, size: int) -> torch.Tensor:
    return x[torch.arange(size) % len(x)]


def _clone(inputs: Sequence[Any]) -> list[Any]:
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]


def _normalize(module: GraphModule) -> None:
    """Convolutions as aten.convolution, metadata as fxquant's; guards and assertions erased."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" or "assert" in str(node.target):
            graph.erase_node(node)
        elif node.target in _CONVOLUTIONS:
            _rewrite_convolution(node, _CONVOLUTIONS[node.target])
    graph.eliminate_dead_code()
    for node in graph.nodes:
        value = node.meta.get("val")
        node.meta = {"module_path": "", "module_class": "", "source": ""}
        kind = _types(value)
        if node.op == "get_attr":
            tensor = pytree.tree_leaves(_attribute(module, str(node.target)))[0]
            kind = ValueType(tuple(tensor.shape), tensor.dtype)
        if kind is not None:
            node.meta["type"] = kind
    module.recompile()


_CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}


def _rewrite_convolution(node: Any, axes: int) -> None:
    x, weight, *rest = node.args
    defaults = [None, [1] * axes, [0] * axes, [1] * axes, 1]
    bias, stride, padding, dilation, groups = rest + defaults[len(rest) :]
    full = [list(item) * axes if len(item) == 1 else list(item) for item in (stride, padding, dilation)]
    node.target = aten.convolution.default
    node.args = (x, weight, bias, *full, False, [0] * axes, groups)


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _types(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
        return ValueType(shape, value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(_types(item) for item in value)
    return None
