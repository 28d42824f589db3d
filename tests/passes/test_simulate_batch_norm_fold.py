"""simulate-batch-norm-fold: fires, declines with the reason, keeps what eval() and train() compute, golden diff."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxquant
from fxquant.calibration import calibrate
from fxquant.graph.manager import PassManager
from fxquant.graph.pipeline import load_pipeline
from fxquant.graph.program import Program
from fxquant.numerics.live_batch_norm import LiveBatchNorm
from fxquant.passes import ConvolveBatchNorm, FoldBatchNorm, FreezeBatchNorm, SimulateBatchNormFold
from tests.helpers import assert_rewrites, residual_program, run_pass
from tests.passes.harness import ROUNDING, Chain, captured, difference, output, randomize, reasons
from tests.passes.live import IMAGE, NETS, ROWS, Reuse, model_of, prepared, train

GRADIENTS = 2e-5  # of the net's largest gradient: float32 sums in another order


def live_modules(program: Program) -> list[str]:
    """Paths of the batch norms that are live behind a simulated fold."""
    return [path for path, module in program.module.named_modules() if isinstance(module, LiveBatchNorm)]


def gradients(program: Program, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, and the gradient of its product with fixed noise for each parameter."""
    found = program.module(x)
    noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    (found * noise).sum().backward()
    named = program.module.named_parameters()
    return found.detach(), {name: torch.as_tensor(parameter.grad) for name, parameter in named}


@pytest.mark.parametrize("case", NETS)
def test_outputs_of_eval_and_names_of_state_stay(case: str) -> None:
    model, x = model_of(case)
    expected, program = output(model, x), captured(model, x)
    before = {name: id(tensor) for name, tensor in program.module.named_parameters()}
    keys = list(program.module.state_dict())
    entry = run_pass(SimulateBatchNormFold(), program, x)
    assert difference(program, expected, x) < ROUNDING
    assert list(program.module.state_dict()) == keys
    assert {name: id(tensor) for name, tensor in program.module.named_parameters()} == before
    assert (reasons(entry) == []) == (case != "two norms") and live_modules(program)
    assert run_pass(SimulateBatchNormFold(), program).edits == ()  # twice is once


