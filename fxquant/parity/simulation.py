"""The simulations that parity can compare with: what they must offer, the float one, and those on codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from fxquant.errors import ParityError, nearest
from fxquant.graph.liveness import last_uses
from fxquant.graph.program import Program
from fxquant.numerics.codes import Codes, Grid, codes_from_integers
from fxquant.numerics.precision import full_precision
from fxquant.numerics.rounding import dequantize
from fxquant.parity.segments import SegmentReader
from fxquant.simulation.accumulate import Strategy
from fxquant.simulation.exact import ExactArithmetic
from fxquant.simulation.executor import Arithmetic, Executor, real_of
from fxquant.simulation.integer import IntegerArithmetic
from fxquant.simulation.islands import DEFAULT_OPSET
from fxquant.spec import PER_TENSOR


@dataclass(frozen=True, eq=False)
class RuntimeCodes:
    """What onnxruntime computed at a quantizer: integer codes, on the grid (broadcastable) that the file gives them."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def real(self) -> torch.Tensor:
        """Real values (float32), as the file's DequantizeLinear computes them."""
        return dequantize(self.codes, self.scale, self.zero_point)


@dataclass(frozen=True, eq=False)
class Step:
    """What a simulation computed: int32 codes at an activation's FakeQuant node, or the value of a returned node."""

    node: fx.Node
    value: torch.Tensor
    is_output: bool


class Simulation(Protocol):
    """A way of computing what a program's integers are."""

    @property
    def name(self) -> str:
        """Name that a user asks for it by."""

    def run(self, program: Program, inputs: Mapping[str, Any], teacher: Mapping[str, RuntimeCodes]) -> Iterator[Step]:
        """Codes at every activation's FakeQuant in graph order, then the values that the graph returns.

        Arguments:
            inputs: a value for each placeholder, by name.
            teacher: by FakeQuant node, what the nodes behind it are to read instead of what was simulated. Empty: the
                simulation runs freely. Full: each step depends on its own segment alone.
        """


class FloatSimulation:
    """Fake quantization in float32, int32 biases: what `program.module` computes in eval mode."""

    name = "float"

    def run(self, program: Program, inputs: Mapping[str, Any], teacher: Mapping[str, RuntimeCodes]) -> Iterator[Step]:
        """See Simulation.run; values are dropped after their last use."""
        returned = program.graph.output_node().all_input_nodes
        evaluation = Evaluation(program, inputs, teacher)
        for node, codes in evaluation.run(list(program.graph.nodes), keep=returned):
            if codes is not None:
                yield Step(node, codes, is_output=False)
        for node in returned:
            value = evaluation.values[node]
            yield Step(node, value if isinstance(value, torch.Tensor) else torch.tensor([value]), is_output=True)


class CodeSimulation:
    """A simulation on codes: the kernels that the plan expects onnxruntime to run.

    Arguments:
        arithmetic: makes one, for a file of a given opset.

    `strategies` has, by operation, how the last run added up its products (float32, in parts, float64); empty on int64.
    """

    def __init__(self, name: str, arithmetic: Callable[[int], Arithmetic], opset: int = DEFAULT_OPSET) -> None:
        self.name = name
        self._arithmetic = arithmetic
        self._opset = opset
        self.strategies: Mapping[str, Strategy] = {}

    def for_opset(self, opset: int) -> CodeSimulation:
        """The same, of a file of this opset."""
        return CodeSimulation(self.name, self._arithmetic, opset)

    def run(self, program: Program, inputs: Mapping[str, Any], teacher: Mapping[str, RuntimeCodes]) -> Iterator[Step]:
        """See Simulation.run."""
        arithmetic = self._arithmetic(self._opset)
        executor, values = Executor(program, arithmetic), dict[fx.Node, Any]()
        taught = {name: self._codes(program, name, codes) for name, codes in teacher.items()}
        with torch.no_grad(), full_precision():
            for node, codes in executor.steps(inputs, taught, values):
                yield Step(node, codes.integers.to(torch.int32), is_output=False)
        if isinstance(arithmetic, ExactArithmetic):
            self.strategies = dict(arithmetic.accumulator.strategies)
        for node in program.graph.output_node().all_input_nodes:
            value = real_of(values[node])
            yield Step(node, value if isinstance(value, torch.Tensor) else torch.tensor([value]), is_output=True)

    @staticmethod
    def _codes(program: Program, name: str, codes: RuntimeCodes) -> Codes:
        module = program.fake_quant(program.node(name))
        assert module is not None
        granularity = module.spec.granularity if codes.scale.ndim else PER_TENSOR
        grid = Grid(codes.scale, codes.zero_point.to(torch.int64), module.spec.qmin, module.spec.qmax, granularity)
        # Kernels and tables know no other codes: a file that gives some is at fault where it does (grids.outside_grid).
        return codes_from_integers(codes.codes.clamp(grid.qmin, grid.qmax), grid)


class Evaluation:
    """Computes nodes of a program on given inputs, with onnxruntime's codes in place of its own where given."""

    def __init__(self, program: Program, inputs: Mapping[str, Any], teacher: Mapping[str, RuntimeCodes]) -> None:
        self.values: dict[fx.Node, Any] = {}
        self._program = program
        self._inputs = inputs
        self._teacher = teacher
        self._reader = SegmentReader(program)
        self._interpreter = fx.Interpreter(program.module, garbage_collect_values=False)
        self._interpreter.env = self.values

    def run(self, nodes: list[fx.Node], keep: list[fx.Node]) -> Iterator[tuple[fx.Node, torch.Tensor | None]]:
        """Compute `nodes` (closed under their inputs, in graph order); yields each with its codes if it is a quantizer.

        Values are dropped after their last use, unless they are to be kept.
        """
        dead = last_uses([node for node in nodes if node.op != "output"], set(keep))
        with torch.no_grad():
            for node in nodes:
                codes = self._compute(node)
                yield node, codes
                for used in dead.get(node, ()):
                    del self.values[used]

    def _compute(self, node: fx.Node) -> torch.Tensor | None:
        if node.op == "output":
            return None
        if node.op == "placeholder":
            self.values[node] = self._inputs[node.name]
            return None
        if not self._reader.is_activation_quantizer(node):
            self.values[node] = self._interpreter.run_node(node)
            return None
        module, source = self._program.fake_quant(node), node.args[0]
        assert module is not None and isinstance(source, fx.Node)
        codes = module.codes(self.values[source])
        self.values[node] = self._taught(node, codes)
        return codes

    def _taught(self, node: fx.Node, codes: torch.Tensor) -> Any:
        taught = self._teacher.get(node.name)
        # A file that computes another shape cannot teach what follows; the difference is counted at this node.
        if taught is None or taught.codes.shape != codes.shape:
            return self._interpreter.run_node(node)
        return taught.real()


SIMULATIONS: dict[str, Simulation] = {
    FloatSimulation.name: FloatSimulation(),
    "exact": CodeSimulation("exact", ExactArithmetic),
    "integer": CodeSimulation("integer", IntegerArithmetic),
}


def find_simulation(name: str, opset: int) -> Simulation:
    """The simulation called `name` of a file of this opset; an unknown name is a ParityError that lists the known."""
    if name not in SIMULATIONS:
        raise ParityError(f"simulation '{name}' is unknown", remedy=nearest(name, SIMULATIONS))
    found = SIMULATIONS[name]
    return found.for_opset(opset) if isinstance(found, CodeSimulation) else found
