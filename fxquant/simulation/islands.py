"""Tables of islands: functions of one code, harvested from onnxruntime itself.

    y = T[x - qmin]     T[i] = clip(rint(f(g(f((i + qmin - z) s)) / s')) + z', qmin', qmax')
                        T[i] = g(f((i + qmin - z) s))                             where no quantizer is behind it

g is what onnxruntime makes of the island's nodes: they are lowered as they are in the file, and a session computes
them for the real values of all codes, 256 at most. Quantizing and dequantizing are exact (numerics/rounding.py), so
that the session knows no grid, and training that moves grids costs one run of 256 numbers. onnxruntime gives each
reader of a value a DequantizeLinear of its own, which some of its rewrites do not see through (a spelled-out GELU is
not fused): so each reader has an input of its own here, too.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import lru_cache

import onnx_ir as ir
import torch
from torch import fx, nn

from fxquant.graph.module import ProgramModule
from fxquant.graph.program import Program, ValueType, input_slots, value_type
from fxquant.lowering.lower import lower
from fxquant.numerics.codes import Codes, Grid
from fxquant.numerics.rounding import dequantize, fake_quantize, quantize
from fxquant.numerics.runtime import RuntimeOptions, Session, open_session
from fxquant.simulation.regions import Unary
from fxquant.simulation.tables import Table, look_up, look_up_codes

DEFAULT_OPSET = 21  # export_onnx's
_SESSIONS = 256  # kept open over all programs


Numbers = tuple[float, int, int, int]


@dataclass(frozen=True, eq=False)
class _Harvested:
    """A table, what it is of, and the numbers of the grids that it was made for."""

    function: Unary
    grids: tuple[Grid | None, ...]
    numbers: tuple[Numbers | None, ...]
    table: Table


class Harvest:
    """The tables of one program's islands, made when they are first used, and again where a grid has moved.

    Arguments:
        opset: that of the file: some operations are written otherwise before they were operators of ONNX.
    """

    def __init__(self, opset: int = DEFAULT_OPSET) -> None:
        self._opset = opset
        self._found: dict[fx.Node, _Harvested] = {}

    def look_up(self, function: Unary, source: Codes, out: Grid | None) -> Codes | torch.Tensor:
        """`function` at the codes `source`, on the grid `out` or in float32; the gradient is its nodes' in float."""
        found, grids = self._found.get(function.top), (source.grid, out)
        if found is None or found.function != function or any(map(operator.is_not, found.grids, grids)):
            found = self._found[function.top] = self._renewed(found, function, source.grid, out)
        return look_up(found.table, [source]) if out is None else look_up_codes(found.table, [source], out)

    def _renewed(self, found: _Harvested | None, function: Unary, grid: Grid, out: Grid | None) -> _Harvested:
        numbers = grid.numbers, None if out is None else out.numbers
        if found is not None and (found.function, found.numbers) == (function, numbers):
            if found.table.codes.device == grid.scale.device:
                return replace(found, grids=(grid, out))
        with torch.inference_mode(False):
            return _Harvested(function, (grid, out), numbers, harvest(function, grid, out, self._opset))


def harvest(function: Unary, grid: Grid, out: Grid | None, opset: int = DEFAULT_OPSET) -> Table:
    """The table of a function of codes on `grid`, with the derivative of fake quantization beside it.

    Arguments:
        out: the grid of its entries, which are centred codes; None: they are float32 values.
        opset: see Harvest.
    """
    program = function_program(function)
    session = open_kept(ir.serde.serialize_model(lower(program, opset)).SerializeToString())
    codes = torch.arange(grid.qmin, grid.qmax + 1, device=grid.scale.device)
    real = dequantize(codes, grid.scale, grid.zero_point)
    name = session.output_names[0]
    values = session.run(dict.fromkeys(session.input_names, real.detach().cpu().numpy()), [name])[name]
    value = torch.from_numpy(values.copy()).to(real.device)
    table = value
    if out is not None:
        table = (quantize(value, out.scale, out.zero_point, out.qmin, out.qmax) - out.zero_point).to(torch.float32)
    return Table(table, lambda: (_derivative(program, real, out),), lambda: value if out is None else value / out.scale)


def function_program(function: Unary) -> Program:
    """The function's nodes as a program: an input for each reader of the source; the result, and what is kept."""
    graph = fx.Graph()
    slots = [source for node in function.nodes for source in input_slots(node)]
    inputs = iter([_typed(graph.placeholder(f"x{i}"), torch.float32) for i in range(slots.count(function.source))])
    copies: dict[fx.Node, fx.Node] = {}
    for node in function.nodes:
        copy = graph.node_copy(node, lambda source: next(inputs) if source is function.source else copies[source])
        kind = value_type(node)
        assert kind is not None, node.format_node()
        copies[node] = _typed(copy, kind.dtype)
    graph.output(tuple(copies[node] for node in (function.nodes[-1], *function.kept)))
    return Program(ProgramModule(nn.Module(), graph), name="island")


def _typed(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    node.meta = {"type": ValueType(("n",), dtype), "module_path": "", "module_class": "", "source": ""}
    return node


def _derivative(program: Program, real: torch.Tensor, out: Grid | None) -> torch.Tensor:
    """By code, the derivative of the same nodes in float, then of fake quantization; zero if there is none."""
    count = len(program.graph.find_nodes(op="placeholder"))
    with torch.enable_grad():
        leaf = real.detach().clone().requires_grad_()
        value = program.module(*[leaf] * count)[0]
        if out is not None:
            value = fake_quantize(value, out.scale, out.zero_point, out.qmin, out.qmax)
        if not value.requires_grad:  # a comparison
            return torch.zeros_like(leaf)
        (found,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found


@lru_cache(maxsize=_SESSIONS)
def open_kept(model: bytes) -> Session:
    """A session on one thread for a small model's bytes, kept open for the next one who asks."""
    return open_session(model, RuntimeOptions(threads=1))