@pytest.mark.parametrize("case", NETS)
def test_train_computes_and_differentiates_what_the_model_does(case: str) -> None:
    make, x = NETS[case]
    torch.manual_seed(0)
    model = make()
    live, plain = captured(model, x), captured(model, x)
    run_pass(SimulateBatchNormFold(), live)
    live.module.train(), plain.module.train()
    (found, got), (expected, wanted) = gradients(live, x), gradients(plain, x)
    assert float((found - expected).abs().max()) < ROUNDING * float(expected.abs().max()) * 2
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert float((got[name] - wanted[name]).abs().max()) < GRADIENTS * largest, name
    state = plain.module.state_dict()
    for name, tensor in live.module.state_dict().items():
        assert torch.allclose(tensor, state[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("preset", ["int8_per_channel_qat", "int8_per_tensor_qat"])
def test_gamma_of_zero_is_finite_and_learns_through_quantizers(preset: str) -> None:
    program = prepared("no activation", preset)
    gamma = program.module.get_parameter("norm.weight")
    assert gamma[0].item() == 0.0
    program.module.train()
    found, got = gradients(program, IMAGE)
    assert bool(torch.isfinite(found).all()) and all(bool(torch.isfinite(one).all()) for one in got.values())
    _, wanted = gradients(captured_training(model_of("no activation")[0]), IMAGE)
    ours, theirs = float(got["norm.weight"][0]), float(wanted["norm.weight"][0])
    assert abs(ours - theirs) < 0.35 * abs(theirs)  # coarse codes, the same direction
    train(program, IMAGE)
    assert program.module.get_parameter("norm.weight")[0].item() != 0.0


def captured_training(model: nn.Module) -> Program:
    """The program of a model in training mode."""
    program = captured(model, IMAGE)
    program.module.train()
    return program


@pytest.mark.parametrize("variance", [0.0, 1e-30, 1e30])
def test_training_is_finite_at_extreme_running_variances(variance: float) -> None:
    model = Chain(conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6))
    model.get_buffer("bn.running_var").fill_(variance)
    program = captured(model, IMAGE)
    run_pass(SimulateBatchNormFold(), program)
    program.module.train()
    found, got = gradients(program, IMAGE)
    assert bool(torch.isfinite(found).all()) and all(bool(torch.isfinite(one).all()) for one in got.values())


def test_all_three_tensors_of_a_layer_learn_in_eval_mode_too() -> None:
    program = prepared("conv without bias")
    program.module.eval()
    _, got = gradients(program, IMAGE)
    assert all(float(got[name].abs().max()) > 0 for name in ("layer.weight", "norm.weight", "norm.bias"))


def test_batch_norm_in_eval_mode_alone_keeps_its_statistics_and_computes_the_fold() -> None:
    program = prepared("conv without bias")
    with torch.no_grad():
        expected = program.module.eval()(IMAGE)
        program.module.train()
        program.module.get_submodule("norm").eval()
        mean = program.module.get_buffer("norm.running_mean").clone()
        assert torch.equal(program.module(IMAGE), expected)
    assert torch.equal(program.module.get_buffer("norm.running_mean"), mean)


@pytest.mark.parametrize("case", ["conv without bias", "reuse", "tokens", "linear"])
def test_frozen_batch_norm_computes_in_train_what_it_computes_in_eval(case: str) -> None:
    program, x = prepared(case), NETS[case][1]
    keys = list(program.module.state_dict())
    with torch.no_grad():
        expected = program.module.eval()(x)
        run_pass(FreezeBatchNorm(), program)
        assert torch.equal(program.module.eval()(x), expected)
        statistics = {name: tensor.clone() for name, tensor in program.module.named_buffers() if "running" in name}
        assert torch.equal(program.module.train()(x), expected)
    assert all(torch.equal(program.module.get_buffer(name), tensor) for name, tensor in statistics.items())
    assert list(program.module.state_dict()) == keys
    assert run_pass(FreezeBatchNorm(), program).edits == ()


def test_batch_norm_that_was_frozen_before_is_simulated_with_its_running_statistics() -> None:
    model = randomize(Reuse())
    expected, program = output(model, IMAGE), captured(model, IMAGE)
    run_pass(FreezeBatchNorm(), program)
    run_pass(SimulateBatchNormFold(), program)
    program.module.train()
    assert difference(program, expected, IMAGE) < ROUNDING and not live_modules(program)
    assert not [node for node in program.graph.nodes if "batch_norm.default" in str(node.target)]


def test_batch_norm_behind_no_layer_is_folded_forward() -> None:
    layers = {"relu": nn.ReLU(), "bn": nn.BatchNorm2d(4), "conv": nn.Conv2d(4, 6, 3), "bn2": nn.BatchNorm2d(6)}
    model = randomize(Chain(**layers))
    expected, program = output(model, IMAGE), captured(model, IMAGE)
    entry = run_pass(SimulateBatchNormFold(), program)
    assert reasons(entry) == [] and live_modules(program) == ["bn2"]
    assert difference(program, expected, IMAGE) < ROUNDING
    program = captured(model, IMAGE)
    entry = run_pass(SimulateBatchNormFold(forward=False), program)
    assert reasons(entry) == [
        "bn not simulated: relu before it is no convolution or linear; folding forward is off"
    ] and live_modules(program) == ["bn2"]


class Ahead(nn.Module):
    """A batch norm with no layer in front, under two names, and one with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.bn = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        self.again = nn.ModuleList([self.first])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(self.conv(self.first(x))))


@pytest.mark.parametrize("frozen", [False, True])
def test_batch_norm_folded_forward_goes_and_a_note_says_so(frozen: bool) -> None:
    program = captured(randomize(Ahead()), IMAGE)
    if frozen:
        run_pass(FreezeBatchNorm(), program)
    run_pass(SimulateBatchNormFold(), program)
    assert [key for key in program.module.state_dict() if key.startswith(("first", "again"))] == []
    notes = [str(note) for note in program.notes if "for good" in note.text]
    assert len(notes) == 1 and notes[0].startswith("training: first: no layer in front of this batch norm")
    program.module.train()
    _, got = gradients(program, IMAGE)
    held = {"conv.weight", "conv.bias", "bn.weight", "bn.bias"}
    assert got.keys() == held and all(bool(one.any()) for name, one in got.items() if name != "conv.bias" or frozen)


class Watched(nn.Module):
    """A batch norm whose gamma is read elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.conv(self.bn(x))) * self.bn.weight.sum()


