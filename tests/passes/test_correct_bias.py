"""correct-bias by measurement: mean errors go, in graph order, whatever the layers and memory; Frontier and Route."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

import fxquant
from fxquant.calibration import calibrate
from fxquant.errors import ConfigError, PassError
from fxquant.graph.frontier import Frontier, Route, show_all, size_in_bytes
from fxquant.graph.manager import PassManager
from fxquant.graph.pass_data import PassData, float_twin
from fxquant.graph.pipeline import load_pipeline, parse_pipeline
from fxquant.graph.program import NoteKind, Program, Stage
from fxquant.graph.trace import PassEntry
from fxquant.numerics.fake_quant import Mode
from fxquant.numerics.runtime import RuntimeOptions
from fxquant.passes import CorrectBias, Recalibrate
from fxquant.passes.correct_bias import Method
from fxquant.spec import SpecOverride
from tests.helpers import assert_golden
from tests.passes.harness import captured, reasons

BITS = SpecOverride(bits=4)  # so that mean errors are not tiny
LAYERS = (torch.ops.aten.convolution.default, torch.ops.aten.linear.default)


def normal(count: int, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    """Batches of normal noise that is not centred."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) + 0.5 for _ in range(count)]


class Mixed(nn.Module):
    """Layers with and without a bias: plain, depthwise, on a shortcut, transposed (in float), and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2, bias=False)
        self.side, self.last = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(6, 8, 1)
        self.fc = nn.Linear(8, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        y = F.relu6(self.depthwise(x)) + self.side(x)
        y = torch.relu(self.last(torch.relu(self.up(y))))
        found: torch.Tensor = self.fc(y.mean((2, 3)))
        return found


IMAGES = normal(3, 4, 3, 8, 8)


def mixed(seed: int = 0) -> nn.Module:
    """The net with seeded weights."""
    torch.manual_seed(seed)
    return Mixed().eval()


def calibrated(model: nn.Module, data: Sequence[Any], preset: str = "int8_per_tensor") -> Program:
    """The model's program under a preset with 4-bit weights, calibrated."""
    program = captured(model, data[0])
    load_pipeline(preset).override(weight=BITS).prepare(program)
    calibrate(program, data, progress=False)
    return program


def correct(program: Program, data: Sequence[Any], item: CorrectBias | None = None) -> PassEntry:
    """Run the pass as a run of its own."""
    (entry,) = PassManager([item or CorrectBias()]).run(program, data=PassData(data, progress=False)).entries
    return entry


class Recorder(fx.Interpreter):
    """Runs a whole graph and keeps what its layers give."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module, graph=program.graph)
        self.seen: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.target in LAYERS:
            self.seen[n.name] = value
        return value


def mean_outputs(program: Program, data: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mean of each layer's output channels (axis 1; of a linear on tokens, the last)."""
    seen: dict[str, list[torch.Tensor]] = {}
    for batch in data:
        recorder = Recorder(program)
        with torch.no_grad():
            recorder.run(batch)
        for name, value in recorder.seen.items():
            channels = -1 if program.node(name).target is LAYERS[1] else 1
            seen.setdefault(name, []).append(value.double().movedim(channels, 0).flatten(1))
    return {name: torch.cat(values, 1).mean(1) for name, values in seen.items()}


