"""Executor: runs a program on codes, kernel by kernel as the plan says, with one of two arithmetics.

Values are Codes where a quantizer (or an operation that only moves codes) wrote them, and tensors elsewhere; a float
operation that reads Codes gets their real values. Nothing is stored but what can be derived again: parameters, buffers
and FakeQuants are the module's own. Grids are snapshots of theirs: what a backward pass reads stays as it was in its
forward, whatever ran between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxquant.errors import FxquantError
from fxquant.graph.batches import flat_arguments
from fxquant.graph.constants import Constants
from fxquant.graph.liveness import last_uses
from fxquant.graph.program import Program
from fxquant.numerics.codes import Codes, Grid
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.numerics.live_batch_norm import LiveBatchNorm
from fxquant.numerics.precision import full_precision
from fxquant.ops.base import Role
from fxquant.ops.table import TABLE
from fxquant.simulation.facts import is_on, source_of
from fxquant.simulation.plan import Plan, Site, Unary, read_plan


@dataclass(frozen=True, eq=False)
class Call:
    """One run of a site's kernel.

    Arguments:
        site: what runs.
        args: the operation's args, Codes in place of quantized nodes, values in place of others.
        out: the output's grid; None where the output is float32.
    """

    site: Site
    args: tuple[Any, ...]
    out: Grid | None


class Arithmetic(Protocol):
    """How codes are computed."""

    def quantize(self, real: torch.Tensor, grid: Grid) -> Codes:
        """Codes of real values."""

    def run(self, call: Call) -> Codes | torch.Tensor:
        """What a site's kernel writes: codes on its grid, or float32 where it has none."""

    def look_up(self, function: Unary, source: Codes, out: Grid | None) -> Codes | torch.Tensor:
        """A function of one code that onnxruntime computes in float: its codes, or float32 where it has no grid."""

    def compute(self, node: fx.Node, inputs: Mapping[fx.Node, Any], in_torch: Callable[[], Any]) -> Any:
        """An operation in float whose rounding in onnxruntime is not known; `in_torch` computes it in torch."""


