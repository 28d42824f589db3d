"""What is promised of each tensor: certified and exact, a float island, or uncertified, and why.

    certified      the plan names an integer kernel, onnxruntime ran it, and its certificate holds here; or only codes
                   were moved, or the arithmetic between two quantizers is known bit for bit
    float island   computed in float between DequantizeLinear and QuantizeLinear, not bit for bit as torch computes it
    uncertified    onnxruntime ran something else than the plan expects, or the kernel's certificate does not hold

A tensor that is certified must agree in every code, when each side reads the same codes in front of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from torch import fx

from fxquant.graph.program import Program
from fxquant.numerics.runtime import RuntimeOptions
from fxquant.ops.base import FloatForm, OpDef, Role
from fxquant.ops.table import TABLE
from fxquant.parity.optimised import Fusion, KernelKind, NodeKernel
from fxquant.parity.segments import Segment
from fxquant.simulation.certification import CERTIFIED_ON, certificate
from fxquant.simulation.plan import Island, Plan, Site, read_plan

BIT_EXACT = frozenset({"exact", "integer"})  # the simulations that promise every code of a certified tensor
QUANTIZE = "QuantizeLinear"
INTEGER_OPERATORS = frozenset(CERTIFIED_ON) | {"MatMulIntegerToFloat"}
_MOVING = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


class Standing(Enum):
    """How far the codes of a tensor are promised."""

    CERTIFIED = "certified"
    ISLAND = "float island"
    UNCERTIFIED = "uncertified"


_ORDER = (Standing.CERTIFIED, Standing.ISLAND, Standing.UNCERTIFIED)


@dataclass(frozen=True)
class Certification:
    """What is promised of a tensor, or of a node.

    Arguments:
        standing: how far.
        kernel: onnxruntime's operator whose certificate that is; "" without any.
        reason: why it is not certified; of what is certified, what makes it exact.
    """

    standing: Standing
    kernel: str = ""
    reason: str = ""

    @property
    def is_certified(self) -> bool:
        """Whether no code may differ."""
        return self.standing is Standing.CERTIFIED

    def __str__(self) -> str:
        if self.is_certified:
            return "certified and exact"
        return f"{self.standing.value} ({self.reason})" if self.reason else self.standing.value

    def to_dict(self) -> dict[str, str]:
        """The fields as plain values."""
        return {"standing": self.standing.value, "kernel": self.kernel, "reason": self.reason}


@dataclass(frozen=True)
class NodeCertification:
    """What is promised of one FX node."""

    node: str
    certification: Certification

    def __str__(self) -> str:
        return f"{self.node}: {self.certification}"

    def to_dict(self) -> dict[str, str]:
        """The fields as plain values."""
        return {"node": self.node, **self.certification.to_dict()}


class Certifier:
    """Says of segments and nodes what is promised, from the plan, the graph that ran and the kernels' certificates."""

    def __init__(self, program: Program, fusion: Fusion, options: RuntimeOptions, simulation: str) -> None:
        self._program = program
        self._fusion = fusion
        self._options = options
        self._simulation = simulation
        self._plan = read_plan(program) if simulation in BIT_EXACT else Plan({}, {}, frozenset())

    def of_segments(self, segments: Iterable[Segment]) -> dict[Segment, Certification]:
        """What is promised of each compared tensor."""
        return {segment: self._segment(segment) for segment in segments}

    def of_nodes(self, found: dict[Segment, Certification]) -> tuple[NodeCertification, ...]:
        """What is promised of each node that computes real values: the least of the tensors that it serves."""
        standings: dict[str, Certification] = {}
        for segment, certification in found.items():
            for node in segment.nodes:
                own = _MOVES if self._moves(node) and self._simulation in BIT_EXACT else certification
                standings[node.name] = _least([own, standings.get(node.name, own)])
        names = [kernel.node for kernel in self._fusion.nodes]
        return tuple(NodeCertification(name, standings[name]) for name in names if name in standings)

    def site_of(self, segment: Segment) -> Site | None:
        """The site that computes a segment; None where it is not one integer kernel, and moves in front of it."""
        if not segment.output:
            return self._plan.sites.get(segment.end)
        computing = [node for node in segment.nodes if not self._moves(node)]
        site = self._plan.sites.get(computing[0]) if len(computing) == 1 else None
        return site if site is not None and site.end is None else None

    def why_float(self) -> dict[str, str]:
        """By operation in front of a quantizer, why the plan leaves it in float; {} where nothing is fused at all."""
        if not self._options.level.fuses:
            return {}
        reasons = {self._operation(end).name: island.reason for end, island in self._plan.islands.items()}
        return {name: reason for name, reason in reasons.items() if reason}

    def _operation(self, end: fx.Node) -> fx.Node:
        """What the relus and clips in front of a quantizer read."""
        node = end.all_input_nodes[0]
        while (definition := self._definition(node)) is not None and definition.role_for(node) is Role.ACTIVATION:
            node = node.all_input_nodes[0]
        return node

    def _segment(self, segment: Segment) -> Certification:
        if self._simulation not in BIT_EXACT:
            return Certification(Standing.UNCERTIFIED, reason=f"the {self._simulation} simulation promises no codes")
        site = self.site_of(segment)
        if site is not None:
            return self._site(site)
        if segment.output:
            return self._output(segment)
        island = self._plan.islands.get(segment.end)
        if island is None:
            return Certification(Standing.UNCERTIFIED, reason="the plan does not know it")
        return self._island(island)

    def _site(self, site: Site) -> Certification:
        ran = self._fusion.of(site.operation.name)
        expected = site.kernel.operator
        if ran is None or not _is_integer(ran):
            return Certification(Standing.UNCERTIFIED, expected, self._why_not_integer(site.operation.name))
        kernels = (expected, *(name for name in ran.kernels if name in CERTIFIED_ON))
        return _least([self._kernel(name) for name in dict.fromkeys(kernels)])

    def _why_not_integer(self, node: str) -> str:
        """Why a node with a site ran in float."""
        ran, level = self._fusion.of(node), self._options.level
        if not level.fuses:
            return f"onnxruntime ran it in float at level {level.value}"
        if ran is None:
            return "the file has no node of this name"
        if ran.kind is KernelKind.ABSORBED:
            return "onnxruntime absorbed it into another node"
        return f"onnxruntime ran {'+'.join(ran.kernels)}: {ran.reason}"

    def _kernel(self, operator: str) -> Certification:
        found = certificate(operator, self._options.config)
        standing = Standing.CERTIFIED if found.holds else Standing.UNCERTIFIED
        return Certification(standing, operator, found.reason)

    def _island(self, island: Island) -> Certification:
        for node in island.nodes:
            ran = self._fusion.of(node.name)
            integer = [name for name in ran.kernels if name in CERTIFIED_ON] if ran is not None else []
            if integer and not self._stays_on_grid(island):
                reason = "onnxruntime runs an integer kernel where the plan expects float"
                return Certification(Standing.UNCERTIFIED, integer[0], reason)
        if not island.kind.is_certified:
            return Certification(Standing.ISLAND, reason=island.uncertified or island.reason)
        quantized = self._kernel(QUANTIZE)
        own = Certification(quantized.standing, QUANTIZE, quantized.reason or island.kind.value)
        products = [self._plan.sites[source] for source in island.sources if source in self._plan.sites]
        return _least([own, *(self._site(site) for site in products if site.end is None)])

    def _stays_on_grid(self, island: Island) -> bool:
        """Whether an island moves codes of one grid about (a circular pad): then any kernel gives the same codes."""
        definitions = [(node, self._definition(node)) for node in island.nodes]
        if not all(one is not None and one.float_form_for(node) is FloatForm.MOVES for node, one in definitions):
            return False
        quants = [self._program.fake_quant(node) for node in (island.end, *island.sources)]
        grids = [module.grid for module in quants if module is not None]
        return len(grids) == len(quants) and all(grid.same_as(grids[0]) for grid in grids)

    def _output(self, segment: Segment) -> Certification:
        computing = [node for node in segment.nodes if not self._moves(node)]
        if not computing:
            return Certification(Standing.CERTIFIED, reason="dequantized codes")
        return Certification(Standing.ISLAND, reason=f"{computing[-1].name} is computed in float")

    def _moves(self, node: fx.Node) -> bool:
        """Whether a node only moves codes."""
        if self._program.fake_quant(node) is not None:
            return True  # off, or it would end the segment
        definition = self._definition(node)
        return definition is not None and definition.role_for(node) is Role.GRID_PRESERVING

    def _definition(self, node: fx.Node) -> OpDef | None:
        return TABLE.find(node, self._program.submodule(node) if node.op == "call_module" else None)


_MOVES = Certification(Standing.CERTIFIED, reason="moves codes")


def _is_integer(ran: NodeKernel) -> bool:
    """Whether integer kernels compute a node, but for moves of what they wrote (a float output may be reshaped)."""
    arithmetic = [name for name in ran.kernels if name not in _MOVING]
    is_partly = ran.kind is KernelKind.PARTLY and all(name in INTEGER_OPERATORS for name in arithmetic)
    return ran.kind is KernelKind.INTEGER or is_partly


def _least(found: list[Certification]) -> Certification:
    """The one of least standing; of equals the first."""
    return max(found, key=lambda item: _ORDER.index(item.standing))
