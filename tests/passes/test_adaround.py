"""adaround: learned rounding layer by layer, on the inputs that the layers already rounded give."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import fxquant.passes.rounding_run as rounding_run
from fxquant.errors import PassError
from fxquant.graph.pass_data import PassData
from fxquant.graph.pipeline import load_pipeline
from fxquant.graph.program import NoteKind, Program
from fxquant.graph.segment import values_of
from fxquant.graph.trace import PassEntry
from fxquant.lowering.export import export_onnx
from fxquant.numerics.fake_quant import Mode
from fxquant.parity import check_parity
from fxquant.passes import AdaRound
from fxquant.reconstruction import Reconstruction, Samples, Unit
from tests.helpers import assert_golden, run_pass
from tests.passes.harness import captured, reasons
from tests.passes.pipelines import residual
from tests.reconstruction.layers import calibrated, correlated

BATCHES = [correlated(24, 4, 8, 8, seed=index) for index in range(2)]
FAST = AdaRound(iterations=120)
DATA = PassData(BATCHES, progress=False)


def rounded(item: AdaRound = FAST, folder: Path | None = None) -> tuple[Program, PassEntry]:
    """A residual net that went through the pass."""
    program = calibrated(residual(), BATCHES)
    return program, run_pass(item, program, data=PassData(BATCHES, folder, progress=False))


def codes(program: Program) -> dict[str, torch.Tensor]:
    """The codes of the weights."""
    found = {}
    for node, module in program.fake_quant_nodes():
        source = node.args[0]
        if isinstance(source, torch.fx.Node) and source.op == "get_attr":
            found[node.name] = module.codes(program.tensor(source))
    return found


def error(program: Program, reference: Program) -> float:
    """Squared error of the output over the squared float output."""
    with torch.no_grad():
        pairs = [(program.module.eval()(x), reference.module.eval()(x)) for x in BATCHES]
    return sum(float((y - z).square().sum()) for y, z in pairs) / sum(float(z.square().sum()) for _, z in pairs)


def test_output_comes_nearer_to_float_and_weights_are_frozen_at_grid_points() -> None:
    before = calibrated(residual(), BATCHES)
    reference = captured(residual(), BATCHES[0])
    program, entry = rounded()
    assert error(program, reference) < 0.8 * error(before, reference)
    assert entry.edits and entry.misses == ()
    for node, module in program.fake_quant_nodes():
        source = node.args[0]
        assert isinstance(source, torch.fx.Node)
        if source.op == "get_attr":
            weight = program.tensor(source)
            assert module.mode is Mode.FROZEN and torch.equal(module.real(module.codes(weight)), weight)


def test_codes_are_the_floor_or_one_more_and_some_are_not_the_nearest() -> None:
    before = calibrated(residual(), BATCHES)
    program, _ = rounded()
    changed = 0
    for name, nearest in codes(before).items():
        step = codes(program)[name] - nearest
        assert int(step.abs().max()) <= 1
        changed += int((step != 0).sum())
    assert changed > 0


def test_notes_say_what_was_gained() -> None:
    program, _ = rounded()
    notes = [note for note in program.notes if note.kind is NoteKind.OPTIMIZATION]
    assert [note.place for note in notes] == ["conv1", "conv2", "fc"]
    assert notes[0].text.startswith("rounding of conv1: output error ") and "of 288 weights rounded" in notes[0].text


def test_activation_counts_only_if_it_alone_reads_the_layer() -> None:
    program = calibrated(residual(), BATCHES)
    layers = list(rounding_run.quantized_layers(program))
    outputs = {unit.name: unit.output.name for unit in FAST.units(program, None, layers)}  # type: ignore[arg-type]
    assert outputs == {"conv1": "relu", "conv2": "conv2", "fc": "fc"}


def test_state_that_training_reads_is_left_as_it_is() -> None:
    program = calibrated(residual(), BATCHES)
    program.module.get_parameter("conv1.bias").requires_grad_(False)
    program.module.train()
    bias = program.module.get_parameter("conv2.bias").detach().clone()
    run_pass(FAST, program, data=DATA)
    parameters = dict(program.module.named_parameters())
    assert program.module.training and all(item.grad is None for item in parameters.values())
    assert [name for name, item in parameters.items() if not item.requires_grad] == ["conv1.bias"]
    assert torch.equal(parameters["conv2.bias"], bias)


def test_second_run_declines_every_layer_as_settled() -> None:
    program, _ = rounded()
    before = program.fingerprint()
    entry = run_pass(FAST, program, data=DATA)
    assert entry.edits == () and program.fingerprint() == before
    assert len(reasons(entry)) == 3 and all("frozen" in reason for reason in reasons(entry))


def test_layer_on_which_nearest_is_as_good_keeps_it_and_both_errors_are_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(-7, 8, (8, 4, 3, 3)) / 4)
        model[0].weight[:, 0, 0, 0] = 7 / 4
    program = calibrated(model, BATCHES)
    before = codes(program)
    entry = run_pass(FAST, program, data=DATA)
    (reason,) = reasons(entry)
    assert reason.startswith("_0 rounded to nearest, which is as good: output error ")
    assert torch.equal(codes(program)["_0_weight_fq"], before["_0_weight_fq"])
    assert "_1" in [note.place for note in program.notes]
    assert all(module.mode is Mode.FROZEN for _, module in program.fake_quant_nodes() if module.follows)


def test_float_layers_are_declined_with_the_reason() -> None:
    program = calibrated(residual(), BATCHES)
    with program.quantizers(weights=False, only="conv2_weight"):
        before = codes(program)
        entry = run_pass(FAST, program, data=DATA)
        assert reasons(entry) == ["conv2 left as it is: its weight is not quantized"]
        assert torch.equal(codes(program)["conv2_weight_fq"], before["conv2_weight_fq"])


def test_run_without_batches_is_refused() -> None:
    with pytest.raises(PassError, match="measures with batches"):
        run_pass(FAST, calibrated(residual(), BATCHES))


@pytest.mark.parametrize("option", ["iterations", "cache_mb", "batch_size"])
def test_option_of_nothing_is_refused_by_name(option: str) -> None:
    with pytest.raises(Exception, match=f"option '{option}'"):
        AdaRound(**{option: 0})


class Killed(BaseException):
    """Stands for the signal that ends a process."""


def kill_at(monkeypatch: pytest.MonkeyPatch, unit: int) -> None:
    """Let learning die in the middle of the unit of this number."""
    learn, count = rounding_run.reconstruct, iter(range(100))

    def dying(*args: Any, **options: Any) -> Any:
        if next(count) == unit:
            raise Killed
        return learn(*args, **options)

    monkeypatch.setattr(rounding_run, "reconstruct", dying)


def test_killed_run_goes_on_with_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole, _ = rounded()
    with monkeypatch.context() as patch:
        kill_at(patch, 2)
        with pytest.raises(Killed):
            rounded(folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    with monkeypatch.context() as patch:
        kill_at(patch, 1)  # one unit is left, so that a second one would be an error
        program, entry = rounded(folder=tmp_path)
    assert program.fingerprint() == whole.fingerprint() and entry.misses == ()


def test_killed_pass_leaves_the_program_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    program = calibrated(residual(), BATCHES)
    before = program.fingerprint()
    kill_at(monkeypatch, 2)
    with pytest.raises(Killed):
        run_pass(FAST, program, data=DATA)
    assert program.fingerprint() == before


@pytest.mark.parametrize("what", ["options", "batches", "damage"])
def test_files_of_another_run_are_not_used_and_the_reason_is_told(what: str, tmp_path: Path) -> None:
    rounded(folder=tmp_path)
    program, item, batches = calibrated(residual(), BATCHES), FAST, BATCHES
    if what == "options":
        item = AdaRound(iterations=121)
    if what == "batches":
        batches = [BATCHES[0], BATCHES[1] + 1e-6]
    if what == "damage":
        for path in tmp_path.iterdir():
            path.write_bytes(path.read_bytes()[:200])
    entry = run_pass(item, program, data=PassData(batches, tmp_path, progress=False))
    told = {"options": "is of another run", "batches": "is of another run", "damage": "is damaged"}[what]
    assert len(reasons(entry)) == 3 and all(told in reason for reason in reasons(entry))


def test_diff_shows_frozen_weights_alone() -> None:
    program = calibrated(residual(), BATCHES)
    before = program.copy()
    run_pass(FAST, program, data=DATA)
    assert_golden(before.diff(program), "adaround_residual.diff")


def test_pipeline_runs_it_by_name_and_export_has_0_differing_codes(tmp_path: Path) -> None:
    pipeline = load_pipeline("w4a8")
    made = pipeline.make_pass("adaround")
    assert isinstance(made, AdaRound) and made.needs_data
    pipeline = pipeline.changed(optimize=[FAST])
    program = calibrated(residual(), BATCHES, pipeline)
    pipeline.optimize(program, BATCHES, progress=False)
    learned = codes(program)
    pipeline.finalize(program)
    assert all(torch.equal(found, learned[name]) for name, found in codes(program).items())
    export_onnx(program, tmp_path / "model.onnx")
    report = check_parity(program, tmp_path / "model.onnx", BATCHES)
    assert report.exact


def test_layers_behind_learn_on_what_rounded_layers_before_give(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, torch.Tensor] = {}
    learn = rounding_run.reconstruct

    def recording(bench: Program, unit: Unit, samples: Samples, *args: Any, **options: Any) -> Any:
        seen.update({node.name: value for node, value in samples.inputs.items()})
        return learn(bench, unit, samples, *args, **options)

    monkeypatch.setattr(rounding_run, "reconstruct", recording)
    program, _ = rounded()
    for name, found in seen.items():
        now = torch.cat([row[name] for row in values_of(program, BATCHES, [name])])
        assert torch.equal(found, now), name
    assert len(seen) == 3


@dataclass(frozen=True)
class Telling(AdaRound):
    """The pass, whose caller hears of each unit."""

    heard: ClassVar[list[Reconstruction]]

    def learned(self, found: Reconstruction) -> None:
        """Keep it."""
        self.heard.append(found)


def test_subclass_hears_of_each_unit_also_of_one_that_is_read_from_a_file(tmp_path: Path) -> None:
    curves = []
    for _ in range(2):
        Telling.heard = []
        program, _ = rounded(Telling(iterations=120), tmp_path)
        assert [found.unit for found in Telling.heard] == ["conv1", "conv2", "fc"]
        curves.append([found.curve for found in Telling.heard])
    assert curves[0] == curves[1] and program.fingerprint() == rounded()[0].fingerprint()
