"""Which node of a segment is at fault: the file's graph, unfused and fed onnxruntime's codes, against the program's.

values agree up to a node, and not behind it        that node of the file computes something else
a node of the program has no value in the file      it is what is missing
all values agree, and so do the unfused codes       the kernel that runs instead of them is at fault
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxquant.graph.program import Program, value_type
from fxquant.numerics.runtime import Array, Level, RuntimeOptions, open_session
from fxquant.parity.compare import compare_values
from fxquant.parity.onnx_file import OnnxFile
from fxquant.parity.optimised import Fusion
from fxquant.parity.segments import Segment
from fxquant.parity.simulation import Evaluation, RuntimeCodes
from fxquant.simulation.plan import Site

# Largest difference, relative to the largest value of a tensor, that the order of float32 additions explains.
FLOAT_ROUNDING = 1e-4
FOREIGN_GRID = "its grid in the file is not the program's"
_UNFUSED = RuntimeOptions(Level.DISABLED, threads=1)


@dataclass(frozen=True)
class Blame:
    """The nodes at fault, and what is wrong with them."""

    nodes: tuple[str, ...]
    reason: str


@dataclass(frozen=True, eq=False)
class Evidence:
    """One batch: placeholders' values, graph inputs, and onnxruntime's codes by FakeQuant node and by tensor name."""

    inputs: Mapping[str, Any]
    feed: Mapping[str, Array]
    teacher: Mapping[str, RuntimeCodes]
    codes: Mapping[str, Array]


def blame(program: Program, file: OnnxFile, segment: Segment, evidence: Evidence, fusion: Fusion) -> Blame:
    """Find what is at fault in a segment whose own comparison failed on `evidence`."""
    end = file.quantizers().get(segment.end.name, [])
    codes = end[0].codes if end and not segment.output else None
    ours = _simulated(program, segment, evidence)
    theirs, unfused = _unfused(file, segment, evidence, codes)
    missing = _disagreeing(segment, ours, theirs)
    if missing is not None:
        return missing
    if codes is None:
        return _kernels(segment, fusion)
    module = program.fake_quant(segment.end)
    assert module is not None and unfused is not None
    source = segment.end.args[0]
    assert isinstance(source, fx.Node)
    mine = module.codes(ours[source]).cpu().numpy().astype(np.int64) if source in ours else None
    if mine is None or mine.shape != unfused.shape or np.abs(mine - unfused.astype(np.int64)).max(initial=0) > 1:
        return Blame(_unwritten(segment, theirs) or (segment.value,), "the values agree, their codes do not")
    return _kernels(segment, fusion)


def blame_site(
    program: Program, file: OnnxFile, segment: Segment, site: Site, evidence: Evidence, fusion: Fusion
) -> Blame:
    """Find what is at fault in a segment that one kernel should compute, whose grid is the program's."""
    moves = [node for node in segment.nodes if node not in site.nodes]
    if moves:
        theirs, _ = _unfused(file, segment, evidence, None)
        moved = _disagreeing(segment, _simulated(program, segment, evidence), theirs)
        if moved is not None and {node.name for node in moves}.issuperset(moved.nodes):
            return moved
    ran = fusion.of(site.operation.name)
    kernels = "+".join(ran.kernels) if ran is not None and ran.kernels else "what onnxruntime runs"
    return Blame(
        (site.operation.name,), f"certified, but {kernels} gives other codes than {site.kernel.operator}'s formula"
    )


def _simulated(program: Program, segment: Segment, evidence: Evidence) -> dict[fx.Node, torch.Tensor]:
    """The segment's values as the program computes them from onnxruntime's codes."""
    evaluation = Evaluation(program, evidence.inputs, evidence.teacher)
    needed: set[fx.Node] = set()
    pending = [*segment.nodes, *segment.end.all_input_nodes]
    while pending:
        node = pending.pop()
        if node.name in evidence.teacher:
            evaluation.values[node] = evidence.teacher[node.name].real()
        elif node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    order = [node for node in program.graph.nodes if node in needed]
    for _ in evaluation.run(order, keep=list(program.graph.nodes)):
        pass
    return {node: value for node, value in evaluation.values.items() if isinstance(value, torch.Tensor)}


def _unfused(
    file: OnnxFile, segment: Segment, evidence: Evidence, codes: str | None
) -> tuple[dict[fx.Node, Array], Array | None]:
    """The segment's values, and the codes behind it, as the file says they are computed: no operator fused."""
    tensors = {node: file.tensor_of(node.name) for node in segment.nodes}
    wanted = list(dict.fromkeys([name for name in tensors.values() if name is not None] + ([codes] if codes else [])))
    if not wanted:
        return {}, None
    known = {name: array for name, array in evidence.codes.items() if name != codes}
    part, inputs = file.extract(known, wanted)
    feed = {name: known[name] if name in known else evidence.feed[name] for name in inputs}
    found = open_session(part, _UNFUSED, data_folder=file.data_folder).run(feed)
    return {node: found[name] for node, name in tensors.items() if name is not None}, found[codes] if codes else None


def _disagreeing(
    segment: Segment, ours: Mapping[fx.Node, torch.Tensor], theirs: Mapping[fx.Node, Array]
) -> Blame | None:
    """The first node whose value is not the program's, or the nodes in front of it that the file does not have."""
    unwritten: set[fx.Node] = set()
    for node in segment.nodes:
        if node not in theirs:
            unwritten.add(node)
            continue
        if node not in ours or not (value_type(node) is None or ours[node].is_floating_point()):
            continue
        difference = compare_values(ours[node].detach().cpu().numpy(), theirs[node], 0)
        if difference.differing and not difference.worst <= FLOAT_ROUNDING * difference.largest:
            skipped = _in_front(node, unwritten)
            if skipped:
                return Blame(skipped, f"not in the file, and '{node.name}' behind it differs")
            return Blame((node.name,), f"computes something else in the file ({difference.first})")
    return None


def _in_front(node: fx.Node, unwritten: set[fx.Node]) -> tuple[str, ...]:
    """Those of `unwritten` that a node reads, through others of them too."""
    found: list[fx.Node] = []
    pending = [source for source in node.all_input_nodes if source in unwritten]
    while pending:
        source = pending.pop()
        if source not in found:
            found.append(source)
            pending.extend(further for further in source.all_input_nodes if further in unwritten)
    return tuple(sorted(source.name for source in found))


def _unwritten(segment: Segment, theirs: Mapping[fx.Node, Array]) -> tuple[str, ...]:
    return tuple(node.name for node in segment.nodes if node not in theirs)


def _kernels(segment: Segment, fusion: Fusion) -> Blame:
    """The nodes of a segment that kernels of their own compute; all of them if that is not known."""
    found = [kernel for kernel in map(fusion.of, (node.name for node in segment.nodes)) if kernel and kernel.kernels]
    types = ", ".join(operator for kernel in found for operator in kernel.kernels)
    names = tuple(kernel.node for kernel in found) or tuple(node.name for node in segment.nodes) or (segment.value,)
    return Blame(names, f"the unfused graph agrees; what onnxruntime runs instead ({types}) does not")
