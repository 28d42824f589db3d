"""What training loops do to a module besides calling it: autocast, compile, copies, files, checkpointing, averages."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import fxquant
from fxquant.errors import FxquantError
from fxquant.graph.module import ProgramModule
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.numerics.padded_convolution import PADDED_CONVOLUTION
from fxquant.sim import QuantSim
from tests.training.residual import (
    FOLDED,
    LIVE,
    WAYS,
    assert_ends_where_it_trained,
    batches,
    gradients,
    loss_of,
    simulated,
    train,
)

ways = pytest.mark.parametrize(("preset", "training"), WAYS)
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own, of any autograd function


def states_differ(one: torch.nn.Module, other: torch.nn.Module) -> list[str]:
    """Keys whose tensors differ; NaN is NaN."""
    twin = other.state_dict()
    return [key for key, here in one.state_dict().items() if not torch.equal(here.nan_to_num(), twin[key].nan_to_num())]


@ways
def test_autocast_trains_and_leaves_exact_codes(preset: str, training: str | None, tmp_path: Path) -> None:
    sim = simulated(preset, training)
    module = sim.model.train()
    wrong: list[torch.Tensor] = []

    def look(quantizer: FakeQuant, args: tuple[Any, ...], output: torch.Tensor) -> None:
        codes = output.double() / quantizer.scale.double().view(-1, *[1] * (output.ndim - 1))
        wrong.extend([codes] if quantizer.follows and not torch.allclose(codes, codes.round(), atol=1e-4) else [])
        assert output.dtype is args[0].dtype and quantizer.scale.dtype is torch.float32

    hooks = [quantizer.register_forward_hook(look) for _, quantizer in sim.program.fake_quant_nodes()]
    before = [one.detach().clone() for one in module.parameters() if one.ndim > 1]
    optimizer = torch.optim.Adam(fxquant.parameter_groups(sim.program, 1e-3, 1e-4))
    for batch in batches():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(module, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        assert torch.isfinite(loss)
    for hook in hooks:
        hook.remove()
    assert wrong == []
    after = [one for one in module.parameters() if one.ndim > 1]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert_ends_where_it_trained(sim, sim.program, tmp_path)


class Convolutions(nn.Module):
    """One of each form: plain, transposed, with a pad in front, of a single axis."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.up = nn.Conv2d(3, 4, 3, bias=False), nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.padded, self.line = nn.Conv2d(4, 4, 2), nn.Conv1d(4, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.padded(nn.functional.pad(torch.relu(self.up(self.plain(x))), (0, 1, 0, 1)))
        return torch.as_tensor(self.line(y.flatten(2)).mean(2))


def dtypes_of_saved_images(module: nn.Module, dtype: torch.dtype, enabled: bool) -> list[torch.dtype]:
    """Of what a forward on `dtype` under autocast keeps for backward, those with all its convolutions' axes."""
    kept: list[torch.dtype] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.extend([tensor.dtype] if tensor.ndim > 2 and tensor.is_floating_point() else [])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            module.to(dtype)(batches()[0].to(dtype)).sum().backward()
    return kept