def test_batch_norm_folded_forward_stays_where_its_tensors_are_read() -> None:
    model = randomize(Watched())
    expected, program = output(model, IMAGE), captured(model, IMAGE)
    run_pass(SimulateBatchNormFold(), program)
    assert difference(program, expected, IMAGE) < ROUNDING
    assert "bn.weight" in program.module.state_dict() and [note for note in program.notes if "for good" in note.text]


def test_all_that_is_trained_has_a_gradient_behind_a_fold_forward() -> None:
    program = captured(randomize(Ahead()), IMAGE)
    load_pipeline("int8_per_channel_qat").prepare(program)
    calibrate(program, [IMAGE])
    program.module.train()(IMAGE).square().sum().backward()
    trained = [one for group in fxquant.parameter_groups(program, 1e-3) for one in group["params"]]
    assert trained and [one.shape for one in trained if one.grad is None] == []


class Branches(nn.Module):
    """A convolution that others read too; a batch norm that is also called where no layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.one, self.shared = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        z = torch.relu(self.bn(y)) + y
        return torch.relu(self.shared(self.one(z))) + torch.relu(self.shared(torch.relu(z)))


class Hyper(nn.Module):
    """A convolution whose weight is an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(nn.functional.conv2d(x, x[:4, :, :1, :1])))


def huge() -> nn.Module:
    """A batch norm whose fold is beyond float32."""
    model = Chain(conv=nn.Conv2d(4, 6, 1), bn=nn.BatchNorm2d(6), relu=nn.ReLU())
    with torch.no_grad():
        model.get_parameter("conv.weight").fill_(1e38)
        model.get_parameter("bn.weight").fill_(1e5)
    return model


NOTHING_BEHIND = "behind it is no convolution, linear, pooling or flattening"
DECLINED: dict[str, tuple[nn.Module, list[str]]] = {
    "other readers": (
        Branches(),
        [
            f"bn not simulated: conv has 2 users (bn, add); relu {NOTHING_BEHIND}",
            "shared not simulated: its module is also called at shared_1, where it cannot be folded; "
            f"relu_1 {NOTHING_BEHIND}",
            f"shared_1 not simulated: relu_2 before it is no convolution or linear; relu_3 {NOTHING_BEHIND}",
        ],
    ),
    "no statistics": (
        Chain(conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6, track_running_stats=False)),
        ["bn not simulated: it keeps no running statistics; it keeps no running statistics"],
    ),
    "weight is an activation": (
        Hyper(),
        [
            "bn not simulated: convolution's slice_3 is no parameter, nor computed from parameters alone; "
            f"relu {NOTHING_BEHIND}"
        ],
    ),
    "overflow": (
        huge(),
        [f"bn not simulated: the folded weight of conv would not be finite in torch.float32; relu {NOTHING_BEHIND}"],
    ),
}


@pytest.mark.parametrize("case", DECLINED)
def test_batch_norm_is_declined_with_the_reason(case: str) -> None:
    model, expected = DECLINED[case]
    program = captured(model, IMAGE * (1e-38 if case == "overflow" else 1.0))
    before = str(program)
    entry = run_pass(SimulateBatchNormFold(), program)
    assert reasons(entry) == expected
    assert entry.edits == () and str(program) == before


