"""select-per-block: weight specs become block-wise along the axis that a layer sums over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fxquant.errors import PassError, SpecError
from fxquant.graph.manager import PassManager
from fxquant.graph.program import Program, input_spec
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.passes import AssignSpecs, InsertFakeQuant, QuantizeBias, SelectPerBlock, SelectPerChannel
from fxquant.spec import PER_TENSOR, Granularity, QuantSpec
from tests.helpers import assert_rewrites, run_pass
from tests.passes.harness import captured, difference, output, reasons
from tests.passes.pipelines import IMAGE, before, residual


class Product(nn.Module):
    """x w with w: [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def assigned(model: nn.Module, *inputs: torch.Tensor) -> Program:
    program = captured(model, *inputs)
    PassManager([AssignSpecs()]).run(program)
    return program


def granularity(program: Program, layer: str, slot: int = 1) -> Granularity:
    spec = input_spec(program.node(layer), slot)
    assert spec is not None
    return spec.granularity


def test_weights_are_in_blocks_along_their_input_axis() -> None:
    program = before(SelectPerChannel, residual(), IMAGE)
    assert len(run_pass(SelectPerBlock(block=4), program).edits) == 3
    assert {granularity(program, name) for name in ("conv1", "conv2", "fc")} == {Granularity(1, 4)}


def test_product_with_a_parameter_is_in_blocks_along_axis_0() -> None:
    program = assigned(Product(), torch.randn(2, 8))
    run_pass(SelectPerBlock(block=4), program)
    assert granularity(program, "matmul") == Granularity(0, 4)


def test_per_channel_weights_become_block_wise_and_twice_is_once() -> None:
    program = before(SelectPerChannel, residual(), IMAGE)
    run_pass(SelectPerChannel(), program)
    run_pass(SelectPerBlock(block=4), program)
    assert granularity(program, "conv1") == Granularity(1, 4)
    assert not run_pass(SelectPerBlock(block=2), program).modified
    assert not run_pass(SelectPerChannel(), program).modified


def test_only_the_named_operations_are_changed() -> None:
    program = before(SelectPerChannel, residual(), IMAGE)
    assert len(run_pass(SelectPerBlock(ops=("linear",), block=4), program).edits) == 1
    assert granularity(program, "conv1") == PER_TENSOR


@pytest.mark.parametrize(
    ("make", "x", "kept", "reason"),
    [
        (
            lambda: nn.Conv2d(4, 8, 3),
            IMAGE,
            Granularity(0),
            "weight _0_weight stays per-channel(0): blocks of 32 do not fill axis 1 of [8, 4, 3, 3]",
        ),
        (
            lambda: nn.Conv2d(4, 4, 3, groups=4),
            IMAGE,
            Granularity(0),
            "weight _0_weight stays per-channel(0): blocks of 32 do not fill axis 1 of [4, 1, 3, 3]",
        ),
        (
            lambda: nn.Linear(48, 8),
            torch.randn(2, 48),
            Granularity(0),
            "weight _0_weight stays per-channel(0): blocks of 32 do not fill axis 1 of [8, 48]",
        ),
    ],
)
def test_weight_is_declined_with_the_reason_when_blocks_do_not_fill_it(
    make: Callable[[], nn.Module], x: torch.Tensor, kept: Granularity, reason: str
) -> None:
    program = assigned(nn.Sequential(make()), x)
    run_pass(SelectPerChannel(), program)
    entry = run_pass(SelectPerBlock(), program)
    assert not entry.modified
    assert reasons(entry) == [reason]
    assert granularity(program, "_0") == kept


def _wants_weight(program: Program, layer: str, slot: int) -> None:
    """Ask for a weight that no integer kernel needs, as a placement rule or another tool may."""
    program.node(layer).meta["input_specs"] = {slot: QuantSpec(signed=True, symmetric=True)}


def test_transposed_convolution_is_declined_with_the_reason() -> None:
    program = assigned(nn.Sequential(nn.ConvTranspose2d(4, 8, 3)), IMAGE)
    _wants_weight(program, "_0", 1)
    entry = run_pass(SelectPerBlock(block=4), program)
    assert reasons(entry) == ["weight _0_weight stays per-tensor: onnxruntime has no integer kernel for ConvTranspose"]


def test_table_that_is_looked_up_is_declined_with_the_reason() -> None:
    program = assigned(nn.Sequential(nn.Embedding(10, 8)), torch.arange(6).view(2, 3))
    _wants_weight(program, "_0", 0)
    entry = run_pass(SelectPerBlock(block=4), program)
    assert reasons(entry) == ["weight _0_weight stays per-tensor: embedding sums over none of its axes"]


def test_asymmetric_weight_may_be_in_blocks() -> None:
    program = captured(residual(), IMAGE)
    PassManager([AssignSpecs(weight=QuantSpec(bits=4))]).run(program)
    run_pass(SelectPerBlock(block=4), program)
    assert str(input_spec(program.node("conv1"), 1)) == "u4 asymmetric per-block(1, 4)"


@pytest.mark.parametrize("block", [0, -4])
def test_block_below_1_is_refused(block: int) -> None:
    with pytest.raises(SpecError, match="a block of at least 1"):
        SelectPerBlock(block=block)


def test_misspelt_operation_is_refused_with_its_nearest_name() -> None:
    program = before(SelectPerChannel, residual(), IMAGE)
    with pytest.raises(PassError, match=r"select-per-block: operation 'liner' is unknown.*'linear'"):
        run_pass(SelectPerBlock(ops=("liner",)), program)


def test_fake_quants_have_a_scale_for_each_block_and_biases_stay_in_float_with_the_reason() -> None:
    program = before(SelectPerChannel, residual(), IMAGE)
    run_pass(SelectPerChannel(), program)
    run_pass(SelectPerBlock(ops=("convolution",), block=4), program)
    PassManager([InsertFakeQuant()]).run(program)
    entry = run_pass(QuantizeBias(), program)
    assert [str(node.args[0]) for node, _ in program.bias_nodes()] == ["fc_bias"]
    assert reasons(entry)[0] == (
        "bias conv1_bias of conv1 stays in float: its layer's weight is per-block(1, 4), not one scale for each "
        "output channel"
    )
    module = program.module.get_submodule("fake_quants.conv2_weight")
    assert isinstance(module, FakeQuant) and module.scale.shape == (8, 2, 3, 3)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            AssignSpecs(activation=QuantSpec(granularity=Granularity(1, 4))),
            r"activation 'x' is wanted per-block\(1, 4\)",
        ),
        (
            AssignSpecs(weight=QuantSpec(signed=True, granularity=Granularity(1, 3))),
            r"value 'conv1_weight'.*per-block\(1, 3\).*blocks that fill the axis; got a tensor \[8, 4, 3, 3\]",
        ),
    ],
)
def test_blocks_that_cannot_be_are_refused_by_name_when_inserted(specs: AssignSpecs, message: str) -> None:
    program = captured(residual(), IMAGE)
    with pytest.raises(PassError, match=message):
        PassManager([specs, InsertFakeQuant()]).run(program)


def test_outputs_are_preserved() -> None:
    model = residual()
    program = before(SelectPerChannel, model, IMAGE)
    run_pass(SelectPerBlock(block=4), program, IMAGE)
    assert difference(program, output(model, IMAGE), IMAGE) == 0.0


def test_diff_is_golden() -> None:
    program = before(SelectPerChannel, nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    entry = run_pass(SelectPerBlock(block=2), program)
    changed = [line for line in entry.diff().splitlines() if line.startswith("+") and "per-block(1, 2)" in line]
    assert len(changed) == 1 and changed[0].startswith("+_0 = aten.linear(")
    assert_rewrites(run_pass(SelectPerBlock(block=2), program), "", 0)
