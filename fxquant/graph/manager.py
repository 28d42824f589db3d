"""PassManager: runs passes in order, checks what they declare against what they did, and keeps the trace.

For each pass: stage check, rewrite with a fresh Rewriter, refusal of unrecorded edits, lint, recompilation if the
graph was edited. A pass that fails is rolled back, so that the program is left as the pass before it left it; all but
the values of tensors that it overwrote in place behind the rewriter's back, of which no copies are kept (they would
double the memory of every run): the error names those tensors.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.progress import Progress
from torch import fx

from fxquant.errors import FxquantError, PassError
from fxquant.graph.batches import Batch
from fxquant.graph.checks import check_graph
from fxquant.graph.numeric_check import TOLERANCE, OutputCheck
from fxquant.graph.options import check_options
from fxquant.graph.pass_data import PassData
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage
from fxquant.graph.render import excerpt, render, render_header, render_node
from fxquant.graph.rewriter import Rewriter
from fxquant.graph.snapshot import Snapshot, refuse_unrecorded
from fxquant.graph.trace import PassEntry, PassTrace, Picture

LONG_SECONDS = 2.0  # a run that takes longer shows a progress bar
_GRAPH_EDITS = frozenset(("create", "erase", "move", "retarget", "rewire"))  # recorded actions that need a new forward


class PassManager:
    """A list of passes that runs as one; a PassManager in the list stands for its passes.

    Raises PassError if an option of a pass is not of its type, or if no stage can be run through the list in this
    order.
    """

    def __init__(self, passes: Sequence[Pass | PassManager]) -> None:
        self.passes = tuple(passes)
        for item in self.passes:
            if not isinstance(item, (Pass, PassManager)):
                expected = "passes and PassManagers"
                raise PassError("pass list", expected=expected, got=repr(item), remedy=_remedy_for(item))
            if isinstance(item, Pass):
                if not item.stages:
                    raise PassError(f"pass '{item.name}'", expected="stages that it runs at", got="none")
                check_options(item, item.name)
        self.entries = _check_order(list(self))

    def __iter__(self) -> Iterator[Pass]:
        """The passes, those of nested managers in their place."""
        for item in self.passes:
            if isinstance(item, PassManager):
                yield from item
            else:
                yield item

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"PassManager([{', '.join(map(repr, self.passes))}])"

    def stage_after(self, entry: Stage) -> Stage:
        """The stage that a program at stage `entry` has come to after the last pass."""
        stage = entry
        for item in self:
            stage = stage if item.leaves is None else item.leaves
        return stage

    def run(
        self,
        program: Program,
        check_inputs: Batch | None = None,
        tolerance: float = TOLERANCE,
        data: PassData | None = None,
    ) -> PassTrace:
        """Run the passes on `program`, in place.

        Arguments:
            program: is edited; if a pass fails, it is left as the pass before left it, but for values that the pass
                overwrote in place without the rewriter: those are lost, and the error names their tensors.
            check_inputs: arguments of the model (a tensor, a tuple, a dict of keywords); if given, the outputs before
                and after each pass whose contract is PRESERVES are compared. Without them no contract is checked.
            tolerance: largest difference allowed there, as a fraction of the output's largest magnitude.
            data: for passes that measure; the float program that they compare with is this one as it is now.

        Raises PassError, with the pass, the node and the printed graph, whatever a pass raised.
        """
        measuring = [item for item in self if item.needs_data]
        if measuring and data is None:
            raise _no_data(measuring[0])
        if measuring and data is not None and program.stage >= Stage.INSERTED:
            data = data.beginning_at(program)
        run = _Run(program, OutputCheck(program, check_inputs, tolerance), data)
        for item in _with_late_progress(list(self)):
            run.step(item)
        return PassTrace(run.start, tuple(run.entries))


def _remedy_for(item: object) -> str:
    """What to write instead of a class or a name where a pass is wanted."""
    if isinstance(item, type):
        return f"Write {item.__name__}(), with brackets."
    if isinstance(item, str):
        name = "".join(part.capitalize() for part in re.split(r"\W+", item))
        return f"Write {name}(), or name passes in a TOML pipeline (fxquant.load_pipeline)."
    return ""


def _with_late_progress(passes: list[Pass]) -> Iterator[Pass]:
    """Yield the passes; under a progress bar once they take long, if standard error is a terminal."""
    started = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=len(passes), visible=False)
        for item in passes:
            is_long = time.perf_counter() - started > LONG_SECONDS
            progress.update(task, description=item.name, visible=is_long)
            yield item
            progress.advance(task)


class _Run:
    """One run of passes over one program."""

    def __init__(self, program: Program, check: OutputCheck, data: PassData | None) -> None:
        self.program = program
        self.check = check
        self.data = data
        self.snapshot = Snapshot.take(program)
        self.lines = {node.name: render_node(program, node) for node in program.graph.nodes}
        self.start = self.picture = self._picture()
        self.entries: list[PassEntry] = []

    def step(self, item: Pass) -> None:
        """Run one pass, or leave the program as it was and raise PassError."""
        _check_stage(item, self.program)
        rewriter = Rewriter(self.program, item.name, self.data)
        started = time.perf_counter()
        try:
            self._rewrite(item, rewriter)
        except Exception as err:
            self.snapshot.restore_header(self.program)  # or it may not print
            failure = _failure(item, self.program, err)
            raise _with_losses(failure, self._roll_back(rewriter)) from err
        except BaseException as err:
            lost = self._roll_back(rewriter)
            if lost:
                err.add_note(_loss(lost))
            raise
        seconds = time.perf_counter() - started
        before, self.picture = self.picture, self._picture()
        entry = PassEntry(item, tuple(rewriter.edits), tuple(rewriter.misses), seconds, before, self.picture)
        self.entries.append(entry)

    def _rewrite(self, item: Pass, rewriter: Rewriter) -> None:
        program = self.program
        is_checked, float_state = item.contract is Contract.PRESERVES, program.float_state
        if is_checked:
            self.check.before()
        item.rewrite(program, rewriter)
        after = Snapshot.take(program)
        refuse_unrecorded(self.snapshot, after, rewriter)
        if rewriter.edits:
            check_graph(program, after)
        if any(edit.action in _GRAPH_EDITS for edit in rewriter.edits):
            program.recompile()
        if is_checked and rewriter.edits:
            self.check.after()
        if item.leaves is not None:
            program.stage = item.leaves
        if rewriter.edits:
            program.float_state = float_state.after(item.name, self.snapshot, after)
        self._render_changes(after, bool(rewriter.edits))
        self.snapshot = replace(after, stage=program.stage)

    def _render_changes(self, after: Snapshot, was_edited: bool) -> None:
        """Print anew what changed: nodes that say something else, and module calls, whose line shows the module's
        state.
        """
        if not was_edited:
            return
        changed = self.snapshot.changed(after)
        lines = {}
        for name, state in after.nodes.items():
            old = self.lines.get(name, "")
            new = render_node(self.program, state.node) if name in changed or state.op == "call_module" else old
            lines[name] = old if new == old else new  # the same object, so that the pictures of a trace share it
        self.lines = lines

    def _roll_back(self, rewriter: Rewriter) -> list[str]:
        rewriter.undo_edits_in_place()
        return self.snapshot.restore(self.program)

    def _picture(self) -> Picture:
        return Picture(self.program.stage, (render_header(self.program), *self.lines.values()))


@dataclass(frozen=True)
class _Way:
    """One way through a list of passes: from the stage `entry`; now at `stage`, which the pass `by` left (None: the
    entry).
    """

    entry: Stage
    stage: Stage
    by: Pass | None


def _check_order(passes: list[Pass]) -> tuple[Stage, ...]:
    """The stages at which this list of passes can start; PassError if there is none."""
    ways = [_Way(stage, stage, None) for stage in Stage]
    narrowed: Pass | None = None
    for index, item in enumerate(passes):
        open_ways = [way for way in ways if way.stage in item.stages]
        if not open_ways:
            raise _order_error(passes, index, ways[0].by or narrowed, [way.stage for way in ways])
        if len(open_ways) < len(ways):
            narrowed = item
        if item.leaves is not None:
            open_ways = [_Way(way.entry, item.leaves, item) for way in open_ways]
        ways = open_ways
    return tuple(way.entry for way in ways)


def _order_error(passes: list[Pass], index: int, earlier: Pass | None, stages: list[Stage]) -> PassError:
    item = passes[index]
    assert earlier is not None, "every stage is open to the first pass unless it declares none"
    at = _either(sorted(set(stages)))
    verb = "leaves" if earlier.leaves is not None else "runs at and leaves as it is"
    err = PassError(
        f"pass {index + 1} '{item.name}' cannot run after '{earlier.name}'",
        expected=f"a program at stage {_either(item.stages)}",
        got=f"stage {at}, which '{earlier.name}' {verb}",
        remedy=_order_remedy(passes, index, earlier, max(stages)),
    )
    err.pass_name = item.name
    return err


def _order_remedy(passes: list[Pass], index: int, earlier: Pass, stage: Stage) -> str:
    item = passes[index]
    for later in passes[index + 1 :]:
        if later.leaves in item.stages:
            return f"Move '{later.name}' before '{item.name}'."
    if max(item.stages) < stage:
        return f"Move '{item.name}' before '{earlier.name}'."
    return f"Put a pass that leaves stage {_either(item.stages)} between '{earlier.name}' and '{item.name}'."


def _either(stages: Sequence[Stage]) -> str:
    return " or ".join(str(stage) for stage in stages)


def _check_stage(item: Pass, program: Program) -> None:
    if program.stage in item.stages:
        return
    err = PassError(
        f"pass '{item.name}' cannot run",
        expected=f"a program at stage {_either(item.stages)}",
        got=f"stage {program.stage}",
        remedy=_stage_remedy(item, program.stage),
    )
    err.pass_name = item.name
    raise err


def _no_data(item: Pass) -> PassError:
    err = PassError(
        f"pass '{item.name}' measures with batches",
        expected="data",
        got="none",
        remedy="Give calibration batches: pipeline.optimize(program, batches) or pipeline.prepare(program, "
        "batches=batches); of a PassManager, run(program, data=PassData(batches)).",
    )
    err.pass_name = item.name
    return err


def _stage_remedy(item: Pass, stage: Stage) -> str:
    if max(item.stages) < stage:
        return "The program is past that stage: run this pass on a fresh capture or a copy made earlier."
    if stage is Stage.INSERTED and item.stages == (Stage.CALIBRATED,):
        return "Calibrate the program first (fxquant.calibrate)."
    return f"First run a pass that leaves stage {_either(item.stages)}."


def _failure(item: Pass, program: Program, err: Exception) -> PassError:
    """The error to raise from `err`: it names pass and node, shows the lines around the node, and carries the printed
    graph.
    """
    node = _node_at_fault(err)
    if isinstance(err, FxquantError):
        thing = err.thing if err.thing.startswith(item.name) else f"{item.name}: {err.thing}"
        failure = PassError(thing, place=err.place, expected=err.expected, got=err.got, remedy=err.remedy)
    else:
        where = f"node '{node}'" if node else "the pass failed"
        got = f"{type(err).__name__}: {err}" if str(err) else f"{type(err).__name__} without a text"
        remedy = "The graph as the pass left it is on `.rendered` of this error."
        failure = PassError(f"{item.name}: {where}", got=got, remedy=remedy)
    failure.pass_name, failure.node = item.name, node
    failure.rendered, lines = _printed(program, node)
    if lines:
        failure.add_note(f"the graph as '{item.name}' left it, before it was rolled back:\n{lines}")
    return failure


def _printed(program: Program, node: str) -> tuple[str, str]:
    """The printed graph, and the lines around `node`; a pass may have left what cannot be printed."""
    try:
        return render(program), excerpt(program, node)
    except Exception as err:
        return f"the graph cannot be printed: {type(err).__name__}: {err}", ""


def _node_at_fault(err: Exception) -> str:
    """Name of the node that an error is about: as it says itself, or the node that the innermost pass code had in
    hand.
    """
    if isinstance(err, PassError) and err.node:
        return err.node
    named = re.search(r"node '([^']+)'", str(err))
    if named:
        return named.group(1)
    found, trace = "", err.__traceback__
    while trace is not None:
        local = trace.tb_frame.f_locals.get("node")
        found = local.name if isinstance(local, fx.Node) else found
        trace = trace.tb_next
    return found


def _with_losses(failure: PassError, lost: list[str]) -> PassError:
    if not lost:
        failure.add_note("the program was rolled back to what it was before this pass")
        return failure
    remedy = " ".join(filter(None, (failure.remedy, _loss(lost))))
    full = PassError(failure.thing, place=failure.place, expected=failure.expected, got=failure.got, remedy=remedy)
    full.pass_name, full.node, full.rendered = failure.pass_name, failure.node, failure.rendered
    for note in getattr(failure, "__notes__", ()):
        full.add_note(note)
    return full


def _loss(lost: list[str]) -> str:
    names = ", ".join(f"'{path}'" for path in lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
    return (
        f"The program was rolled back, but the old values of {names}, overwritten in place without the rewriter, "
        "are lost: capture the model again."
    )
