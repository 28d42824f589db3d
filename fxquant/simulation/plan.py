"""Plan: which integer kernel onnxruntime will run for each quantized value, or why it computes it in float.

The rules are those of the QDQ selectors of onnxruntime's CPU provider (`qdq_selectors.cc`, `qdq_util.cc`; measured
again on 1.31.1), asked of the program instead of the file. Parity checks them against the graph that really ran.

    site      FakeQuant <- [relu, clip ...] <- operation with an integer kernel <- FakeQuants, directly or through moves
    island    whatever else is in front of a FakeQuant: computed in float between DequantizeLinear and QuantizeLinear
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from fxquant.graph.program import Program, input_slots, value_type
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.ops.activation import activation_bounds, bound_that_cuts
from fxquant.ops.base import OpDef, OpTable, Role
from fxquant.ops.kernels import KERNEL_BITS, Kernel, ProductKernel
from fxquant.ops.table import TABLE
from fxquant.simulation.facts import Facts, is_on, source_of, spelled
from fxquant.simulation.regions import Island, IslandKind, Regions, Unary
from fxquant.spec import Target

__all__ = ["Island", "IslandKind", "Plan", "Site", "Unary", "along_channels", "read_plan"]


@dataclass(frozen=True)
class Site:
    """An operation that runs in an integer kernel.

    Arguments:
        operation: its node.
        definition: its OpDef.
        kernel: its kernel.
        activations: relus and clips behind it that the quantizer makes redundant, in graph order.
        end: the FakeQuant behind them; None where the kernel writes float32 (QGemm, MatMulIntegerToFloat).
    """

    operation: fx.Node
    definition: OpDef
    kernel: Kernel
    activations: tuple[fx.Node, ...]
    end: fx.Node | None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes that the kernel computes, its quantizer not among them."""
        return (self.operation, *self.activations)


@dataclass(frozen=True)
class Plan:
    """Sites by the node whose value they compute (a FakeQuant, or the operation), islands by their FakeQuant.

    `tables` are functions of one code, by the node whose value is looked up; `hidden` are the nodes that have no value
    of their own: a kernel or a table computes across them; `unknown` are the operations whose rounding in float is not
    known.
    """

    sites: dict[fx.Node, Site]
    islands: dict[fx.Node, Island]
    hidden: frozenset[fx.Node]
    tables: Mapping[fx.Node, Unary] = field(default_factory=dict)
    unknown: frozenset[fx.Node] = frozenset()

    def site_of(self, operation: str) -> Site | None:
        """The site whose kernel computes the node called `operation`."""
        return next((site for site in self.sites.values() if operation in (node.name for node in site.nodes)), None)

    def reads(self, node: fx.Node) -> Sequence[fx.Node]:
        """What is read to compute the value of a node that is not hidden."""
        if node in self.sites:
            return self.sites[node].operation.all_input_nodes
        return (self.tables[node].source,) if node in self.tables else node.all_input_nodes


def read_plan(program: Program, table: OpTable = TABLE) -> Plan:
    """The plan of a program as its FakeQuants are now; without FakeQuants that are on, an empty one."""
    return _Reading(program, table).plan()


def along_channels(scale: torch.Tensor, kernel: ProductKernel, site: Site) -> torch.Tensor:
    """Scales of output channels, shaped to broadcast against the output."""
    if scale.ndim == 0 or kernel.channels == -1:
        return scale
    rank = len(site.operation.meta["type"].shape)
    shape = [1] * rank
    shape[kernel.channels] = -1
    return scale.view(shape)


