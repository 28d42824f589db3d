"""How a parity report is printed: its table of tensors, its kernels, and the agreement of graph outputs."""

from __future__ import annotations

from collections.abc import Sequence

from fxquant.parity.certification import NodeCertification
from fxquant.parity.compare import Difference
from fxquant.parity.optimised import Fusion, KernelKind
from fxquant.parity.row import Row

_NAMED = 6  # tensors that a verdict line names


def counted(rows: Sequence[Row], what: str) -> str:
    """How many, in words, and the names of the first ones."""
    return f"{len(rows)} {what}{'' if len(rows) == 1 else 's'}{named(rows)}"


def named(rows: Sequence[Row]) -> str:
    """The names of the first ones in brackets; "" if there are none."""
    names = [row.value for row in rows[:_NAMED]]
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return f" ({', '.join(names)}{more})" if names else ""


def agreement_text(row: Row) -> str:
    """How far a graph output agrees."""
    equal = row.overall.compared - row.overall.differing
    worst = f", worst difference {row.overall.worst:.3g}" if row.overall.differing else ""
    share = f"{1.0 - row.overall.fraction:.2%}"
    return f"output {row.value}: {equal:,} of {row.overall.compared:,} values equal bit for bit ({share}){worst}"


def table(rows: Sequence[Row]) -> str:
    """One line a tensor."""
    head = ("tensor", "kernels", "compared", "differ", "worst", "differ locally", "worst", "promised", "verdict")
    lines = [head] + [_cells(row) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rule = tuple("-" * width for width in widths)
    numeric = {2, 3, 4, 5, 6}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in numeric else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [head, rule, *lines[1:]]
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"output {row.value}" if row.is_output else row.value,
        "+".join(row.kernels) or "-",
        f"{row.overall.compared:,}",
        _count(row.overall),
        f"{row.worst_steps:.4g}" if row.overall.differing else "0",
        _count(row.local),
        f"{row.worst_local_steps:.4g}" if row.local.differing else "0",
        row.certification.standing.value,
        row.verdict_text,
    )


def _count(difference: Difference) -> str:
    return f"{difference.differing:,} ({difference.fraction:.2e})" if difference.differing else "0"


def nodes_text(nodes: Sequence[NodeCertification]) -> str:
    """How many nodes are certified, then the others by what is promised of them and why."""
    exact = sum(1 for node in nodes if node.certification.is_certified)
    others: dict[str, list[str]] = {}
    for node in nodes:
        if not node.certification.is_certified:
            others.setdefault(str(node.certification), []).append(node.node)
    lines = [f"nodes: {exact} of {len(nodes)} certified and exact"]
    return "\n".join([*lines, *(f"  {', '.join(names)}: {promise}" for promise, names in others.items())])


def fusion_text(fusion: Fusion) -> str:
    """How many nodes run on what, and why not in integers."""
    counts = ", ".join(f"{fusion.count(kind)} {kind.value}" for kind in KernelKind if fusion.count(kind))
    lines = [f"kernels (level {fusion.level.value}): {counts or 'none'}; {fusion.leftover} Q/DQ left inside"]
    for kernel in fusion.unfused:
        lines.append(f"  {kernel.node} ({'+'.join(kernel.kernels)}): {kernel.kind.value}: {kernel.reason}")
    return "\n".join(lines)