class Crossed(nn.Module):
    """A batch norm behind two convolutions, called in the reverse of their order."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.bn = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.one(x), self.two(x)
        second = torch.relu(self.bn(second))
        return torch.as_tensor(torch.relu(self.bn(first)) - second)


def test_shared_batch_norm_called_in_reverse_of_its_layers_order_is_simulated() -> None:
    model = randomize(Crossed())
    expected, program = output(model, IMAGE), captured(model, IMAGE)
    entry = run_pass(SimulateBatchNormFold(), program, IMAGE)
    assert reasons(entry) == [] and live_modules(program) == ["bn"]
    assert difference(program, expected, IMAGE) < ROUNDING


def test_other_passes_leave_a_live_batch_norm_alone() -> None:
    program = captured(randomize(Reuse()), IMAGE)
    run_pass(SimulateBatchNormFold(), program)
    for item in (FoldBatchNorm(), ConvolveBatchNorm()):
        entry = run_pass(item, program)
        assert entry.edits == () and entry.misses == ()


def test_edits_are_those_of_the_golden_diff() -> None:
    program = residual_program()
    assert_rewrites(
        run_pass(SimulateBatchNormFold(), program),
        """
        - conv = aten.convolution(x, conv_weight, padding=1) : float32[s0, 4, 8, 8]  @conv
        - bn = BatchNorm2d[bn](conv, eps=0.001, momentum=0.03) : float32[s0, 4, 8, 8]  @bn
        + bn_weight = get bn.weight : float32[4]
        + bn_bias = get bn.bias : float32[4]
        + bn_running_mean = get bn.running_mean : float32[4]
        + bn_running_var = get bn.running_var : float32[4]
        + bn_ratio = BatchNormRatio[bn.ratio](bn_weight, bn_running_var) : float32[4]  @bn
        + conv_weight_folded = fxquant.scale_channels(conv_weight, bn_ratio, axis=0, groups=1) : \
float32[4, 3, 3, 3]  @conv
        + conv_bias_folded = BatchNormShift[bn.shift](None, bn_bias, bn_running_mean, bn_ratio) : float32[4]  @bn
        + conv = aten.convolution(x, conv_weight_folded, bias=conv_bias_folded, padding=1) : float32[s0, 4, 8, 8]  @conv
        + bn = LiveBatchNorm[bn](conv, bn_ratio, eps=0.001, momentum=0.03) : float32[s0, 4, 8, 8]  @bn
        """,
        edits=15,
    )


class Alias(nn.Module):
    """A batch norm under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.blocks = nn.ModuleList([self.conv, self.bn])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.bn(self.conv(x)))


def test_module_under_two_names_is_live_under_both() -> None:
    program = captured(randomize(Alias()), IMAGE)
    keys = list(program.module.state_dict())
    run_pass(SimulateBatchNormFold(), program)
    assert program.module.get_submodule("bn") is program.module.get_submodule("blocks.1")
    assert isinstance(program.module.get_submodule("bn"), LiveBatchNorm)
    assert list(program.module.state_dict()) == keys


@pytest.mark.parametrize("training", [False, True])
def test_copies_and_files_compute_the_same(training: bool, tmp_path: Any) -> None:
    program = prepared("reuse")
    program.save(tmp_path / "program.fxq")
    loaded = fxquant.load_program(tmp_path / "program.fxq")
    assert str(loaded) == str(program) and loaded.fingerprint() == program.fingerprint()
    with torch.no_grad():
        expected = program.copy().module.train(training)(IMAGE)
        twins = (loaded.module, copy.deepcopy(program).module, pickle.loads(pickle.dumps(program)).module)
        for twin in twins:
            assert torch.equal(twin.train(training)(IMAGE), expected)