class Executor:
    """Runs the graph of a program as it is now: a rewritten graph needs a new executor, new modes and grids do not."""

    def __init__(self, program: Program, arithmetic: Arithmetic) -> None:
        self.program = program
        self._arithmetic = arithmetic
        self._interpreter = fx.Interpreter(program.module, garbage_collect_values=False)
        self._nodes = [node for node in program.graph.nodes if node.op != "output"]
        constants = Constants(program)
        self._weights = {node: fq for node, fq in program.fake_quant_nodes() if constants.is_constant(source_of(node))}
        self._activations = {node: fq for node, fq in program.fake_quant_nodes() if node not in self._weights}
        self._biases = dict(program.bias_nodes())
        self._live = [module for module in program.module.modules() if isinstance(module, LiveBatchNorm)]
        self._movers = {node for node in self._nodes if _moves(program, node)}
        self._key: tuple[Any, ...] = ()
        self._plan = Plan({}, {}, frozenset())
        self._grids: dict[fx.Node, Grid] = {}
        self._dead: dict[fx.Node, list[fx.Node]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the program's module returns for these arguments."""
        self._refuse_other_precisions()
        self._refuse_moving_averages()
        values: dict[fx.Node, Any] = {}
        with full_precision():
            for _ in self.steps(flat_arguments(self.program, args, kwargs), {}, values):
                pass
            returned = fx.node.map_arg(self.program.graph.output_node().args[0], lambda node: real_of(values[node]))
        return self.program.graph.process_outputs(returned)

    def steps(
        self, inputs: Mapping[str, Any], taught: Mapping[str, Codes], values: dict[fx.Node, Any]
    ) -> Iterator[tuple[fx.Node, Codes]]:
        """Compute node by node into `values`; yields each FakeQuant of an activation with its codes.

        Arguments:
            inputs: a value for each placeholder, by name.
            taught: by FakeQuant node, the codes that the nodes behind it are to read instead.
            values: dropped after their last use; those that the graph returns stay.
        """
        self._refresh()
        for node in self._nodes:
            if node in self._plan.hidden:
                continue
            values[node] = inputs[node.name] if node.op == "placeholder" else self._compute(node, values)
            if node in self._grids:
                computed = values[node]
                values[node] = _taught(taught.get(node.name), computed)
                yield node, computed
            for used in self._dead.get(node, ()):
                values.pop(used, None)

    def _refresh(self) -> None:
        """Read the plan again where modes, or grids of activations, are not what they were."""
        for module in self._activations.values():
            module.sync()
        weights = (fq.mode for fq in self._weights.values())
        key = (*map(_state, self._activations.values()), *weights, *(norm.training for norm in self._live))
        if key == self._key:
            return
        self._plan = read_plan(self.program)
        snapshots = {id(fq): fq.grid.snapshot() for fq in self._activations.values() if is_on(fq)}
        self._grids = {node: snapshots[id(fq)] for node, fq in self._activations.items() if is_on(fq)}
        shown = [node for node in self._nodes if node not in self._plan.hidden]
        self._dead = last_uses(shown, set(self.program.graph.output_node().all_input_nodes), self._plan.reads)
        self._key = key

    def _refuse_other_precisions(self) -> None:
        for name, parameter in self.program.module.named_parameters():
            if parameter.is_floating_point() and parameter.dtype is not torch.float32:
                raise FxquantError(
                    f"parameter '{name}'",
                    expected="torch.float32",
                    got=str(parameter.dtype),
                    remedy="Codes are computed in float32: undo program.module.half() or .double().",
                )

    def _refuse_moving_averages(self) -> None:
        """A kernel gives codes on the grid that is there: what a moving average is to see, it does not keep."""
        for node, module in self._activations.items():
            if module.mode is Mode.TRACK and module.training:
                raise FxquantError(
                    f"moving average of '{source_of(node).name}'",
                    expected="program.simulate = 'float' while the module is in training mode",
                    got="a simulation on codes, in which moving averages would stand still",
                    remedy="Train in 'float' and evaluate (eval()) in any simulation, freeze the encodings, or train "
                    "with static or learned ranges.",
                )

    def _compute(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        site = self._plan.sites.get(node)
        if site is not None:
            args = fx.node.map_arg(site.operation.args, values.__getitem__)
            return self._arithmetic.run(Call(site, args, self._grids.get(node)))
        if node in self._plan.tables:
            function = self._plan.tables[node]
            out = None if function.end is None else self._grids[function.end]
            return self._arithmetic.look_up(function, values[function.source], out)
        if node in self._grids:
            return self._quantize(values[source_of(node)], self._grids[node])
        if node in self._weights and is_on(self._weights[node]):
            module, weight = self._weights[node], real_of(values[source_of(node)])
            module.refresh(weight)
            return self._arithmetic.quantize(weight, module.grid.snapshot())
        if node in self._biases and all(map(is_on, self._biases[node].sources)):
            return self._arithmetic.quantize(real_of(values[source_of(node)]), self._biases[node].grid)
        if (
            node in self._movers
            and isinstance(first := values.get(source_of(node)), Codes)
            and first.grid.scale.ndim == 0
        ):
            return self._move(node, first.grid, values)
        if node in self._plan.unknown:
            inputs = {source: real_of(values[source]) for source in node.all_input_nodes}
            return self._arithmetic.compute(node, inputs, lambda: self._call(node, real_of, values))
        return self._call(node, real_of, values)

    def _quantize(self, value: Any, grid: Grid) -> Codes:
        """Codes of a value that is codes already, of the same grid or another, or real."""
        if isinstance(value, Codes) and value.grid.same_as(grid):
            return Codes(value.centred, grid)
        return self._arithmetic.quantize(real_of(value), grid)

    def _move(self, node: fx.Node, grid: Grid, values: Mapping[fx.Node, Any]) -> Any:
        """An operation whose output codes are input codes, on centred codes; other outputs (indices) as they are."""
        moved = self._call(node, lambda value: value.centred if isinstance(value, Codes) else value, values)
        return pytree.tree_map_only(torch.Tensor, lambda t: Codes(t, grid) if t.is_floating_point() else t, moved)

    def _call(self, node: fx.Node, convert: Callable[[Any], Any], values: Mapping[fx.Node, Any]) -> Any:
        def read(source: fx.Node) -> Any:
            return pytree.tree_map(convert, values[source])

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), read)
        return getattr(self._interpreter, node.op)(node.target, args, kwargs)


def _taught(codes: Codes | None, computed: Codes) -> Codes:
    """What a quantizer is taught; a file that computes another shape cannot teach what follows."""
    return computed if codes is None or codes.centred.shape != computed.centred.shape else codes


def real_of(value: Any) -> Any:
    """A value with real numbers in place of Codes."""
    return pytree.tree_map_only(Codes, Codes.real, value)


def _state(module: FakeQuant) -> tuple[Any, ...]:
    """What the plan and the grids depend on: a grid's numbers; on a GPU, where reading them waits, who wrote them.

    A write through `.data` has no author: there it is seen only once something else of the program changes.
    """
    if not is_on(module):
        return (module.mode,)
    scale, zero_point = module.scale, module.zero_point
    if scale.device.type == "cpu" or scale.is_inference() or zero_point.is_inference():
        return module.mode, scale.device, scale.dtype, scale.tolist(), zero_point.tolist()
    return module.mode, id(scale), scale._version, id(zero_point), zero_point._version


def _moves(program: Program, node: fx.Node) -> bool:
    """Whether a node only moves codes; a module may do so in eval mode only (dropout), and is not counted."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    definition = TABLE.find(node)
    return definition is not None and definition.role_for(node) is Role.GRID_PRESERVING
