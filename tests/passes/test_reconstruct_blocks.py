"""reconstruct-blocks: learned rounding block by block; what a block is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant.passes.rounding_run as rounding_run
from fxquant.errors import PassError
from fxquant.graph.pass_data import PassData
from fxquant.graph.pipeline import load_pipeline, parse_pipeline
from fxquant.graph.program import Program
from fxquant.graph.trace import PassEntry
from fxquant.lowering.export import export_onnx
from fxquant.parity import check_parity
from fxquant.passes import AdaRound, ReconstructBlocks
from fxquant.passes.blocks import block_of, block_of_path, find_blocks
from fxquant.passes.quantized_layers import quantized_layers
from fxquant.reconstruction import Unit
from tests.helpers import assert_golden, run_pass
from tests.passes.harness import Chain, captured, reasons
from tests.passes.pipelines import residual
from tests.passes.test_adaround import Killed as Killed
from tests.passes.test_adaround import codes, error, kill_at
from tests.reconstruction.layers import calibrated, correlated

BATCHES = [correlated(24, 4, 8, 8, seed=index) for index in range(2)]
FAST = ReconstructBlocks(iterations=80)


class Block(nn.Module):
    """Two convolutions and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + x)


class TwoOutputs(nn.Module):
    """A module whose two convolutions are both read outside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), self.b(x)


class Sum(nn.Module):
    """The sum of what a module with two outputs gives."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.last = TwoOutputs(), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.pair(x)
        return torch.as_tensor(self.last(a + b))


def blocks_net() -> nn.Module:
    """A stem, two residual blocks and a head."""
    torch.manual_seed(0)
    parts = {"stem": nn.Conv2d(4, 4, 3, padding=1), "body": nn.Sequential(Block(), Block()), "head": nn.Conv2d(4, 4, 1)}
    return Chain(**parts)


def ran(model: nn.Module, item: ReconstructBlocks = FAST, folder: Path | None = None) -> tuple[Program, PassEntry]:
    """A calibrated net that went through the pass."""
    program = calibrated(model, BATCHES)
    return program, run_pass(item, program, data=PassData(BATCHES, folder, progress=False))


def units(model: nn.Module, item: ReconstructBlocks = FAST) -> dict[str, tuple[int, list[str], str]]:
    """By name of a unit: how many weights it has, what it reads, and its output."""
    program = calibrated(model, BATCHES)
    layers = list(quantized_layers(program))
    found = item.units(program, None, layers)  # type: ignore[arg-type]
    return {unit.name: (len(unit.weights), [str(node) for node in unit.inputs], unit.output.name) for unit in found}


def test_modules_with_a_residual_sum_are_blocks_and_the_rest_are_layers() -> None:
    assert units(blocks_net()) == {
        "stem": (1, ["x_fq"], "stem"),
        "body.0": (2, ["stem"], "body_0_relu_1"),
        "body.1": (2, ["body_0_relu_1"], "body_1_relu_1"),
        "head": (1, ["body_1_relu_1_fq"], "head"),
    }


def test_dominators_cut_out_a_branch_that_is_in_no_module() -> None:
    assert units(residual()) == {
        "conv1": (1, ["x_fq"], "relu"),
        "add": (1, ["pool"], "relu_1"),
        "fc": (1, ["flatten_fq"], "fc"),
    }


def test_blocks_of_more_layers_than_wanted_are_taken_apart() -> None:
    assert list(units(blocks_net(), ReconstructBlocks(largest=1))) == [
        "stem",
        "body_0_conv1",
        "body_0_conv2",
        "body_1_conv1",
        "body_1_conv2",
        "head",
    ]


def test_named_block_may_hold_several_modules() -> None:
    assert units(blocks_net(), ReconstructBlocks(blocks=("body",)))["body"] == (4, ["stem"], "body_1_relu_1")


def test_what_is_not_closed_is_no_block_and_says_why() -> None:
    program = calibrated(Sum(), BATCHES)
    layers = list(quantized_layers(program))
    assert block_of_path(program, "pair", layers) == "it has not one output, but pair_a, pair_b"
    assert block_of_path(program, "nothing", layers) == "no layer whose weight is quantized is in it"
    assert all(unit.name != "pair" for unit in find_blocks(program, layers, 8))


def test_named_block_that_is_not_closed_is_told_and_its_layers_are_rounded_alone() -> None:
    program, entry = ran(Sum(), ReconstructBlocks(iterations=60, blocks=("pair",)))
    assert reasons(entry)[0] == "pair is no block: it has not one output, but pair_a, pair_b"
    told = {note.place for note in program.notes} | {miss.node for miss in entry.misses}
    assert told >= {"pair_a", "pair_b", "last"}


