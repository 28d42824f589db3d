"""sequential-mse: the grid of the least output error, found as brute force finds it, stays for good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxquant
import fxquant.passes.sequential_mse as pass_file
from fxquant.errors import ConfigError, PassError
from fxquant.graph.manager import PassManager
from fxquant.graph.pass_data import PassData, float_twin
from fxquant.graph.program import Program, Stage
from fxquant.graph.segment import values_of
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.passes import Gptq, SequentialMse
from fxquant.passes.layer_products import MeasuredLayer
from fxquant.passes.quantized_layers import quantized_layers
from fxquant.reconstruction.grid_search import Candidates, Choice, Errors
from fxquant.spec import Granularity, SpecOverride
from tests.helpers import assert_golden, run_pass
from tests.passes.harness import reasons
from tests.passes.optimizing import Mixed, Small, Tokens, calibrated, codes_that_differ, images, notes, run, sqnr


def weight_quantizers(program: Program) -> dict[str, FakeQuant]:
    """By the weight's name."""
    return {str(node.args[0]): module for node, module in program.fake_quant_nodes() if module.follows}


def output_error(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Squared output error of each channel of a padded 3 x 3 convolution, on codes -7 ... 7 of `scale`."""
    spread = scale.view(-1, 1, 1, 1)
    change = torch.clamp(torch.round(weight / spread), -7, 7) * spread - weight
    return F.conv2d(x.double(), change.double(), padding=1).square().sum((0, 2, 3))


def test_scale_of_each_channel_is_the_brute_force_minimum_on_the_quantized_inputs() -> None:
    program = calibrated()
    weight = program.module.get_parameter("two.weight").detach()
    run(SequentialMse(candidates=10), program)
    x = torch.cat([found["max_pool2d_fq"] for found in values_of(program, images(), ["max_pool2d_fq"])])
    widest = weight.abs().amax((1, 2, 3)) / 7
    tried = torch.stack([widest * (index / 10) for index in range(1, 11)])
    errors = torch.stack([output_error(x, weight, scale) for scale in tried])
    chosen = weight_quantizers(program)["two_weight"].scale
    assert torch.allclose(output_error(x, weight, chosen), errors.amin(0), rtol=1e-4)
    assert not torch.allclose(chosen, widest)


def test_candidates_are_all_parts_of_the_extremes_behind_the_grid_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    program, seen = calibrated(), []
    weight = program.module.get_parameter("two.weight").detach()
    before = weight_quantizers(program)["two_weight"].scale.flatten().clone()
    original = pass_file.choose_by_row

    def watching(found: Candidates, errors_of: Errors) -> Choice:
        seen.append(found.scales)
        return original(found, errors_of)

    monkeypatch.setattr(pass_file, "choose_by_row", watching)
    run(SequentialMse(candidates=5), program)
    widest = weight.abs().amax((1, 2, 3)) / 7
    expected = torch.stack([before, *(widest * (index / 5) for index in (5, 4, 3, 2, 1))])
    assert torch.allclose(seen[1], expected, rtol=1e-5)  # of the second layer


@given(bits=st.integers(2, 8), per_tensor=st.booleans(), candidates=st.integers(1, 12))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_layers_output_error_never_grows_at_any_width(bits: int, per_tensor: bool, candidates: int) -> None:
    program = _tokens(bits, Granularity() if per_tensor else Granularity(0))
    (first, _) = quantized_layers(program)
    name = first.input.name
    x = torch.cat([found[name] for found in values_of(program, images(), [name])])
    weight, module = program.tensor(first.weight).detach(), first.fake_quant(program)
    before = (module(weight) - weight).double()
    run(SequentialMse(candidates), program)
    after = (module(weight) - weight).double()
    errors = [F.linear(x.double(), change).square().sum() for change in (before, after)]
    assert errors[1] <= errors[0] * (1 + 1e-6)


_KNOWN: dict[tuple[int, Granularity], Program] = {}


def _tokens(bits: int, granularity: Granularity) -> Program:
    key = (bits, granularity)
    if key not in _KNOWN:
        torch.manual_seed(0)
        program = fxquant.capture(Tokens().eval(), images()[0])
        pipeline = fxquant.load_pipeline("w4a8")
        passes = [item for item in pipeline.prepare_passes if item.name not in ("select-per-channel", "quantize-bias")]
        spec = SpecOverride(bits=bits, granularity=granularity)
        pipeline.changed(prepare=passes).override(weight=spec).prepare(program)
        fxquant.calibrate(program, images(), progress=False)
        _KNOWN[key] = program
    return _KNOWN[key].copy()


def test_blocks_get_grids_of_their_own() -> None:
    program = _tokens(3, Granularity(1, 4))
    reference, before = float_twin(program), sqnr(program, float_twin(program))
    old = weight_quantizers(program)["one_weight"].scale.clone()
    entry = run(SequentialMse(), program)
    assert not entry.misses and sqnr(program, reference) > before
    new = weight_quantizers(program)["one_weight"].scale
    assert new.shape == old.shape == (12, 3) and len(set((new / old).flatten().tolist())) > 3


def test_output_is_closer_to_float_on_every_kind_of_layer() -> None:
    program = calibrated(Mixed)
    reference, before = float_twin(program), sqnr(program, float_twin(program))
    run(SequentialMse(), program)
    assert sqnr(program, reference) > before + 1.0
    assert set(notes(program)) >= {"stem", "depthwise", "grouped", "tokens", "matmul"}


def test_eight_bits_are_not_left_out() -> None:
    program = calibrated(weight=SpecOverride(bits=8))
    run(SequentialMse(), program)
    assert set(notes(program)) == {"one", "two", "fc"}


def test_grids_that_were_found_are_frozen_and_survive_forwards() -> None:
    program = calibrated()
    run(SequentialMse(), program)
    assert program.stage is Stage.CALIBRATED
    scales = {name: module.scale.clone() for name, module in weight_quantizers(program).items()}
    program.module(images()[0])
    fxquant.calibrate(program, images(), progress=False)
    for name, module in weight_quantizers(program).items():
        assert module.mode is Mode.FROZEN and torch.equal(module.scale, scales[name])


def test_grid_that_training_learns_starts_at_the_one_found() -> None:
    program = calibrated(weight=SpecOverride(training="lsq"))
    frozen = calibrated()
    run(SequentialMse(), program)
    run(SequentialMse(), frozen)
    learned, found = weight_quantizers(program)["two_weight"], weight_quantizers(frozen)["two_weight"]
    assert learned.mode is Mode.LEARN
    program.module(images()[0])
    assert torch.allclose(learned.scale, found.scale, rtol=1e-5)


def test_bias_codes_do_not_overflow_on_a_narrow_range() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(12, 4)
            with torch.no_grad():
                self.one.bias.fill_(1500.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.one(x)
            return found

    program = calibrated(Biased)
    with torch.no_grad():  # the bias just fits at the grid as it is, and would not at any narrower one
        program.module.get_parameter("one.bias").fill_(0.0)
        (_, bias), (layer,) = next(iter(program.bias_nodes())), tuple(quantized_layers(program))
        smallest = float(layer.fake_quant(program).scale.min())
        program.module.get_parameter("one.bias").fill_(2**23 * float(bias.sources[0].scale) * smallest)
    run(SequentialMse(), program)
    found = bias.overflow_floor(program.module.get_parameter("one.bias"))
    assert bool((bias.sources[1].scale >= found).all())


def test_second_run_declines_because_grids_are_frozen() -> None:
    program = calibrated()
    run(SequentialMse(), program)
    entry = run(SequentialMse(), program)
    assert not entry.edits and len(entry.misses) == 3
    reason = "two left as it is: its weight's grid is frozen: another algorithm, or a file, has settled it"
    assert reason in reasons(entry)


def test_layer_that_gptq_rounded_is_left() -> None:
    program = calibrated()
    run(Gptq(), program)
    weight = program.module.get_parameter("two.weight").clone()
    entry = run(SequentialMse(), program)
    assert "two" in {miss.node for miss in entry.misses}
    assert torch.equal(program.module.get_parameter("two.weight"), weight)


def test_fixed_range_is_left_with_the_reason() -> None:
    entry = run(SequentialMse(), calibrated(weight=SpecOverride(fixed=(-0.5, 0.5))))
    assert not any(edit.action == "mode" for edit in entry.edits)
    assert any("two left as it is: its range is fixed" in reason for reason in reasons(entry))


def test_grids_across_the_inputs_are_left_with_the_reason() -> None:
    entry = run(SequentialMse(), _tokens(4, Granularity(1)))
    assert any("one left as it is: its grids, per-channel(1), do not divide" in reason for reason in reasons(entry))


def test_direct_search_finds_the_same_grids_as_second_moments() -> None:
    one, other = calibrated(), calibrated()
    run(SequentialMse(), one)
    run(SequentialMse(memory_gib=1e-9), other)
    for name, module in weight_quantizers(one).items():
        assert torch.equal(module.scale, weight_quantizers(other)[name].scale)
    first, second = notes(one), notes(other)
    assert {name: text.split(" (")[0] for name, text in first.items()} == {
        name: text.split(" (")[0] for name, text in second.items()
    }


def test_blocks_without_memory_for_their_moments_are_left_with_the_reason() -> None:
    entry = run(SequentialMse(memory_gib=1e-9), _tokens(4, Granularity(1, 4)))
    assert any("one left as it is: its blocks need" in reason for reason in reasons(entry))


@pytest.mark.parametrize("option", [{"candidates": 0}, {"memory_gib": -1.0}])
def test_option_out_of_range_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        SequentialMse(**option)


def test_run_without_batches_is_refused() -> None:
    with pytest.raises(PassError, match="measures with batches"):
        run_pass(SequentialMse(), calibrated())


def test_run_that_was_killed_goes_on_with_the_same_grids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = calibrated()
    run(SequentialMse(), whole)
    original, calls = MeasuredLayer.moment, []

    def failing(measured: MeasuredLayer) -> torch.Tensor:
        calls.append(measured.layer.node.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(measured)

    monkeypatch.setattr(pass_file.MeasuredLayer, "moment", failing)
    killed = calibrated()
    with pytest.raises(KeyboardInterrupt):
        run(SequentialMse(), killed, tmp_path)
    assert weight_quantizers(killed)["one_weight"].mode is Mode.FAKE  # rolled back
    resumed = calibrated()
    run(SequentialMse(), resumed, tmp_path)
    assert calls == ["one", "two", "two", "fc"]
    for name, module in weight_quantizers(resumed).items():
        assert torch.equal(module.scale, weight_quantizers(whole)[name].scale) and module.mode is Mode.FROZEN


def test_codes_are_those_of_onnxruntime(tmp_path: Path) -> None:
    program = calibrated()
    run(SequentialMse(), program)
    differing, compared = codes_that_differ(program, tmp_path / "model.onnx")
    assert differing == 0 and compared > 1000


def test_golden_of_what_changes() -> None:
    program = calibrated(Small)
    (entry,) = PassManager([SequentialMse()]).run(program, data=PassData(images(), progress=False)).entries
    assert_golden(entry.diff(), "sequential_mse_small.diff")
