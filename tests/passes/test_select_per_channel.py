"""select-per-channel: weight specs become per channel, on the operation's own axis."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxquant.graph.manager import PassManager
from fxquant.graph.program import Program, input_spec
from fxquant.passes import AssignSpecs, SelectPerChannel
from fxquant.spec import Granularity, QuantSpec
from tests.helpers import assert_rewrites, run_pass
from tests.passes.harness import captured, difference, output, reasons
from tests.passes.pipelines import IMAGE, before, residual

GROUPED = "no axis of a grouped transposed convolution's weight has an index for each output channel"


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


def transposed(layer: nn.ConvTranspose2d) -> Program:
    """The layer's program, its weight assigned per tensor."""
    program = captured(layer, torch.randn(1, 8, 4, 4))
    assign = AssignSpecs(weight=QuantSpec(signed=True, symmetric=True), integer_ops=("ConvTranspose",))
    PassManager([assign]).run(program)
    return program


@pytest.mark.parametrize("groups", [2, 8])
def test_grouped_transposed_convolution_is_declined_with_the_reason(groups: int) -> None:
    program = transposed(nn.ConvTranspose2d(8, 8, 3, groups=groups))
    entry = run_pass(SelectPerChannel(), program)
    assert not entry.modified and len(reasons(entry)) == 1
    assert reasons(entry)[0].endswith("stays per tensor: " + GROUPED)


def test_transposed_convolution_of_one_group_becomes_per_channel() -> None:
    program = transposed(nn.ConvTranspose2d(8, 6, 3))
    run_pass(SelectPerChannel(), program)
    (node,) = (node for node in program.graph.nodes if node.target is torch.ops.aten.convolution.default)
    spec = input_spec(node, 1)
    assert spec is not None and spec.granularity == Granularity(1)


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
