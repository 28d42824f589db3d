"""Float checkpoints of the original model, into the program and out of it."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import FxquantError
from fxquant.graph.manager import PassManager
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage
from fxquant.graph.rewriter import Rewriter
from fxquant.numerics.fake_quant import Mode
from fxquant.passes.fold_constants import FoldConstants
from tests.training.residual import FOLDED, LIVE, Net, batches, float_net, simulated, train


def through_file(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """As torch.load(weights_only=True) brings it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    found: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
    return found


def float_output(program: Program, x: torch.Tensor) -> torch.Tensor:
    """What the program computes with its quantizers off."""
    twin = program.copy()
    for _, module in twin.fake_quant_nodes():
        module.mode = Mode.OFF
    found: torch.Tensor = twin.module.eval()(x)
    return found


@pytest.mark.parametrize("stage", ["captured", "calibrated", "training", "frozen", "from a file"])
def test_checkpoint_is_loaded_while_batch_norm_lives(stage: str, tmp_path: Path) -> None:
    sim = simulated(LIVE, "lsq+")
    program = fxquant.capture(float_net(), batches()[0]) if stage == "captured" else sim.program
    if stage == "training":
        train(program.module.train(), torch.optim.SGD(program.module.parameters(), 1e-2))
    if stage == "frozen":
        sim.freeze_batch_norm()
    if stage == "from a file":
        program.save(tmp_path / "p.fxq")
        program = fxquant.load_program(tmp_path / "p.fxq")
    before = dict(program.module.named_parameters())
    other = float_net(seed=5)
    program.load_float_state_dict(through_file(other.state_dict()))
    assert all(before[name] is one for name, one in program.module.named_parameters())
    torch.testing.assert_close(float_output(program, batches()[1]), other(batches()[1]), rtol=1e-4, atol=1e-5)


def test_weight_grids_follow_in_eval_mode_and_activations_stay() -> None:
    program = simulated().program
    program.module.eval()
    grids = {node.name: (module.follows, module.scale.clone()) for node, module in program.fake_quant_nodes()}
    state = {
        key: value * 3 if key.endswith("conv.weight") else value for key, value in float_net().state_dict().items()
    }
    program.load_float_state_dict({**state, "fc.bias": torch.full((5,), 1e7)})
    for node, module in program.fake_quant_nodes():
        follows, scale = grids[node.name]
        changed = not torch.equal(module.scale, scale)
        assert changed == (follows and ("conv" in node.name or "fc" in node.name)), node.name


def test_state_out_is_the_checkpoint_of_the_trained_model() -> None:
    program = simulated(LIVE, "lsq").program
    train(program.module.train(), torch.optim.SGD(program.module.parameters(), 1e-2))
    state = {key: value for key, value in program.module.state_dict().items() if not key.startswith("fake_quants.")}
    model = Net().eval()
    model.load_state_dict(through_file(state))
    torch.testing.assert_close(float_output(program, batches()[1]), model(batches()[1]), rtol=1e-4, atol=1e-5)


def test_folded_tensors_are_refused_by_name_and_pass(tmp_path: Path) -> None:
    program = simulated(FOLDED).program
    program.save(tmp_path / "p.fxq")
    for each in (program, program.copy(), fxquant.load_program(tmp_path / "p.fxq")):
        with pytest.raises(FxquantError, match="'fold-batch-norm' has changed .*stem.weight.*bn.running_var") as caught:
            each.load_float_state_dict(float_net().state_dict())
        assert "fc.weight" not in str(caught.value)


@pytest.mark.parametrize(("preset", "is_advised"), [(LIVE, False), (FOLDED, True)])
def test_qat_preset_is_advised_where_it_helps(preset: str, is_advised: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    program = fxquant.QuantSim(copy.deepcopy(model), batches()[0], preset).program
    with pytest.raises(FxquantError, match="has changed .*0.weight.*Load it right after capture") as caught:
        program.load_float_state_dict(model.state_dict())
    assert ("'_qat' preset" in str(caught.value)) == is_advised


def test_tensors_that_no_pass_changed_can_be_loaded_alone() -> None:
    program = simulated(FOLDED).program
    state = float_net(seed=5).state_dict()
    found = program.load_float_state_dict({"fc.weight": state["fc.weight"]}, strict=False)
    assert torch.equal(program.module.fc.weight, state["fc.weight"])
    assert {"fc.bias", "block.conv.weight"} <= set(found.missing)
    assert "stem.weight" not in found.missing
    with pytest.raises(FxquantError, match="'fold-batch-norm' has changed stem.weight"):
        program.load_float_state_dict({"stem.weight": state["stem.weight"]}, strict=False)


def test_finalized_program_is_refused() -> None:
    with pytest.raises(FxquantError, match="expected a program before finalize; got a finalized one"):
        simulated().snapshot().load_float_state_dict(float_net().state_dict())


def test_tensor_that_was_computed_for_good_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight * self.gain) + self.gain

    program = fxquant.capture(Scaled(), torch.randn(2, 4))
    PassManager([FoldConstants()]).run(program)
    with pytest.raises(FxquantError, match="'fold-constants' has changed weight, gain"):
        program.load_float_state_dict(Scaled().state_dict())