@dataclass
class _Reading:
    program: Program
    table: OpTable
    sites: dict[fx.Node, Site] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.facts = Facts(self.program, self.table)

    def plan(self) -> Plan:
        """See read_plan."""
        reasons: dict[fx.Node, tuple[FakeQuant, str]] = {}
        for node, module in self.program.fake_quant_nodes():
            if not is_on(module) or self.facts.is_constant_quantizer(node):
                continue
            found = self._site(node, module)
            if isinstance(found, str):
                reasons[node] = module, found
            else:
                self.sites[node] = found
        absorbed = {node for site in self.sites.values() for node in site.nodes}
        for node in self.program.graph.nodes:
            site = None if node in absorbed else self._float_site(node)
            if site is not None:
                self.sites[node] = site
        regions = Regions(self.facts, [site.operation for site in self.sites.values() if site.end is None])
        islands = {end: regions.island(end, module, reason) for end, (module, reason) in reasons.items()}
        plan = Plan(self.sites, islands, frozenset(), regions.tables, frozenset(regions.unknown))
        return replace(plan, hidden=self._hidden(plan))

    def _hidden(self, plan: Plan) -> frozenset[fx.Node]:
        """The nodes of kernels and tables whose values nothing reads."""
        absorbed = {node for site in plan.sites.values() if site.end is not None for node in site.nodes}
        absorbed |= {node for table in plan.tables.values() for node in table.nodes if node is not table.top}
        stack = [
            node for node in self.program.graph.nodes if not node.users or self.program.fake_quant(node) is not None
        ]
        needed: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack.extend(plan.reads(node))
        return frozenset(absorbed - needed)

    def _site(self, end: fx.Node, module: FakeQuant) -> Site | str:
        """The site in front of a FakeQuant, or why there is none."""
        if self.program.target is not Target.ONNXRUNTIME_X64:
            return f"the target is {self.program.target.value}, not {Target.ONNXRUNTIME_X64.value}"
        node, readers = source_of(end), [end]
        activations: list[fx.Node] = []
        while self.facts.role(node) is Role.ACTIVATION:
            reason = self.facts.why_live(node) or _why_kept(node, module) or _why_shared(node, readers)
            if reason:
                return reason
            activations.insert(0, node)
            node, readers = source_of(node), [node]
        if node.op == "placeholder":
            return "" if not activations else f"{activations[0].name} works on a graph input"
        definition = self.facts.definition(node)
        if definition is None or definition.kernel is None:
            return f"onnxruntime has no integer kernel for {spelled(node, definition)}"
        return (
            _why_shared(node, readers)
            or _why_grid(module)
            or self._why_operation(node, definition)
            or self._why_overflow(node, definition.kernel, module)
            or Site(node, definition, definition.kernel, tuple(activations), end)
        )

    def _float_site(self, node: fx.Node) -> Site | None:
        """A product whose output stays in float: QGemm and MatMulIntegerToFloat need no grid behind them."""
        definition = self.facts.definition(node)
        kernel = None if definition is None else definition.kernel
        if definition is None or not isinstance(kernel, ProductKernel) or not kernel.writes_float:
            return None
        if self.program.target is not Target.ONNXRUNTIME_X64 or self._why_operation(node, definition):
            return None
        return Site(node, definition, kernel, (), None)

    def _why_operation(self, node: fx.Node, definition: OpDef) -> str:
        """Why an operation that has a kernel cannot use it here: its arguments, operands or bias."""
        assert definition.kernel is not None
        declined = definition.kernel.declines(node)
        if declined:
            return declined
        position = definition.bias
        bias = node.args[position] if position is not None and position < len(node.args) else None
        is_product = isinstance(definition.kernel, ProductKernel)
        for source in node.all_input_nodes:
            kind = value_type(source)
            if kind is None or not kind.is_float or (source is bias and is_product):
                continue
            reason = self._why_operand(node, source, definition)
            if reason:
                return reason
        return self._why_bias(bias) if is_product and isinstance(bias, fx.Node) else ""

    def _why_overflow(self, node: fx.Node, kernel: Kernel, out: FakeQuant) -> str:
        """Why an operation with a kernel is kept in float all the same: it would overflow (lowering's barriers)."""
        kinds = ((source, value_type(source)) for source in input_slots(node))
        modules = [self.facts.grid_of(source) for source, kind in kinds if kind is not None and kind.is_float]
        return kernel.why_overflow(node, [None if module is None else module.grid for module in modules], out.grid)

    def _why_operand(self, node: fx.Node, operand: fx.Node, definition: OpDef) -> str:
        module = self.facts.grid_of(operand)
        if module is None:
            return f"its input '{operand.name}' is not quantized"
        if module.spec.bits > KERNEL_BITS:
            return f"its input '{operand.name}' has {module.spec.bits}-bit codes"
        kernel = definition.kernel
        if (
            isinstance(kernel, ProductKernel)
            and node.args[kernel.right] is operand
            and self.facts.is_constant_quantizer(operand)
        ):
            return self._why_weight(node, module, definition)
        block = module.spec.granularity.block
        if module.scale.ndim:
            return f"its input '{operand.name}' has a scale for each {'block' if block else 'channel'}"
        return f"its input '{operand.name}' has signed codes" if module.spec.signed else ""

    def _why_weight(self, node: fx.Node, module: FakeQuant, definition: OpDef) -> str:
        axis, block = module.spec.granularity.axis, module.spec.granularity.block
        if module.scale.ndim and block is not None:
            return f"its weight is quantized in blocks of {block}, which no integer kernel takes"
        if not module.scale.ndim or axis is None or definition.channel_axis is None:
            return ""
        kind = value_type(source_of(_weight(node, definition)))
        rank = len(kind.shape) if kind is not None else 0
        return (
            "" if rank and axis % rank == definition.channel_axis(node) else f"its weight has scales along axis {axis}"
        )

    def _why_bias(self, bias: fx.Node) -> str:
        module = self.program.bias_fake_quant(bias)
        if module is None or not all(is_on(source) for source in module.sources):
            return f"its bias '{bias.name}' is not quantized to int32"
        return ""


def _weight(node: fx.Node, definition: OpDef) -> fx.Node:
    assert isinstance(definition.kernel, ProductKernel)
    weight = node.args[definition.kernel.right]
    assert isinstance(weight, fx.Node)
    return weight


def _why_shared(node: fx.Node, readers: list[fx.Node]) -> str:
    others = [user.name for user in node.users if user not in readers]
    return f"{node.name} has other readers ({', '.join(others)})" if others else ""


def _why_grid(module: FakeQuant) -> str:
    if module.spec.bits > KERNEL_BITS:
        return f"its output has {module.spec.bits}-bit codes"
    if module.scale.ndim:
        return "its output has a scale for each channel"
    return "its output has signed codes" if module.spec.signed else ""


def _why_kept(node: fx.Node, module: FakeQuant) -> str:
    """Why onnxruntime keeps a relu or clip in front of a QuantizeLinear: it clips more than the grid does."""
    bounds = activation_bounds(node)
    if bounds is None or module.scale.ndim:
        return f"{node.name} has bounds that are not constant"
    found = bound_that_cuts(bounds, module.grid)
    if found is None:
        return ""
    beyond = "above the lowest" if found == bounds[0] else "below the highest"
    return f"{node.name} cuts at {found:g}, {beyond} value of the grid behind it"
