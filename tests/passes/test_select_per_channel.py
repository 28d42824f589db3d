"""select-per-channel: weight specs become per channel, on the operation's own axis."""

from __future__ import annotations

import torch
from torch import nn

from fxquant.graph.manager import PassManager
from fxquant.graph.program import input_spec
from fxquant.passes import AssignSpecs, SelectPerChannel
from fxquant.spec import Granularity, QuantSpec
from tests.helpers import assert_rewrites, run_pass
from tests.passes.harness import captured, difference, output, reasons
from tests.passes.pipelines import IMAGE, before, residual


def test_weights_become_per_channel() -> None:
    program = before(SelectPerChannel, residual(), IMAGE)
    entry = run_pass(SelectPerChannel(), program)
    assert len(entry.edits) == 3
    for name in ("conv1", "conv2", "fc"):
        spec = input_spec(program.node(name), 1)
        assert spec is not None and spec.granularity == Granularity(0)


def test_only_the_named_operations_are_changed() -> None:
    program = before(SelectPerChannel, residual(), IMAGE)
    assert len(run_pass(SelectPerChannel(ops=("linear",)), program).edits) == 1


def test_asymmetric_weight_is_declined_with_the_reason() -> None:
    program = captured(residual(), IMAGE)
    PassManager([AssignSpecs(weight=QuantSpec(signed=True))]).run(program)
    entry = run_pass(SelectPerChannel(), program)
    assert not entry.modified
    assert reasons(entry)[0] == "weight conv1_weight stays per tensor: its spec is asymmetric"


def test_outputs_are_preserved_and_twice_is_once() -> None:
    model = residual()
    program = before(SelectPerChannel, model, IMAGE)
    run_pass(SelectPerChannel(), program, IMAGE)
    assert difference(program, output(model, IMAGE), IMAGE) == 0.0
    assert not run_pass(SelectPerChannel(), program).modified


def test_diff_is_golden() -> None:
    program = before(SelectPerChannel, nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    entry = run_pass(SelectPerChannel(), program)
    changed = [line for line in entry.diff().splitlines() if line.startswith("+") and "per-channel(0)" in line]
    assert len(changed) == 1 and changed[0].startswith("+_0 = aten.linear(")
    assert_rewrites(run_pass(SelectPerChannel(), program), "", 0)
