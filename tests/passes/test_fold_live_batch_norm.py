"""fold-live-batch-norm: finalize changes no code, before and after training; what is left is what folding leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from fxquant.graph.program import Program
from fxquant.lowering.export import export_onnx
from fxquant.passes import FoldBatchNorm, FoldLiveBatchNorm, FreezeBatchNorm, SimulateBatchNormFold
from tests.helpers import assert_rewrites, residual_program, run_pass
from tests.passes.harness import Chain, batch_norm_nodes, captured, randomize
from tests.passes.live import IMAGE, NETS, codes, differing, finalized, model_of, prepared, train

TRAINED = ("reuse", "two norms", "nested", "tiny variance", "tokens", "no activation")


def report(case: str, one: Program, other: Program, x: torch.Tensor) -> int:
    """Prints and returns how many codes differ between two programs, and checks their outputs in both simulations."""
    found = codes(one, x)
    count = differing(found, codes(other, x))
    print(f"{case}: {count} of {sum(map(torch.numel, found.values()))} codes differ at {len(found)} quantizers")
    for form in ("float", "exact"):
        one.simulate = other.simulate = form
        with torch.no_grad():
            assert torch.equal(one.module(x), other.module(x)), form
    return count


OTHER_PRESETS = [(case, preset) for case in ("nested", "tokens") for preset in ("int8_per_tensor_qat", "w4a8_qat")]


@pytest.mark.parametrize(("case", "preset"), [*((case, "int8_per_channel_qat") for case in NETS), *OTHER_PRESETS])
def test_finalize_changes_no_code_after_calibration(case: str, preset: str) -> None:
    program, x = prepared(case, preset), NETS[case][1]
    assert report(case, program, finalized(program, preset), x) == 0


@pytest.mark.parametrize("case", TRAINED)
def test_finalize_changes_no_code_after_training(case: str) -> None:
    program, x = prepared(case), NETS[case][1]
    before = codes(program, x)
    train(program, x)
    assert differing(before, codes(program, x)) > 0
    assert report(case, program, finalized(program), x) == 0


def test_finalize_changes_no_code_when_batch_norm_is_frozen_half_way() -> None:
    program = prepared("nested")
    train(program, IMAGE, steps=2)
    run_pass(FreezeBatchNorm(), program)
    train(program, IMAGE, steps=2)
    assert report("frozen half way", program, finalized(program), IMAGE) == 0


def test_bias_that_training_moved_beyond_its_codes_is_settled_by_eval() -> None:
    program = prepared("nested")
    beta = program.module.get_parameter("stem.1.bias")  # of a channel whose gamma is 0
    with torch.no_grad():
        beta[0] = 40.0 * beta[0].abs() + 1.0
    program.module.train()
    program.module.eval()
    assert report("moved bias", program, finalized(program), IMAGE) == 0
    assert int(codes(program, IMAGE)["stem_0_bias_folded_fq"].abs().max()) <= 2**23


def test_finalizing_a_program_in_training_mode_folds_what_eval_computes() -> None:
    program = prepared("nested")
    found = finalized(program)
    program.module.train()
    assert differing(codes(found, IMAGE), codes(finalized(program), IMAGE)) == 0


def test_a_slightly_other_fold_would_be_seen() -> None:
    program = prepared("nested")
    before = codes(program, IMAGE)
    moved = program.copy()
    with torch.no_grad():
        moved.module.get_parameter("stem.1.weight").mul_(1.001)
    assert differing(before, codes(finalized(moved), IMAGE)) > 0


@pytest.mark.parametrize("case", ["nested", "reuse"])
def test_trained_program_exports_fused_and_exact(case: str, tmp_path: Path) -> None:
    program, x = prepared(case), NETS[case][1]
    train(program, x)
    program.simulate = "exact"
    final = finalized(program)
    export_onnx(final, tmp_path / "model.onnx")
    found = fxquant.check_parity(final, tmp_path / "model.onnx", [(x,)])
    print(str(found).splitlines()[0])
    assert found.exact and "0 float islands, 0 uncertified" in str(found)


def test_live_program_exports_as_it_would_be_finalized(tmp_path: Path) -> None:
    program = prepared("nested")
    for name, item in (("live", program), ("final", finalized(program))):
        export_onnx(item, tmp_path / f"{name}.onnx")
    live = fxquant.check_parity(program, tmp_path / "live.onnx", [(IMAGE,)])
    final = fxquant.check_parity(finalized(program), tmp_path / "final.onnx", [(IMAGE,)])
    assert live.exact and final.exact and len(live.rows) == len(final.rows)


@pytest.mark.parametrize("case", ["conv without bias", "conv with bias, eps=1e-3", "transposed, grouped", "nested"])
def test_state_is_that_of_fold_batch_norm_to_rounding(case: str) -> None:
    model, x = model_of(case)
    live, folded = captured(model, x), captured(model, x)
    run_pass(SimulateBatchNormFold(), live)
    run_pass(FoldLiveBatchNorm(), live, x)
    run_pass(FoldBatchNorm(), folded)
    assert batch_norm_nodes(live) == []
    state = folded.module.state_dict()
    assert live.module.state_dict().keys() == state.keys()
    for name, tensor in live.module.state_dict().items():
        assert torch.allclose(tensor, state[name], rtol=1e-6, atol=1e-6), name
    assert run_pass(FoldLiveBatchNorm(), live).edits == ()  # twice is once


def test_weight_that_others_read_stays_and_each_layer_gets_its_own() -> None:
    model, x = model_of("reuse")
    program = captured(model, x)
    weight = program.module.get_parameter("conv.weight")
    run_pass(SimulateBatchNormFold(), program)
    run_pass(FoldLiveBatchNorm(), program, x)
    assert program.module.get_parameter("conv.weight") is weight
    assert sorted(name for name, _ in program.module.named_buffers()) == [
        "folded.conv_bias_folded.value",
        "folded.conv_bias_folded_1.value",
        "folded.conv_weight_folded.value",
        "folded.conv_weight_folded_1.value",
    ]
    assert "shared.weight" not in program.module.state_dict()


def test_edits_are_those_of_the_golden_diff() -> None:
    program = residual_program()
    run_pass(SimulateBatchNormFold(), program)
    assert_rewrites(
        run_pass(FoldLiveBatchNorm(), program),
        """
        - bn_weight = get bn.weight : float32[4]
        - bn_bias = get bn.bias : float32[4]
        - bn_running_mean = get bn.running_mean : float32[4]
        - bn_running_var = get bn.running_var : float32[4]
        - bn_ratio = BatchNormRatio[bn.ratio](bn_weight, bn_running_var) : float32[4]  @bn
        - conv_weight_folded = fxquant.scale_channels(conv_weight, bn_ratio, axis=0, groups=1) : \
