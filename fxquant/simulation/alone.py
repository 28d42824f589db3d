"""Single operations in float, computed by onnxruntime: what it computes, as far as an operation alone tells.

Where an operation is rewritten together with its neighbours, or runs on another number of threads, it may round
otherwise in the whole file: so nothing is certified by this. All that it reads are inputs of the little model,
parameters too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx, nn

from fxquant.errors import FxquantError
from fxquant.graph.module import ProgramModule
from fxquant.graph.program import Program, value_type
from fxquant.lowering.lower import lower
from fxquant.numerics.runtime import Session
from fxquant.simulation.islands import DEFAULT_OPSET, open_kept


class Alone:
    """Sessions of single operations, one each, opened when first used.

    Arguments:
        opset: that of the file.
    """

    def __init__(self, opset: int = DEFAULT_OPSET) -> None:
        self._opset = opset
        self._sessions: dict[fx.Node, Session | None] = {}

    def compute(self, node: fx.Node, inputs: Mapping[fx.Node, Any], in_torch: Callable[[], Any]) -> Any:
        """What onnxruntime computes at `node`, or torch where the operation cannot be written alone.

        Arguments:
            inputs: the values that it reads.
            in_torch: computes it in torch.
        """
        if node not in self._sessions:
            self._sessions[node] = _session(node, self._opset)
        session = self._sessions[node]
        if session is None:
            return in_torch()
        arrays = (value.detach().cpu().numpy() for value in inputs.values())
        (found,) = session.run(dict(zip(_names(inputs), arrays, strict=True))).values()
        device = next(value.device for value in inputs.values())
        return torch.from_numpy(found.copy()).to(device)


def _names(inputs: Mapping[fx.Node, Any]) -> list[str]:
    return [f"x{index}" for index in range(len(inputs))]


def _session(node: fx.Node, opset: int) -> Session | None:
    """The session of one operation; None if it is no function, or ONNX cannot say it."""
    if not _is_function(node):
        return None
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for name, source in zip(_names(dict.fromkeys(node.all_input_nodes)), node.all_input_nodes, strict=True):
        copies[source] = graph.placeholder(name)
        copies[source].meta = dict(source.meta)
    copy = graph.node_copy(node, copies.__getitem__)
    graph.output(copy)
    try:
        model = lower(Program(ProgramModule(nn.Module(), graph), name="alone"), opset)
        return open_kept(ir.serde.serialize_model(model).SerializeToString())
    except FxquantError:
        return None


def _is_function(node: fx.Node) -> bool:
    """Whether an operation computes one tensor from tensors: no module, no random numbers, no new state, no sizes."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.all_input_nodes:
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable:
        return False
    return all(value_type(one) is not None for one in (node, *node.all_input_nodes))