def test_exact_simulation_normalises_by_the_batch_in_train_and_follows_the_mode() -> None:
    program = prepared("nested")
    with torch.no_grad():
        program.module.train()
        expected = program.copy().module(IMAGE)
        program.simulate = "exact"
        folded = program.module.eval()(IMAGE)
        found = program.module.train()(IMAGE)
        assert float((found - expected).abs().max()) < 0.2 * float(expected.abs().max())
        assert float((found - folded).abs().max()) > 0.5 * float(expected.abs().max())
        assert torch.equal(program.module.eval()(IMAGE), folded) is False  # the statistics moved


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([(1, False), (2, False), (4, False), (1, True), (2, True), (4, True)]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1e-5, 1e-3, 1.0]),
    st.integers(0, 2**16),
)
def test_random_layers_compute_the_same_in_both_modes(
    form: tuple[int, bool], has_bias: bool, affine: bool, eps: float, seed: int
) -> None:
    groups, is_transposed = form
    torch.manual_seed(seed)
    kind = nn.ConvTranspose2d if is_transposed else nn.Conv2d
    layers = {"layer": kind(4, 8, 3, groups=groups, bias=has_bias), "bn": nn.BatchNorm2d(8, eps=eps, affine=affine)}
    model = randomize(Chain(**layers), seed)
    live, plain = captured(model, IMAGE), captured(model, IMAGE)
    run_pass(SimulateBatchNormFold(), live)
    for training in (False, True):
        with torch.no_grad():
            found, expected = live.module.train(training)(IMAGE), plain.module.train(training)(IMAGE)
        assert float((found - expected).abs().max()) < 2 * ROUNDING * float(expected.abs().max())


def scaled_by_hand(weight: torch.Tensor, ratio: torch.Tensor, groups: int) -> torch.Tensor:
    """A transposed convolution's weight [in, out / groups, ...], in float64, each output channel times its ratio."""
    rows, each = weight.shape[0] // groups, weight.shape[1]
    found = weight.detach().double()
    for channel, factor in enumerate(ratio.tolist()):
        group, column = divmod(channel, each)
        found[group * rows : (group + 1) * rows, column] *= factor
    return found


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_layer_and_its_batch_norm_are_those_of_float64(groups: int, training: bool) -> None:
    torch.manual_seed(groups)
    layers: dict[str, nn.Module] = {
        "up": nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups, bias=False),
        "norm": nn.BatchNorm2d(6),
    }
    model = randomize(Chain(conv=nn.Conv2d(4, 4, 1), **layers, relu=nn.ReLU()))
    with torch.no_grad():
        model.get_parameter("norm.weight").copy_(torch.linspace(-1.5, 1.4, 6))  # none is close to 0
    program = captured(model, IMAGE)
    load_pipeline("int8_per_channel_qat").prepare(program)
    calibrate(program, [IMAGE])
    module: Any = program.module.train(training)
    norm, seen = copy.deepcopy(module.norm).double(), {}
    module.fake_quants.conv.register_forward_hook(lambda _, args, output: seen.update(x=output.double()))
    module.norm.register_forward_hook(lambda _, args, output: seen.update(z=args[0].double(), y=output.double()))
    module(IMAGE)
    ratio, shape = norm.weight / (norm.running_var + norm.eps).sqrt(), (-1, 1, 1)
    weight = scaled_by_hand(module.up.weight, ratio, groups)
    z = nn.functional.conv_transpose2d(seen["x"], weight, stride=2, groups=groups)
    folded = z + (norm.bias - norm.running_mean * ratio).view(shape)
    torch.testing.assert_close(seen["z"], z if training else folded, rtol=1e-5, atol=1e-5)
    live = nn.functional.batch_norm(z / ratio.view(shape), None, None, norm.weight, norm.bias, True, eps=norm.eps)
    torch.testing.assert_close(seen["y"], live if training else folded, rtol=1e-5, atol=1e-5)


def test_pass_runs_in_a_manager_with_its_contract_checked() -> None:
    program = captured(randomize(Chain(fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6))), ROWS)
    trace = PassManager([SimulateBatchNormFold(), ConvolveBatchNorm()]).run(program, (ROWS,))
    assert [bool(entry.edits) for entry in trace.entries] == [True, False]