float32[4, 3, 3, 3]  @conv
        - conv_bias_folded = BatchNormShift[bn.shift](None, bn_bias, bn_running_mean, bn_ratio) : float32[4]  @bn
        - conv = aten.convolution(x, conv_weight_folded, bias=conv_bias_folded, padding=1) : float32[s0, 4, 8, 8]  @conv
        - bn = LiveBatchNorm[bn](conv, bn_ratio, eps=0.001, momentum=0.03) : float32[s0, 4, 8, 8]  @bn
        - relu = aten.relu(bn) : float32[s0, 4, 8, 8]  @relu
        + conv_bias = get conv.bias : float32[4]
        + conv = aten.convolution(x, conv_weight, bias=conv_bias, padding=1) : float32[s0, 4, 8, 8]  @conv
        + relu = aten.relu(conv) : float32[s0, 4, 8, 8]  @relu
        """,
        edits=15,
    )


def test_parameters_that_were_frozen_stay_frozen() -> None:
    model = randomize(Chain(conv=nn.Conv2d(4, 6, 3, bias=False), bn=nn.BatchNorm2d(6))).requires_grad_(False)
    program = captured(model, IMAGE)
    run_pass(SimulateBatchNormFold(), program)
    run_pass(FoldLiveBatchNorm(), program, IMAGE)
    assert [name for name, tensor in program.module.named_parameters() if not tensor.requires_grad] == [
        "conv.weight",
        "conv.bias",
    ]


def test_coverage_counts_the_same_integer_operations_before_and_after_the_fold() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.randn(4, 3, 8, 8)
    sim = fxquant.QuantSim(model, x, "int8_per_channel_qat")
    sim.compute_encodings([x], progress=False)
    live, folded = sim.program.coverage(), sim.snapshot().coverage()
    assert live.operations is not None and folded.operations is not None
    assert set(live.operations) - {"_1"} == set(folded.operations) and live.float_islands == ()
    reasons = {row.value: row.reason for row in live.in_float}
    assert reasons["_0_weight"] == "'_0_weight_folded' is computed from it"


class Shared(nn.Module):
    """A block with a batch norm that stands at two paths, and is called at both."""

    def __init__(self, at: str) -> None:
        super().__init__()
        block = Chain(conv=nn.Conv2d(4, 4, 3, padding=1, bias=False), norm=nn.BatchNorm2d(4), relu=nn.ReLU())
        self.blocks = nn.ModuleList([block, block] if at == "list" else [block])
        self.alias = block if at == "attribute" else None
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.blocks, *([] if self.alias is None else [self.alias])):
            x = block(x)
        return torch.as_tensor(self.head(x))


@pytest.mark.parametrize("freezes", [False, True], ids=["live", "frozen half way"])
@pytest.mark.parametrize("at", ["list", "attribute"])
def test_block_that_stands_at_two_paths_is_trained_and_exported(at: str, freezes: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sim = fxquant.QuantSim(randomize(Shared(at)).eval(), IMAGE, "int8_per_channel_qat")
    sim.compute_encodings([IMAGE], progress=False)
    train(sim.program, IMAGE, steps=2)
    if freezes:
        sim.freeze_batch_norm()
        train(sim.program, IMAGE, steps=2)
    final = sim.snapshot()
    assert not [name for name, module in final.module.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert report(at, sim.program, final, IMAGE) == 0
    sim.program.simulate = "exact"
    sim.export(tmp_path)
    found = sim.check_parity(tmp_path / "model.onnx", [(IMAGE,)])
    assert found.exact and "0 float islands, 0 uncertified" in str(found)
