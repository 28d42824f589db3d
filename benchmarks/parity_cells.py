"""One cell of the parity table: what check_parity found for a network, a simulation, a level and a thread count."""

from collections import Counter
from dataclasses import dataclass

from benchmarks.runner import Json
from fxquant.numerics.runtime import RuntimeOptions
from fxquant.parity import ParityReport
from fxquant.parity.certification import BIT_EXACT, Standing
from fxquant.parity.optimised import NodeKernel

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True)
class Figures:
    """The columns of the table; cells that agree in all of them share a line.

    Arguments:
        compared: codes, over all tensors.
        differing, worst: codes that differ, each side on its own values, and by how many steps at most.
        local, worst_local: the same where the simulation is fed with onnxruntime's codes.
        at_certified: how many of `local` are at certified nodes.
        first: the first tensor in graph order that differs locally; "" if none does.
        logits, logits_compared, logits_worst: numbers of the graph outputs that differ, of how many, and by how many
            steps of the grid in front at most.
    """

    compared: int
    differing: int
    worst: float
    local: int
    worst_local: float
    at_certified: int
    first: str
    logits: int
    logits_compared: int
    logits_worst: float

    @classmethod
    def of(cls, report: ParityReport) -> "Figures":
        """Read the columns off a report."""
        codes = report.code_rows
        return cls(
            compared=report.codes_compared,
            differing=report.codes_differing,
            worst=max((row.worst_steps for row in codes), default=0.0),
            local=sum(row.local.differing for row in codes),
            worst_local=report.worst_local_steps,
            at_certified=report.certified_differing,
            first=next((row.value for row in codes if row.local.differing), ""),
            logits=sum(row.overall.differing for row in report.outputs),
            logits_compared=sum(row.overall.compared for row in report.outputs),
            logits_worst=max((row.worst_steps for row in report.outputs if row.overall.differing), default=0.0),
        )

    def cells(self) -> list[str]:
        """The text of each column."""
        return [
            f"{self.compared:,}",
            f"{self.differing:,}",
            f"{self.worst:g}",
            f"{self.local:,}",
            f"{self.worst_local:g}",
            f"{self.at_certified:,}",
            f"{self.logits:,}/{self.logits_compared:,}",
            f"{self.logits_worst:.3g}",
            self.first or "-",
        ]


@dataclass(frozen=True)
class InFloat:
    """How many nodes of the same operators and standing onnxruntime computed in float."""

    operators: str
    standing: Standing
    count: int

    @classmethod
    def of(cls, report: ParityReport) -> "tuple[InFloat, ...]":
        """Count them, the most frequent first."""
        standings = {node.node: node.certification.standing for node in report.nodes}
        kernels = [kernel for kernel in report.fusion.unfused if kernel.node in standings]
        counts = Counter(("+".join(kernel.operators), standings[kernel.node]) for kernel in kernels)
        return tuple(cls(operators, standing, count) for (operators, standing), count in counts.most_common())


@dataclass(frozen=True)
class Cell:
    """The outcome at one place of the grid.

    Arguments:
        faults: what breaks a promise, each with the node that it is at. The float simulation promises no codes, and
            levels below EXTENDED, where no integer kernels run, neither codes nor kernels.
        nodes: how many nodes have each standing.
        in_float: the nodes that onnxruntime computed in float, by their operators, the most frequent first.
        uncertified: the nodes that are not certified and not float islands either, with the reasons.
    """

    case: str
    simulation: str
    options: RuntimeOptions
    figures: Figures
    faults: tuple[str, ...]
    nodes: dict[Standing, int]
    in_float: tuple[InFloat, ...]
    uncertified: tuple[str, ...]

    @classmethod
    def of(cls, case: str, options: RuntimeOptions, report: ParityReport) -> "Cell":
        """Judge a report."""
        standings = Counter(node.certification.standing for node in report.nodes)
        return cls(
            case=case,
            simulation=report.simulation,
            options=options,
            figures=Figures.of(report),
            faults=tuple(find_faults(report, options)),
            nodes={standing: standings[standing] for standing in Standing},
            in_float=InFloat.of(report),
            uncertified=tuple(
                str(node) for node in report.nodes if node.certification.standing is Standing.UNCERTIFIED
            ),
        )

    @property
    def is_judged(self) -> bool:
        """Whether every code of a certified node is promised here."""
        return self.simulation in BIT_EXACT and self.options.level.fuses

    def to_dict(self) -> dict[str, Json]:
        """The figures by name."""
        nodes: dict[str, Json] = {standing.value: count for standing, count in self.nodes.items()}
        in_float: dict[str, Json] = {f"{kind.operators} ({kind.standing.value})": kind.count for kind in self.in_float}
        return {
            "model": self.case,
            "simulation": self.simulation,
            "level": self.options.level.value,
            "threads": self.options.threads,
            **vars(self.figures),
            "nodes": nodes,
            "in_float": in_float,
            "uncertified": list(self.uncertified),
            "faults": list(self.faults),
        }


def find_faults(report: ParityReport, options: RuntimeOptions) -> list[str]:
    """What breaks a promise: stored constants at every level; products, and codes of exact simulations, where fused."""
    found = [str(item) for item in report.stored]
    if not options.level.fuses:
        return found
    found += [f"{kernel.node}: runs as {'+'.join(kernel.kernels)}: {kernel.reason}" for kernel in slow_products(report)]
    if report.simulation in BIT_EXACT:
        wrong = [row for row in report.rows_that_are(Standing.CERTIFIED) if row.local.differing]
        found += [f"{row.value}: {row.local.differing:,} of {row.local.compared:,} codes differ" for row in wrong]
    return found


def slow_products(report: ParityReport) -> list[NodeKernel]:
    """Convolutions and matrix products that run in float, all or in part."""
    return [kernel for kernel in report.fusion.unfused if PRODUCTS.intersection(kernel.operators)]


def nodes_line(cell: Cell) -> str:
    """How many nodes of a network have each standing, and what operators run in float."""
    certified, islands, uncertified = (cell.nodes[standing] for standing in Standing)
    text = f"{cell.case}: {certified} nodes certified, {islands} in float islands, {uncertified} uncertified"
    named = ", ".join(f"{kind.count} {kind.operators} ({kind.standing.value})" for kind in cell.in_float)
    lines = [f"{text}; in float: {named}" if named else text, *(f"  {node}" for node in cell.uncertified)]
    return "\n".join(lines)


def merged_rows(cells: list[Cell]) -> list[list[str]]:
    """Table rows: cells with equal figures share one, first over threads, then over levels."""
    by_threads: dict[tuple[str, str, str, Figures], list[str]] = {}
    for cell in cells:
        level = cell.options.level.value
        by_threads.setdefault((cell.case, cell.simulation, level, cell.figures), []).append(str(cell.options.threads))
    by_level: dict[tuple[str, str, str, Figures], list[str]] = {}
    for (case, simulation, level, figures), threads in by_threads.items():
        by_level.setdefault((case, simulation, " ".join(threads), figures), []).append(level)
    return [
        [case, simulation, " ".join(levels), threads, *figures.cells()]
        for (case, simulation, threads, figures), levels in by_level.items()
    ]