def mean_errors(program: Program, reference: Program, data: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """E[y_q] - E[y] of each layer."""
    expected = mean_outputs(reference, data)
    return {name: value - expected[name] for name, value in mean_outputs(program, data).items()}


def bias_steps(program: Program) -> dict[str, torch.Tensor]:
    """The step of each layer's bias, by the layer's name."""
    return {next(iter(node.users)).name: module.scale.double() for node, module in program.bias_nodes()}


def assert_corrected(
    program: Program, reference: Program, data: Sequence[torch.Tensor], but: tuple[str, ...] = ()
) -> None:
    """What remains of each layer's mean error, but for some, is half a step of its bias, and float rounding."""
    steps = bias_steps(program)
    found = mean_errors(program, reference, data)
    for name, error in ((name, error) for name, error in found.items() if name not in but):
        step = steps.get(name, torch.zeros(()))
        assert bool((error.abs() <= step / 2 + 2e-6).all()), (name, error.abs().max(), step)


def test_mean_errors_go_to_half_a_step_of_the_bias_and_layers_without_a_bias_get_one() -> None:
    program = calibrated(mixed(), IMAGES)
    reference = float_twin(program)
    before = mean_errors(program, reference, IMAGES)
    entry = correct(program, IMAGES)
    assert_corrected(program, reference, IMAGES, but=("up",))
    assert float(before["stem"].abs().max()) > 20 * float(bias_steps(program)["stem"])
    assert entry.modified and program.stage is Stage.CALIBRATED
    assert reasons(entry) == ["up left as it is: its weight is not quantized"]
    assert {str(node.args[0]) for node, _ in program.bias_nodes()} >= {"stem_bias", "side_bias", "fc_bias"}
    notes = [note for note in program.notes if note.kind is NoteKind.OPTIMIZATION]
    assert [note.place for note in notes] == ["stem", "depthwise", "side", "last", "fc", ""]
    assert notes[-1].text.startswith("correct-bias (empirical): 5 of 5 layers corrected; the largest mean error was ")


def plain_loop(program: Program, data: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Biases as a plain loop corrects them: the whole network run again for each layer. Every layer has a bias."""
    reference, twin = mean_outputs(float_twin(program), data), program.copy()
    found: dict[str, torch.Tensor] = {}
    for name, expected in reference.items():
        node = twin.node(name)
        quantizer = node.args[2]
        assert isinstance(quantizer, fx.Node) and isinstance(quantizer.args[0], fx.Node)
        parameter, module = twin.tensor(quantizer.args[0]), twin.bias_fake_quant(quantizer)
        assert module is not None
        error = mean_outputs(twin, data)[name] - expected
        found[name] = (module.codes(parameter) * module.scale.double() - error).float()
        parameter.data = found[name]
    return found


class Drawn(nn.Module):
    """A chain of convolutions with biases, drawn: width, groups, activation and whether the input is added again."""

    def __init__(self, parts: Sequence[tuple[int, bool, str, bool]]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(4, 4, kernel, padding=kernel // 2, groups=4 if deep else 1) for kernel, deep, _, _ in parts
        )
        self.parts = tuple(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        known: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "relu": torch.relu,
            "relu6": F.relu6,
            "leaky": F.leaky_relu,
            "none": lambda value: value,
        }
        for conv, (_, _, name, adds) in zip(self.convs, self.parts, strict=True):
            y = known[name](conv(x))
            x = y + x if adds else y
        return x


PARTS = st.tuples(
    st.sampled_from((1, 3)), st.booleans(), st.sampled_from(("relu", "relu6", "leaky", "none")), st.booleans()
)


@settings(max_examples=8, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=4), st.integers(0, 99), st.sampled_from((0, 1024)))
def test_biases_are_those_of_a_plain_loop_on_random_nets(
    parts: list[tuple[int, bool, str, bool]], seed: int, cache_mb: int
) -> None:
    torch.manual_seed(seed)
    data = normal(2, 3, 4, 6, 6, seed=seed)
    program = calibrated(Drawn(parts).eval(), data)
    reference = float_twin(program)
    expected = plain_loop(program, data)
    correct(program, data, CorrectBias(cache_mb=cache_mb))
    for index in range(len(parts)):
        step = next(module.scale for node, module in program.bias_nodes() if node.name == f"convs_{index}_bias_fq")
        found = program.module.get_parameter(f"convs.{index}.bias")
        assert bool(((found - expected[f"convs_{index}"]).abs() <= step * 0.51).all()), index
    assert_corrected(program, reference, data)


RANKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 1, bias=False)), (4, 3, 9)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.ReLU(), nn.Conv3d(4, 4, 1, groups=2)), (2, 2, 4, 4, 4)),
    "transposed, grouped": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 3, 2, 1, 1, groups=2)), (2, 4, 5, 5)),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)), (2, 5, 6)),
    "same padding": (lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3, 2)), (2, 3, 8, 8)),
}


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize("preset", ["int8_per_tensor", "int8_per_channel", "openvino", "aimet_default"])
def test_layers_of_any_rank_are_corrected(name: str, preset: str) -> None:
    torch.manual_seed(0)
    build, shape = RANKS[name]
    data = normal(2, *shape)
    program = calibrated(build().eval(), data, preset)
    reference = float_twin(program)
    entry = correct(program, data)
    in_float = {miss.node for miss in entry.misses if "its weight is not quantized" in miss.reason}
    assert len(entry.misses) == len(in_float)
    assert not in_float or name == "transposed, grouped" and preset != "aimet_default"
    assert_corrected(program, reference, data, but=tuple(in_float))


def test_biases_stay_in_float_where_the_pipeline_leaves_them_in_float() -> None:
    data = normal(2, 4, 3, 8, 8)
    program = calibrated(mixed(), data, "openvino")
    reference = float_twin(program)
    correct(program, data)
    assert not list(program.bias_nodes())
    assert program.node("stem").args[2] is program.node("stem_bias")
    assert_corrected(program, reference, data, but=("up",))


def test_net_whose_layers_all_lack_a_bias_gets_biases_on_grids() -> None:
    data = normal(2, 4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False)).eval()
    program = calibrated(model, data)
    correct(program, data)
    assert len(list(program.bias_nodes())) == 2 and "float" not in str(program.coverage()).partition("_bias")[2][:80]


def test_twice_is_once_whatever_ran_in_between() -> None:
    program = calibrated(mixed(), IMAGES)
    correct(program, IMAGES)
    before = {name: value.detach().clone() for name, value in program.module.named_parameters()}
    entry = correct(program, IMAGES)
    assert {edit.action for edit in entry.edits} == {"state"}
    assert program.notes[-1].text == "correct-bias (empirical): 0 of 5 layers corrected"
    assert all(torch.equal(value, before[name]) for name, value in program.module.named_parameters())
    correct(program, IMAGES, CorrectBias(method=Method.ANALYTIC))
    steps = {f"{name}.bias": step for name, step in bias_steps(program).items()}
    for name, value in program.module.named_parameters():
        assert float((value.detach() - before[name]).abs().max()) <= float(steps.get(name, torch.zeros(())).max())


def test_float_reference_of_a_later_run_has_biases_as_before_their_correction() -> None:
    program = calibrated(mixed(), IMAGES)
    first = float_twin(program)
    correct(program, IMAGES)
    moved = max(float(error.abs().max()) for error in mean_errors(program, first, IMAGES).values())
    later = float_twin(program)
    assert all(float(error.abs().max()) < 1e-5 for error in mean_errors(later, first, IMAGES).values()), moved


def test_correction_is_saved_with_the_program(tmp_path: Path) -> None:
    program = calibrated(mixed(), IMAGES)
    first = float_twin(program)
    correct(program, IMAGES)
    program.save(tmp_path / "net.fxq")
    loaded = fxquant.load_program(tmp_path / "net.fxq")
    errors = mean_errors(float_twin(loaded), first, IMAGES)
    assert all(float(error.abs().max()) < 1e-5 for error in errors.values())
    correct(loaded, IMAGES)
    assert loaded.notes[-1].text == "correct-bias (empirical): 0 of 5 layers corrected"


def test_weights_that_are_frozen_are_corrected_and_stay() -> None:
    program = calibrated(mixed(), IMAGES)
    reference = float_twin(program)
    for _, module in program.fake_quant_nodes():
        if module.follows:
            module.mode = Mode.FROZEN
            module.scale.mul_(1.3)  # a grid that does not follow
    scales = {str(node.target): module.scale.clone() for node, module in program.fake_quant_nodes()}
    correct(program, IMAGES)
    assert_corrected(program, reference, IMAGES, but=("up",))
    assert all(torch.equal(module.scale, scales[str(node.target)]) for node, module in program.fake_quant_nodes())


def test_bias_whose_codes_would_overflow_raises_its_weights_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1)).eval()
    with torch.no_grad():
        model[1].weight[2] = 1e-9  # type: ignore[index,operator,union-attr]
    data = normal(2, 4, 3, 8, 8)
    program = calibrated(model, data, "int8_per_channel")
    reference = float_twin(program)
    with torch.no_grad():
        reference.module.get_parameter("1.bias")[2] += 3.0  # an error of 3 behind a weight of nearly nothing
    PassManager([CorrectBias()]).run(program, data=PassData(data, progress=False, reference=reference))
    bias = program.module.get_parameter("1.bias")
    (module,) = (module for node, module in program.bias_nodes() if node.name == "_1_bias_fq")
    assert 2**22 < int(module.codes(bias).abs().max()) <= 2**23
    assert_corrected(program, reference, data)


class Twice(nn.Module):
    """A convolution called twice, a product with a parameter, a linear in float, and a computed bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.matrix = nn.Parameter(torch.randn(3, 3))
        self.a = nn.Parameter(torch.randn(3))
        self.free = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.left(torch.relu(self.conv(torch.relu(self.conv(x)))))
        x = torch.relu(x.mean((2, 3)) @ self.matrix)
        return F.linear(x, self.free, self.a * x.mean())


def test_layers_that_cannot_be_corrected_are_declined_with_the_reason() -> None:
    torch.manual_seed(0)
    program = calibrated(Twice().eval(), IMAGES)
    program.module.get_submodule(str(program.node("left_weight_fq").target)).mode = Mode.OFF  # type: ignore[assignment]
    found = reasons(correct(program, IMAGES))
    assert "left left as it is: its weight is not quantized" in found
    assert "matmul left as it is: matmul takes no bias" in found
    assert any(text.startswith("linear left as it is: its bias is computed, by mul") for text in found), found


def test_a_layer_called_twice_gets_a_bias_for_each_call(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = calibrated(Twice().eval(), IMAGES)
    reference = float_twin(program)
    kept = program.module.get_parameter("conv.bias").detach().clone()
    correct(program, IMAGES)
    own = {str(program.node(name).args[2].args[0].target) for name in ("conv", "conv_1")}  # type: ignore[union-attr]
    assert len(own) == 2 and own <= {"conv.bias", "conv.bias_1", "conv.bias_2"}
    assert_corrected(program, reference, IMAGES, but=("matmul", "linear"))
    undone = float_twin(program).module(IMAGES[0])
    assert torch.allclose(undone, reference.module(IMAGES[0]), atol=1e-6)
    assert {edit.action for edit in correct(program, IMAGES).edits} == {"state"}
    assert torch.equal(program.module.get_parameter("conv.bias"), kept) or "conv.bias" in own
    load_pipeline("int8_per_channel").finalize(program)
    fxquant.export_onnx(program, tmp_path / "model.onnx")
    assert fxquant.check_parity(program, tmp_path / "model.onnx", IMAGES).certified_differing == 0


def test_live_batch_norm_is_declined_with_the_reason() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    program = captured(model, IMAGES[0])
    load_pipeline("int8_per_channel_qat").prepare(program)
    calibrate(program, IMAGES, progress=False)
    (reason,) = reasons(correct(program, IMAGES))
    assert "is computed, by" in reason


def test_only_layers_that_are_named_are_corrected() -> None:
    program = calibrated(mixed(), IMAGES)
    correct(program, IMAGES, CorrectBias(layers="stem|fc"))
    places = [note.place for note in program.notes if note.kind is NoteKind.OPTIMIZATION]
    assert places == ["stem", "fc", ""]


def test_only_the_first_batches_are_measured() -> None:
    program, few = calibrated(mixed(), IMAGES), calibrated(mixed(), IMAGES)
    correct(program, IMAGES, CorrectBias(max_batches=1))
    correct(few, IMAGES[:1])
    assert torch.equal(program.module.get_parameter("fc.bias"), few.module.get_parameter("fc.bias"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "empirica"}, "empirical"),
        ({"max_batches": 0}, "at least 1"),
        ({"cache_mb": -1}, "at least 0"),
        ({"layers": "("}, "a regular expression"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        CorrectBias(**options)


def test_batches_of_nan_and_no_batches_are_refused_and_nothing_changes() -> None:
    program = calibrated(mixed(), IMAGES)
    before = program.fingerprint()
    for data, text in (([IMAGES[0] * float("nan")], "finite"), ([], "batches")):
        with pytest.raises(PassError, match=text):
            correct(program, data)
    assert program.fingerprint() == before


def test_pipeline_file_runs_it_and_writes_it() -> None:
    text = load_pipeline("int8_per_tensor").to_toml()
    text += '[[optimize]]\npass = "correct-bias"\nmethod = "empirical"\nmax_batches = 2\n'
    pipeline = parse_pipeline(text, "mine", place="mine.toml")
    program = captured(mixed(), IMAGES[0])
    pipeline.prepare(program)
    calibrate(program, IMAGES, progress=False)
    trace = pipeline.optimize(program, IMAGES, progress=False)
    assert [entry.item for entry in trace.entries] == [CorrectBias(max_batches=2)]
    assert 'pass = "correct-bias"\nmax_batches = 2' in pipeline.to_toml()


@pytest.mark.parametrize("preset", ["int8_per_tensor", "int8_per_channel"])
def test_no_code_differs_in_onnxruntime(preset: str, tmp_path: Path) -> None:
    program = captured(mixed(), IMAGES[0])
    pipeline = load_pipeline(preset).override(weight=BITS)
    pipeline = pipeline.changed(optimize=[CorrectBias(), Recalibrate(), CorrectBias()])
    pipeline.prepare(program)
    calibrate(program, IMAGES, progress=False)
    pipeline.optimize(program, IMAGES, progress=False)
    pipeline.finalize(program)
    path = tmp_path / "net.onnx"
    fxquant.export_onnx(program, path)
    options = RuntimeOptions(threads=1)
    for simulation in ("exact", "integer"):
        report = fxquant.check_parity(program, path, IMAGES, options=options, simulation=simulation, progress=False)
        assert all(row.overall.compared > 0 and row.overall.differing == 0 for row in report.rows) and not report.fault


def test_diff_is_golden() -> None:
    program = calibrated(mixed(), IMAGES)
    before = program.copy()
    correct(program, IMAGES, CorrectBias(layers="stem|depthwise"))
    assert_golden(before.diff(program), "correct_bias_mixed.diff")


def stops(program: Program) -> list[fx.Node]:
    """The layers of a program."""
    return [node for node in program.graph.nodes if node.target in LAYERS]


@pytest.mark.parametrize("limit", [0, 4000, 10**9])
def test_frontier_shows_what_whole_runs_give_and_keeps_to_its_memory(limit: int) -> None:
    program = calibrated(mixed(), IMAGES)
    expected = []
    for batch in IMAGES:
        recorder = Recorder(program)
        with torch.no_grad():
            recorder.run(batch)
        expected.append(recorder.seen)
    frontier, runs = Frontier(program, stops(program), IMAGES, limit), 0
    for stop in stops(program):
        seen: list[torch.Tensor] = []
        runs += frontier.advance(stop, seen.append)
        assert all(torch.equal(value, known[stop.name]) for value, known in zip(seen, expected, strict=True))
        assert frontier.kept_bytes <= limit
    assert runs == len(IMAGES) * len(stops(program))


def test_frontier_goes_on_from_what_it_keeps() -> None:
    program = calibrated(mixed(), IMAGES)
    asked = 0

    class Counted:
        def __iter__(self) -> Any:
            nonlocal asked
            asked += 1
            return iter(IMAGES)

    frontier = Frontier(program, stops(program), Counted(), 10**9)
    for stop in stops(program):
        frontier.advance(stop, lambda value: None)
    assert asked == 1


def test_route_holds_what_is_read_later_and_nothing_else() -> None:
    program = calibrated(mixed(), IMAGES)
    route, last = Route(program, stops(program)), program.node("last")
    assert [node.name for node in route.live_before(program.node("stem"))] == ["x_fq"]
    assert [node.name for node in route.live_before(program.node("side"))] == ["relu_fq", "hardtanh_fq"]
    assert len(route.live_before(last)) == 1 and len(route.live_behind(last)) == 1
    shared = torch.zeros(10)
    assert size_in_bytes({last: [shared, shared[2:]], program.node("fc"): 3}) == 40


def test_all_stops_are_shown_in_one_pass_a_batch() -> None:
    program = calibrated(mixed(), IMAGES)
    seen: list[str] = []
    assert show_all(program, stops(program), IMAGES, lambda node, value: seen.append(node.name)) == 3
    assert seen == ["stem", "depthwise", "side", "up", "last", "fc"] * 3
