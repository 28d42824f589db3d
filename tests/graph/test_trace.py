"""PassTrace prints, diffs and dumps what the passes did."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from torch import fx

from fxquant.errors import FxquantError
from fxquant.graph.manager import PassManager
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage
from fxquant.graph.render import render
from fxquant.graph.rewriter import Rewriter
from tests.helpers import aten, residual_program


@dataclass(frozen=True)
class Gate(Pass):
    """Put a sigmoid in the place of every relu; misses sums."""

    name: ClassVar[str] = "gate"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    leaves: ClassVar[Stage | None] = Stage.ASSIGNED
    contract: ClassVar[Contract] = Contract.CHANGES

    strength: float = 1.0

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        for node in program.graph.nodes:
            if node.target is aten.relu.default:
                rewriter.set_target(node, aten.sigmoid.default)
            if node.target is aten.add.Tensor:
                rewriter.miss(node, "a sum has no gate")


@dataclass(frozen=True)
class Drop(Pass):
    """Erase the last layer's bias."""

    name: ClassVar[str] = "drop"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.ASSIGNED,)
    contract: ClassVar[Contract] = Contract.CHANGES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        fc = program.node("fc")
        if len(fc.args) == 3:
            bias = fc.args[2]
            assert isinstance(bias, fx.Node)
            rewriter.set_args(fc, fc.args[:2])
            rewriter.erase(bias)


@pytest.fixture
def program() -> Program:
    return residual_program()


def test_trace_counts_edits_misses_and_nodes(program: Program) -> None:
    trace = PassManager([Gate(), Drop()]).run(program)
    gate, drop = trace.entries
    assert (len(gate.edits), len(gate.misses), gate.before.nodes, gate.after.nodes) == (1, 1, 14, 14)
    assert (len(drop.edits), len(drop.misses), drop.before.nodes, drop.after.nodes) == (2, 0, 14, 13)
    assert gate.modified and gate.options == {"strength": "1.0"}
    assert (gate.before.stage, gate.after.stage) == (Stage.CAPTURED, Stage.ASSIGNED)
    assert trace.seconds == gate.seconds + drop.seconds > 0


def test_pictures_are_what_render_prints(program: Program) -> None:
    before = render(program)
    trace = PassManager([Gate(), Drop()]).run(program)
    assert trace.start.text == trace.entries[0].before.text == before
    assert trace.entries[0].after is trace.entries[1].before
    assert trace.entries[1].after.text == render(program)
    unchanged = set(map(id, trace.start.lines)) & set(map(id, trace.entries[1].after.lines))
    assert len(unchanged) == 11  # the strings are shared: 14 nodes less relu, fc and the erased bias


def test_printed_trace_is_a_table_with_the_misses(program: Program) -> None:
    lines = str(PassManager([Gate(), Drop()]).run(program)).splitlines()
    assert lines[0].split() == ["pass", "edits", "misses", "nodes", "stage", "seconds", "what"]
    assert lines[1].split()[:5] == ["gate", "1", "1", "14", "assigned"]
    assert lines[2].split()[:6] == ["drop", "2", "0", "14", "->", "13"]
    assert lines[2].endswith("erase 1, rewire 1")
    assert lines[3] == "not done by gate: block_0_add (aten.add.Tensor at block_0_add): a sum has no gate"


def test_diff_by_name(program: Program) -> None:
    trace = PassManager([Gate(), Drop()]).run(program)
    assert "-fc_bias = get fc.bias" in trace.diff("drop")
    assert "fc_bias" not in trace.diff("gate").replace(" fc_bias", "")
    with pytest.raises(FxquantError, match="pass 'gat' is not in the trace. Did you mean 'gate'?"):
        trace.diff("gat")


def test_pass_that_ran_twice_diffs_once_each(program: Program) -> None:
    trace = PassManager([Gate(), Drop(), Drop()]).run(program)
    assert trace.diff("drop") == trace.entries[1].diff()
    assert not trace.entries[2].modified and trace.entries[2].diff() == ""


def test_dump_writes_numbered_files(program: Program, tmp_path: Path) -> None:
    trace = PassManager([Gate(), Drop()]).run(program)
    written = trace.dump(tmp_path / "dumps")
    names = ["00_captured.txt", "01_gate.txt", "01_gate.diff", "02_drop.txt", "02_drop.diff", "trace.txt"]
    assert [path.name for path in written] == names
    assert (tmp_path / "dumps" / "02_drop.txt").read_text() == render(program)
    assert (tmp_path / "dumps" / "01_gate.diff").read_text() == trace.diff("gate")
    assert "not done by gate" in (tmp_path / "dumps" / "trace.txt").read_text()


def test_to_dict_is_json(program: Program) -> None:
    content = json.loads(json.dumps(PassManager([Gate(), Drop()]).run(program).to_dict()))
    assert [entry["pass"] for entry in content["passes"]] == ["gate", "drop"]
    assert content["passes"][0]["misses"][0]["reason"] == "a sum has no gate"
    assert content["passes"][0]["stage_after"] == "assigned"
