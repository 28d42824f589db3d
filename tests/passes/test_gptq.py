"""gptq: codes are fixed, outputs come closer to the float weights', and what is settled is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
import fxquant.passes.gptq as pass_file
from fxquant.errors import ConfigError, PassError
from fxquant.graph.manager import PassManager
from fxquant.graph.pass_data import PassData, float_twin
from fxquant.graph.program import Program, Stage
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.passes import Gptq, SequentialMse
from fxquant.passes.quantized_layers import quantized_layers
from fxquant.spec import Granularity, SpecOverride
from tests.helpers import assert_golden, run_pass
from tests.passes.harness import reasons
from tests.passes.optimizing import Mixed, Small, Tokens, calibrated, codes_that_differ, images, notes, run, sqnr


def weights(program: Program) -> dict[str, tuple[FakeQuant, torch.Tensor]]:
    """Each weight's FakeQuant and values, by the weight's name."""
    found = {}
    for node, module in program.fake_quant_nodes():
        source: Any = node.args[0]
        if module.follows:
            found[source.name] = module, program.tensor(source).detach()
    return found


def test_every_weight_ends_on_its_grid_and_the_grid_stays() -> None:
    program = calibrated(Mixed)
    scales = {name: module.scale.clone() for name, (module, _) in weights(program).items()}
    entry = run(Gptq(), program)
    left = {miss.node for miss in entry.misses}
    assert left == {"up"} and program.stage is Stage.CALIBRATED
    assert reasons(entry) == ["up left as it is: its weight is not quantized"]  # a float island in onnxruntime
    for name, (module, weight) in weights(program).items():
        if name.removesuffix("_weight") not in left:
            assert module.mode is Mode.FROZEN
            assert torch.equal(module.real(module.codes(weight)), weight)
        assert torch.equal(module.scale, scales[name])


@pytest.mark.parametrize("act_order", [False, True])
def test_output_is_closer_to_float_than_with_nearest_codes(act_order: bool) -> None:
    program = calibrated()
    reference, before = float_twin(program), sqnr(program, float_twin(program))
    run(Gptq(act_order=act_order), program)
    assert sqnr(program, reference) > before + 3.0


def test_layers_output_error_is_what_its_note_says_and_less_than_before() -> None:
    program = calibrated()
    entry = run(Gptq(), program)
    layers = {"one", "two", "fc"} - {miss.node for miss in entry.misses}
    assert set(notes(program)) == layers and len(layers) >= 2
    for text in notes(program).values():
        before, after = text.removeprefix("gptq: output error ").split(" (")[0].split(" -> ")
        assert float(after) <= float(before)


def test_layer_reads_what_the_rounded_layers_before_it_leave() -> None:
    whole, single = calibrated(), calibrated()
    run(Gptq(), whole)
    first = next(iter(quantized_layers(single)))
    with torch.no_grad():  # the first layer as the whole run left it: the second must then come out the same
        single.module.get_parameter("one.weight").copy_(whole.module.get_parameter("one.weight"))
        first.fake_quant(single).mode = Mode.FROZEN
    run(Gptq(), single)
    assert torch.equal(single.module.get_parameter("two.weight"), whole.module.get_parameter("two.weight"))
    alone = calibrated()
    with torch.no_grad():
        alone.module.get_parameter("one.weight").mul_(0.3)  # other inputs, other codes
    run(Gptq(), alone)
    assert not torch.equal(alone.module.get_parameter("two.weight"), whole.module.get_parameter("two.weight"))


@pytest.mark.parametrize("granularity", [Granularity(), Granularity(1, 2), Granularity(0)], ids=str)
def test_grids_per_tensor_per_block_and_per_channel_are_kept(granularity: Granularity) -> None:
    torch.manual_seed(0)
    program = fxquant.capture(Tokens().eval(), images()[0])
    pipeline = fxquant.load_pipeline("w4a8")
    passes = [item for item in pipeline.prepare_passes if item.name not in ("select-per-channel", "quantize-bias")]
    changed = pipeline.changed(prepare=passes).override(weight=SpecOverride(granularity=granularity))
    changed.prepare(program)
    fxquant.calibrate(program, images(), progress=False)
    reference, before = float_twin(program), sqnr(program, float_twin(program))
    run(Gptq(), program)
    assert sqnr(program, reference) > before + 1.0
    for module, weight in weights(program).values():
        assert module.spec.granularity == granularity and torch.equal(module.real(module.codes(weight)), weight)


def test_second_run_declines_because_weights_lie_on_their_grids() -> None:
    program = calibrated()
    run(Gptq(), program)
    before = {name: weight.clone() for name, (_, weight) in weights(program).items()}
    entry = run(Gptq(), program)
    assert all(torch.equal(weight, before[name]) for name, (_, weight) in weights(program).items())
    assert "two left as it is: its weight lies on its frozen grid: another algorithm has rounded it" in reasons(entry)


def test_grid_that_sequential_mse_froze_is_rounded_on() -> None:
    program = calibrated()
    run(SequentialMse(), program)
    scales = {name: module.scale.clone() for name, (module, _) in weights(program).items()}
    reference, before = float_twin(program), sqnr(program, float_twin(program))
    entry = run(Gptq(), program)
    assert "two" not in {miss.node for miss in entry.misses}
    assert sqnr(program, reference) > before + 2.0
    assert all(torch.equal(module.scale, scales[name]) for name, (module, _) in weights(program).items())


def test_shared_weight_is_left_with_the_reason() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.two(torch.relu(self.one(x)))
            return found

    entry = run(Gptq(), calibrated(Tied))
    assert not entry.edits and len(entry.misses) == 2
    assert all("read at several places" in reason or "shared" in reason for reason in reasons(entry))


def test_layer_whose_second_moment_is_too_large_is_left_with_the_reason() -> None:
    entry = run(Gptq(memory_gib=1e-6), calibrated())
    assert any("two left as it is: its second moments take" in reason for reason in reasons(entry))


def test_layer_where_nothing_is_better_is_left_with_the_reason() -> None:
    program = calibrated()
    for module, weight in weights(program).values():
        with torch.no_grad():
            module.refresh(weight)
            weight.copy_(module.real(module.codes(weight)))
    entry = run(Gptq(), program)
    assert "fc left as it is: nothing is better than rounding to nearest" in reasons(entry)
    assert len(entry.misses) == 3


def test_inputs_that_are_not_finite_are_refused_by_layer() -> None:
    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(12, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.one(x)
            return found

    program = calibrated(Overflowing)
    for _, module in program.fake_quant_nodes():
        module.mode = module.mode if module.follows else Mode.OFF
    data = PassData([torch.full((4, 3, 12, 12), float("inf"))], progress=False)
    with pytest.raises(PassError, match=r"inputs of layer 'one'.*finite"):
        run_pass(Gptq(), program, data=data)


def test_run_without_batches_is_refused() -> None:
    with pytest.raises(PassError, match="measures with batches"):
        run_pass(Gptq(), calibrated())
    with pytest.raises(PassError, match="at least one batch"):
        run_pass(Gptq(), calibrated(), data=PassData([]))


@pytest.mark.parametrize("option", [{"damping": 0.0}, {"block_size": 0}, {"memory_gib": 0.0}])
def test_option_out_of_range_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        Gptq(**option)


def test_run_that_was_killed_goes_on_with_the_same_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = calibrated()
    run(Gptq(), whole)
    original, calls = pass_file.gptq, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(pass_file, "gptq", failing)
    killed = calibrated()
    with pytest.raises(KeyboardInterrupt):
        run(Gptq(), killed, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    resumed = calibrated()
    run(Gptq(), resumed, tmp_path)
    assert len(calls) == 4  # the third layer alone
    for name, (module, weight) in weights(resumed).items():
        assert torch.equal(weight, weights(whole)[name][1]) and module.mode is weights(whole)[name][0].mode
    run(Gptq(act_order=True), calibrated(), tmp_path)
    assert len(calls) == 7  # other options: another run


def test_damaged_file_of_a_layer_is_found_anew(tmp_path: Path) -> None:
    whole = calibrated()
    run(Gptq(), whole, tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:40])
    again = calibrated()
    run(Gptq(), again, tmp_path)
    assert torch.equal(again.module.get_parameter("two.weight"), whole.module.get_parameter("two.weight"))


def test_codes_are_those_of_onnxruntime(tmp_path: Path) -> None:
    program = calibrated()
    run(Gptq(), program)
    differing, compared = codes_that_differ(program, tmp_path / "model.onnx")
    assert differing == 0 and compared > 1000


def test_pipeline_runs_it_in_its_optimize_section(tmp_path: Path) -> None:
    text = fxquant.load_pipeline("w4a8").changed(optimize=[SequentialMse(), Gptq(act_order=True)]).to_toml()
    path = tmp_path / "mine.toml"
    path.write_text(text)
    program = calibrated()
    trace = fxquant.load_pipeline(path).optimize(program, images(), progress=False)
    assert [entry.item for entry in trace.entries] == [SequentialMse(), Gptq(act_order=True)]


def test_golden_of_what_changes() -> None:
    program = calibrated()
    (entry,) = PassManager([Gptq()]).run(program, data=PassData(images(), progress=False)).entries
    assert_golden(entry.diff(), "gptq_small.diff")


def test_mode_that_the_module_was_in_is_kept() -> None:
    program = calibrated(Small)
    program.module.train()
    run(Gptq(), program)
    assert program.module.training


def test_layer_with_too_few_samples_to_tell_what_others_are_like_is_left_with_the_errors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    few = [torch.randn(10, 64) for _ in range(2)]
    model = nn.Sequential(nn.Linear(64, 32))
    pipeline = fxquant.load_pipeline("w4a8")
    program = fxquant.capture(model.eval(), (few[0],))
    pipeline.prepare(program)
    fxquant.calibrate(program, few, progress=False)
    data = PassData(few, tmp_path, progress=False)
    (reason,), (again,) = (reasons(run_pass(Gptq(), program.copy(), data=data)) for _ in range(2))
    assert again == reason  # of what the first run kept
    head = "_0 left as it is: on the samples that were held back, rounding to nearest is better: output error "
    assert reason.startswith(head) and reason.endswith("(nearest -> gptq)")
    nearest, found = (float(part) for part in reason.removeprefix(head).split(" (")[0].split(" -> "))
    assert 0 < nearest < found
    (layer,) = quantized_layers(program)
    fooled = run_pass(Gptq(check_every=1000), program, data=PassData([torch.cat(few)[:1]], progress=False))
    assert reasons(fooled) == [] and layer.fake_quant(program).mode is Mode.FROZEN  # of one sample none is held back