def test_unknown_block_is_refused_with_the_nearest() -> None:
    with pytest.raises(PassError, match="'body.2' is no module of the graph.*body.0"):
        ran(blocks_net(), ReconstructBlocks(blocks=("body.2",)))


def test_overlapping_blocks_are_refused() -> None:
    with pytest.raises(PassError, match="'body' and 'body.1' overlap"):
        ran(blocks_net(), ReconstructBlocks(blocks=("body", "body.1")))


def test_block_that_reads_what_is_computed_from_it_is_none() -> None:
    program = calibrated(Block(), BATCHES)
    nodes = {program.node(name) for name in ("conv1", "relu", "add")}
    found = block_of(program, "conv1, relu, add", nodes, list(quantized_layers(program)))
    assert found == "it has not one output, but add, relu"
    nodes = {program.node(name) for name in ("conv1", "conv1_weight", "add")} | {program.node("relu")}
    model = Chain(one=nn.Conv2d(4, 4, 1), two=nn.Conv2d(4, 4, 1), three=nn.Conv2d(4, 4, 1))
    chain = calibrated(model, BATCHES)
    ends = {node for node in chain.graph.nodes if node.name.startswith(("one", "three"))}
    reason = block_of(chain, "one and three", ends, list(quantized_layers(chain)))
    assert reason == "it has not one output, but one, three"
    behind = ends | {node for node in chain.graph.nodes if node.op == "output"}
    assert isinstance(block_of(chain, "ends", behind, list(quantized_layers(chain))), str)


def test_output_comes_nearer_to_float_than_by_nearest() -> None:
    before, reference = calibrated(blocks_net(), BATCHES), captured(blocks_net(), BATCHES[0])
    program, entry = ran(blocks_net())
    assert entry.edits and error(program, reference) < 0.8 * error(before, reference)


def test_weights_of_a_block_are_kept_at_nearest_together_where_that_is_as_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rounding_run.Reconstruction, "is_better", property(lambda self: self.unit != "body.0"))
    before = codes(calibrated(blocks_net(), BATCHES))
    program, entry = ran(blocks_net())
    (reason,) = reasons(entry)
    assert reason.startswith("body.0 rounded to nearest, which is as good: output error ")
    same = {name for name, found in codes(program).items() if torch.equal(found, before[name])}
    assert {"body_0_conv1_weight_fq", "body_0_conv2_weight_fq"} <= same and len(same) < len(before)


def test_drop_changes_what_is_learned_and_1_means_float_activations() -> None:
    found = [codes(ran(blocks_net(), ReconstructBlocks(iterations=60, drop=drop))[0]) for drop in (0.0, 0.5)]
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_second_run_declines_what_is_settled() -> None:
    program, _ = ran(blocks_net())
    before = program.fingerprint()
    entry = run_pass(FAST, program, data=PassData(BATCHES, progress=False))
    assert entry.edits == () and program.fingerprint() == before and len(entry.misses) == 6


def test_killed_run_goes_on_with_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole, _ = ran(blocks_net())
    with monkeypatch.context() as patch:
        kill_at(patch, 2)
        with pytest.raises(Killed):
            ran(blocks_net(), folder=tmp_path)
    program, _ = ran(blocks_net(), folder=tmp_path)
    assert program.fingerprint() == whole.fingerprint() and len(list(tmp_path.iterdir())) == 4


def test_diff_shows_frozen_weights_alone() -> None:
    program = calibrated(residual(), BATCHES)
    before = program.copy()
    run_pass(FAST, program, data=PassData(BATCHES, progress=False))
    assert_golden(before.diff(program), "reconstruct_blocks_residual.diff")


def test_pipeline_reads_it_and_export_has_0_differing_codes(tmp_path: Path) -> None:
    pipeline = load_pipeline("w4a8").changed(optimize=[ReconstructBlocks(iterations=60, blocks=("body.0",))])
    assert parse_pipeline(pipeline.to_toml(), "again", place="text").to_toml() == pipeline.to_toml()
    program = calibrated(blocks_net(), BATCHES, pipeline)
    pipeline.optimize(program, BATCHES, progress=False)
    pipeline.finalize(program)
    export_onnx(program, tmp_path / "model.onnx")
    assert check_parity(program, tmp_path / "model.onnx", BATCHES).exact


def test_layers_in_no_block_are_those_of_adaround() -> None:
    program = calibrated(blocks_net(), BATCHES)
    layers = list(quantized_layers(program))
    alone = {unit.name: unit for unit in AdaRound().units(program, None, layers)}  # type: ignore[arg-type]
    for unit in FAST.units(program, None, layers):  # type: ignore[arg-type]
        assert isinstance(unit, Unit) and (not unit.is_layer or alone[unit.name] == unit)