@pytest.mark.parametrize(
    ("enabled", "dtype", "expected"),
    [
        (True, torch.float32, torch.bfloat16),
        (False, torch.float32, torch.float32),
        (True, torch.float64, torch.float64),
        (True, torch.bfloat16, torch.bfloat16),
    ],
)
def test_convolutions_compute_in_the_dtype_of_autocast(
    enabled: bool, dtype: torch.dtype, expected: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = Convolutions().eval()
    sim = QuantSim(copy.deepcopy(model), batches()[0], FOLDED)
    assert any(node.target is PADDED_CONVOLUTION for node in sim.program.graph.nodes)
    sim.compute_encodings(batches(), progress=False)
    module = pickle.loads(pickle.dumps(sim.model)).train()
    for each in (model, sim.model.train(), module):
        seen = dtypes_of_saved_images(each, dtype, enabled)
        assert len(seen) >= 8 and set(seen[:8]) == {expected}, (seen, each)


@pytest.mark.parametrize(("enabled", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_convolution_in_front_of_a_live_batch_norm_heeds_autocast(enabled: bool, expected: torch.dtype) -> None:
    module, seen = simulated(LIVE).model.train(), []
    module.bn.register_forward_hook(lambda _, args, output: seen.append((args[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        module(batches()[0])
    assert seen == [(expected, expected)]


def test_exact_is_exact_under_autocast() -> None:
    program = simulated().program
    program.simulate = "exact"
    expected = program.module(batches()[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(program.module(batches()[0]), expected)


@compiles
@pytest.mark.parametrize(("mode", "training"), [(True, None), (False, None), (True, "lsq")])
def test_compiled_module_is_one_graph_with_the_eager_gradients(mode: bool, training: str | None) -> None:
    torch._dynamo.reset()
    module = simulated(LIVE, training).model.train(mode)
    twin = copy.deepcopy(module)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, backend=counter)
    for batch in batches(2):
        expected, found = gradients(module, batch), gradients(twin, batch, compiled)
        assert expected.keys() == found.keys()
        for name, one in expected.items():
            torch.testing.assert_close(found[name], one, rtol=1e-3, atol=1e-5)
    assert counter.frame_count == 1
    for (name, here), there in zip(module.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(there, here, equal_nan=True, msg=name)


@compiles
def test_compiled_module_notices_what_is_frozen() -> None:
    torch._dynamo.reset()
    sim = simulated()
    compiled = torch.compile(sim.model.train(), backend="eager")
    compiled(batches()[0])
    sim.freeze_batch_norm()
    sim.freeze_encodings()
    before = {key: tensor.clone() for key, tensor in sim.model.state_dict().items()}
    found = compiled(batches()[1])
    torch.testing.assert_close(found, sim.model(batches()[1]))
    assert all(torch.equal(before[key].nan_to_num(), now.nan_to_num()) for key, now in sim.model.state_dict().items())


@ways
def test_copy_made_in_training_goes_on_as_the_original(preset: str, training: str | None) -> None:
    module = simulated(preset, training).model.train()
    optimizer = torch.optim.AdamW(fxquant.parameter_groups(module, 1e-3))
    train(module, optimizer)
    twin = copy.deepcopy(module)
    again = torch.optim.AdamW(fxquant.parameter_groups(twin, 1e-3))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(module, optimizer)
    middle = copy.deepcopy(twin.state_dict())
    assert states_differ(module, twin) != []
    train(twin, again)
    assert states_differ(module, twin) == []
    assert middle.keys() == twin.state_dict().keys()


@pytest.mark.parametrize("use_buffers", [True, False])
@ways
def test_average_of_the_weights_ends_where_it_stands(
    preset: str, training: str | None, use_buffers: bool, tmp_path: Path
) -> None:
    sim = simulated(preset, training)
    module = sim.model.train()
    ema = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    optimizer = torch.optim.SGD(module.parameters(), 1e-2)
    for _ in range(3):
        train(module, optimizer, 1)
        ema.update_parameters(module)
    assert isinstance(ema.module, ProgramModule)
    assert_ends_where_it_trained(sim, sim.program.with_module(ema.module), tmp_path)


def test_module_of_another_graph_is_refused() -> None:
    sim = simulated()
    twin = copy.deepcopy(sim.model)
    sim.freeze_batch_norm()
    with pytest.raises(FxquantError, match="with_module; expected a copy of this program's module; got a module with"):
        sim.program.with_module(twin)


def test_module_files_compute_the_same_in_a_new_process(tmp_path: Path) -> None:
    module = simulated(LIVE, "lsq+").model.train()
    train(module, torch.optim.SGD(module.parameters(), 1e-2))
    (tmp_path / "pickled").write_bytes(pickle.dumps(module))
    torch.save(module, tmp_path / "saved")
    code = """
import pickle, torch
modules = (pickle.load(open("pickled", "rb")), torch.load("saved", weights_only=False))
x = torch.ones(4, 3, 8, 8) * torch.linspace(-1, 1, 8)
torch.save([(each.training, each(x), each.eval()(x)) for each in modules], "outputs")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    x = torch.ones(4, 3, 8, 8) * torch.linspace(-1, 1, 8)
    trained, evaluated = module(x), module.eval()(x)
    for mode, *found in torch.load(tmp_path / "outputs"):
        assert mode is True
        assert torch.equal(found[0], trained)
        assert torch.equal(found[1], evaluated)


@ways
def test_state_dict_brings_back_weights_statistics_and_ranges(preset: str, training: str | None) -> None:
    sim = simulated(preset, training)
    module = sim.model.train()
    twin = sim.program.copy().module
    train(module, torch.optim.SGD(module.parameters(), 1e-2))
    assert states_differ(module, twin) != []
    twin.load_state_dict(module.state_dict())
    assert states_differ(module, twin) == []
    assert torch.equal(module.eval()(batches()[0]), twin.eval()(batches()[0]))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("preset", "training"), [*WAYS, (LIVE, "moving-average(0.01)")])
def test_checkpointing_has_the_same_gradients_and_statistics(
    preset: str, training: str | None, reentrant: bool
) -> None:
    module = simulated(preset, training).model.train()
    twin = copy.deepcopy(module)
    for batch in batches(2):
        x = batch.clone().requires_grad_(reentrant)
        expected = gradients(module, batch)
        found = gradients(twin, x, lambda x: checkpoint(twin, x, use_reentrant=reentrant))
        assert expected.keys() == found.keys()
        assert [name for name, one in expected.items() if not torch.equal(one, found[name])] == []
        assert states_differ(module, twin) == []


def test_gradients_accumulate_over_parts_of_a_batch() -> None:
    module, batch = simulated(FOLDED).model.train(), batches()[0]
    together = gradients(module, batch)
    module.zero_grad()
    for index in range(4):
        loss = torch.nn.functional.cross_entropy(module(batch[index : index + 1]), torch.tensor([index]))
        (loss / 4).backward()
    for name, one in module.named_parameters():
        torch.testing.assert_close(one.grad, together[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_optimizers_and_schedulers_drive_it(kind: Any) -> None:
    module = simulated(LIVE, "lsq").model.train()
    optimizer = kind(fxquant.parameter_groups(module, 1e-3, 1e-4))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-3, 1e-3, 1e-4], total_steps=4)
    before = [one.detach().clone() for one in module.parameters()]
    for _ in range(3):
        train(module, optimizer, 1)
        schedule.step()
    assert sum(not torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True)) == len(before)


def test_lbfgs_lowers_the_loss() -> None:
    module, batch = simulated(FOLDED).model.train(), batches()[0]
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=5)

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(module, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    first = optimizer.step(closure)
    assert closure() < first


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cast_module_trains_with_grids_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    sim = simulated(FOLDED, "lsq")
    module = sim.model.train().to(dtype)
    optimizer = torch.optim.SGD(module.parameters(), 1e-3)
    for batch in batches():
        optimizer.zero_grad()
        loss_of(module, batch.to(dtype)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    kept = {part.dtype for _, one in sim.program.fake_quant_nodes() for part in (one.scale, *one.parameters())}
    assert kept == {torch.float32}
    module.float()
    assert_ends_where_it_trained(sim, sim.program, tmp_path)


def test_functional_call_computes_with_other_parameters() -> None:
    module = simulated().model.train()
    twin, other = copy.deepcopy(module), copy.deepcopy(module)
    with torch.no_grad():
        for one in other.parameters():
            one.mul_(1.01)
    found = torch.func.functional_call(twin, dict(other.named_parameters()), (batches()[0],))
    assert torch.equal(found, other(batches()[0]))


def test_hooks_fire_forward_and_backward() -> None:
    module, seen = simulated().model.train(), []
    module.register_forward_hook(lambda *_: seen.append("forward"))
    module.fake_quants.relu.register_full_backward_hook(lambda *_: seen.append("backward"))
    gradients(module, batches()[0])
    assert seen == ["forward", "backward"]


def test_inference_mode_between_steps_disturbs_nothing(tmp_path: Path) -> None:
    sim = simulated(LIVE, "lsq+")
    module, twin = sim.model.train(), sim.program.copy().module.train()
    one, other = (torch.optim.Adam(each.parameters(), 1e-3) for each in (module, twin))
    for _ in range(3):
        train(module, one, 1)
        train(twin, other, 1)
        with torch.inference_mode():
            found = module.eval()(batches()[1])
        with torch.no_grad():
            assert torch.equal(found, module(batches()[1]))
        module.train()
    assert not any(tensor.is_inference() for tensor in module.state_dict().values())
    weights = dict(module.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in twin.named_parameters())
    assert_ends_where_it_trained(sim, sim.program, tmp_path)


def test_frozen_backbone_stands_still(tmp_path: Path) -> None:
    sim = simulated(LIVE, "lsq")
    module = sim.model.train()
    module.stem.requires_grad_(False)
    module.bn.requires_grad_(False)
    module.bn.eval()
    before = {key: value.clone() for key, value in module.state_dict().items() if key.startswith(("stem", "bn."))}
    train(module, torch.optim.AdamW(fxquant.parameter_groups(module, 1e-3)))
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())
    assert_ends_where_it_trained(sim, sim.program, tmp_path)


@pytest.mark.parametrize("way", ["copy_", "load_state_dict", "wrapped", "replaced"])
@pytest.mark.parametrize("simulation", ["float", "exact"])
def test_bias_changed_in_eval_mode_raises_its_weight_scale(way: str, simulation: str) -> None:
    sim = simulated(FOLDED)
    program = sim.program
    module = program.module.eval()
    program.simulate = simulation
    module(batches()[0])
    scale = module.get_submodule("fake_quants.fc_weight").scale.clone()
    bias = torch.full((5,), 1e7)
    if way == "copy_":
        with torch.no_grad():
            module.fc.bias.copy_(bias)
    elif way == "replaced":
        module.fc.bias = torch.nn.Parameter(bias)
    else:
        state = {**module.state_dict(), "fc.bias": bias}
        holder: torch.nn.Module = torch.nn.Sequential(module) if way == "wrapped" else module
        holder.load_state_dict({f"0.{key}": one for key, one in state.items()} if way == "wrapped" else state)
    found = module(batches()[0])
    assert bool((module.get_submodule("fake_quants.fc_weight").scale > scale).all())
    assert torch.equal(found, sim.snapshot().module(batches()[0]))