def test_all_that_does_not_fit_is_in_one_error_and_nothing_is_loaded() -> None:
    program = simulated().program
    state = float_net(seed=5).state_dict()
    wrong = {key: value for key, value in state.items() if key != "fc.bias"}
    wrong |= {"fc.bais": torch.zeros(5), "stem.weight": torch.zeros(3), "bn.weight": torch.zeros(8, dtype=torch.int64)}
    before = {key: value.clone() for key, value in program.module.state_dict().items()}
    with pytest.raises(FxquantError) as caught:
        program.load_float_state_dict(wrong)
    text = str(caught.value)
    for part in (
        "'stem.weight' has shape (3,), not (8, 3, 3, 3)",
        "'bn.weight' is torch.int64, not torch.float32",
        "missing 'fc.bias'",
        "unexpected 'fc.bais' (did you mean 'fc.bias'?)",
    ):
        assert part in text
    assert all(torch.equal(now.nan_to_num(), before[k].nan_to_num()) for k, now in program.module.state_dict().items())


def test_wrapped_checkpoints_are_refused_with_the_way_in() -> None:
    program, state = simulated().program, float_net().state_dict()
    with pytest.raises(FxquantError, match=r"names that begin with 'module\.'.*removeprefix\('module\.'\)"):
        program.load_float_state_dict({f"module.{key}": value for key, value in state.items()})
    with pytest.raises(FxquantError, match=r"below the key 'model'. Give it checkpoint\['model'\]"):
        program.load_float_state_dict({"epoch": 3, "model": state})
    with pytest.raises(FxquantError, match="keys of 'fake_quants', which program.module.load_state_dict takes"):
        program.load_float_state_dict(program.module.state_dict())


def test_one_name_of_a_tied_tensor_is_enough_and_two_values_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    program = fxquant.capture(model, torch.randn(2, 4))
    state = model.state_dict()
    alone = {key: value + 1 for key, value in state.items() if key != "2.weight"}
    program.load_float_state_dict(alone)
    assert torch.equal(program.module.get_parameter("2.weight"), alone["0.weight"])
    with pytest.raises(FxquantError, match="'2.weight' and '0.weight' are one tensor, and differ"):
        program.load_float_state_dict({**alone, "2.weight": state["2.weight"]})


def test_checkpoint_with_nan_is_refused_by_name() -> None:
    program, state = simulated().program, float_net(seed=5).state_dict()
    state["bn.running_mean"][:2] = torch.nan
    with pytest.raises(FxquantError, match="got 'bn.running_mean' has 2 NaN$"):
        program.load_float_state_dict(state)


@pytest.mark.parametrize("shows_in_version", [True, False])
def test_tensor_that_a_pass_wrote_in_place_is_refused(shows_in_version: bool) -> None:
    @dataclass(frozen=True)
    class Double(Pass):
        name: ClassVar[str] = "double"
        stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
        contract: ClassVar[Contract] = Contract.CHANGES

        def rewrite(self, program: Program, rewriter: Rewriter) -> None:
            with torch.no_grad(), rewriter.editing("fc") as module:
                weight = module.get_parameter("weight")
                (weight if shows_in_version else weight.data).mul_(2.0)

    program = fxquant.capture(float_net(), batches()[0])
    PassManager([Double()]).run(program)
    with pytest.raises(FxquantError, match="'double' has changed fc.weight\\. Load"):
        program.load_float_state_dict(float_net().state_dict())


def test_what_the_model_does_not_use_is_loaded_too() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.used(x)
            return found

    program, other = fxquant.capture(Spare(), torch.randn(2, 4)), Spare()
    assert program.load_float_state_dict(other.state_dict()) == fxquant.graph.float_state.LoadedKeys((), ())
    assert torch.equal(program.module.get_parameter("spare.weight"), other.spare.weight)
