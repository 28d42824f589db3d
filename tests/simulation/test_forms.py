"""program.simulate: one module, three forms of computing it, on the same parameters and buffers."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxquant
from fxquant.errors import FxquantError
from fxquant.graph.manager import PassManager
from fxquant.graph.module import FORMS
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import Mode
from fxquant.passes import AssignSpecs, InsertFakeQuant, QuantizeBias, SelectPerChannel
from tests.capture.nets import ConvNet
from tests.simulation.programs import calibrated, noise, outputs

SIMULATIONS = ("float", "exact", "integer")
X = noise(2, 3, 8, 8)


class Net(nn.Module):
    """Two convolutions, a residual, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.one(x))
        found: torch.Tensor = self.fc(F.adaptive_avg_pool2d(F.relu(self.two(x) + x), 1).flatten(1))
        return found


def program_of(seed: int = 0) -> Program:
    torch.manual_seed(seed)
    return calibrated(Net(), X)


def every_output(program: Program, x: torch.Tensor = X) -> list[torch.Tensor]:
    """What the three forms compute; the form stays the last."""
    with torch.no_grad():
        return [outputs(program, name, x) for name in SIMULATIONS]


def assert_alike(program: Program, x: torch.Tensor = X) -> None:
    """Float and exact differ by roundings, exact and integer not at all."""
    by_float, exact, integer = every_output(program, x)
    assert torch.equal(exact, integer)
    assert float((by_float - exact).abs().max()) <= 0.1 * float(by_float.abs().max())


def test_simulation_is_float_until_it_is_set() -> None:
    program = program_of()
    assert program.simulate == "float" and sorted(FORMS) == ["exact", "integer"]
    for name in SIMULATIONS:
        program.simulate = name
        assert program.simulate == name
    assert_alike(program)


def test_simulation_of_an_unknown_name_is_an_error_with_the_nearest() -> None:
    program = program_of()
    with pytest.raises(FxquantError, match="exact, integer.*'exakt'.*exact"):
        program.simulate = "exakt"
    assert program.simulate == "float"


def test_parameters_and_buffers_are_the_same_objects_in_all_forms() -> None:
    program = program_of()
    before = {name: id(tensor) for name, tensor in program.module.state_dict(keep_vars=True).items()}
    for _ in every_output(program):
        assert {name: id(tensor) for name, tensor in program.module.state_dict(keep_vars=True).items()} == before


@pytest.mark.parametrize("how", [Program.copy, lambda p: _around(p, copy.deepcopy), lambda p: _around(p, _pickled)])
def test_copies_keep_the_form_and_share_nothing(how: Any) -> None:
    program = program_of()
    expected = every_output(program)
    program.simulate = "exact"
    twin = how(program)
    assert twin.simulate == "exact" and torch.equal(twin.module(X), expected[1])
    with torch.no_grad():
        next(twin.module.parameters()).add_(1.0)
    assert torch.equal(program.module(X), expected[1]) and not torch.equal(twin.module(X), expected[1])


def _around(program: Program, how: Any) -> Program:
    twin = Program(how(program.module), stage=program.stage, target=program.target)
    twin.link_biases()
    return twin


def _pickled(module: nn.Module) -> nn.Module:
    found: nn.Module = pickle.loads(pickle.dumps(module))
    return found


def test_a_shallow_copy_of_the_module_shares_its_parameters_but_not_its_form() -> None:
    program = program_of()
    every_output(program)
    twin = copy.copy(program.module)
    program.simulate = "float"
    assert twin.simulation == "integer"
    with torch.no_grad():
        next(program.module.parameters()).add_(1.0)
        assert torch.equal(twin(X), outputs(program, "integer", X))


def test_a_state_dict_carries_over_between_forms() -> None:
    program, other = program_of(0), program_of(1)
    expected = every_output(program)
    every_output(other)
    other.module.load_state_dict(program.module.state_dict())
    for found, wanted in zip(every_output(other), expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_saved_program_computes_the_same_in_all_forms(tmp_path: Path) -> None:
    program = program_of()
    expected = every_output(program)
    program.save(tmp_path / "program.fxq")
    loaded = fxquant.load_program(tmp_path / "program.fxq")
    for found, wanted in zip(every_output(loaded), expected, strict=True):
        assert torch.equal(found, wanted)


def test_forms_follow_the_module_when_it_is_moved() -> None:
    """Moving replaces every buffer by a new one."""
    program = program_of()
    expected = every_output(program)
    program.module.to("cpu")
    program.module._apply(lambda tensor: tensor.clone())
    for found, wanted in zip(every_output(program), expected, strict=True):
        assert torch.equal(found, wanted)


def test_an_optimizer_step_in_one_form_is_seen_by_the_others() -> None:
    program = program_of()
    before = every_output(program)
    optimizer = torch.optim.SGD(program.module.parameters(), lr=0.5)
    outputs(program, "exact", X).square().sum().backward()
    optimizer.step()
    for old, new in zip(before, every_output(program), strict=True):
        assert not torch.equal(old, new)
    assert_alike(program)


def test_training_in_the_exact_form_lowers_the_loss() -> None:
    program = program_of()
    optimizer = torch.optim.Adam(program.module.parameters(), lr=0.01)
    wanted, losses = noise(2, 4, seed=3), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(outputs(program, "exact", X), wanted)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]  # grids that stand still bound the outputs
    assert_alike(program)


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.OBSERVE])
def test_quantizers_that_are_switched_off_are_off_in_all_forms(mode: Mode) -> None:
    program = program_of()
    every_output(program)
    for _, module in program.fake_quant_nodes():
        module.mode = mode
    by_float, exact, integer = every_output(program)
    # Not equal: products of real numbers may be added in another order where memory is aligned otherwise.
    assert torch.allclose(by_float, exact, atol=1e-6) and torch.allclose(exact, integer, atol=1e-6)
    for _, module in program.fake_quant_nodes():
        module.mode = Mode.FAKE
    assert_alike(program)


def test_one_quantizer_that_is_switched_off_leaves_the_others_on() -> None:
    program = program_of()
    before = every_output(program)[1]
    returned = program.graph.output_node().all_input_nodes
    module = next(module for node, module in program.fake_quant_nodes() if node in returned)
    module.mode = Mode.OFF
    assert not torch.equal(every_output(program)[1], before)
    assert_alike(program)
    module.mode = Mode.FROZEN
    assert torch.equal(every_output(program)[1], before)


def test_calibration_anew_is_picked_up() -> None:
    program = program_of()
    before = every_output(program)
    fxquant.calibrate(program, [(5 * X,)], progress=False)
    for old, new in zip(before, every_output(program), strict=True):
        assert not torch.equal(old, new)
    assert_alike(program, 5 * X)


def test_a_grid_changed_in_place_is_picked_up() -> None:
    program = program_of()
    before = every_output(program)[1]
    for _, module in program.fake_quant_nodes():
        if not module.follows:
            module.scale.mul_(3.0)
    assert not torch.equal(every_output(program)[1], before)
    assert_alike(program)


def test_a_rewritten_graph_is_computed_anew() -> None:
    program = program_of()
    program.simulate = "exact"
    program.module(X)
    assert "_form" in program.module.__dict__
    fxquant.load_pipeline("int8_per_channel").finalize(program)
    program.recompile()
    assert "_form" not in program.module.__dict__
    assert_alike(program)


def unfolded() -> Program:
    """A program that keeps its batch norms and its dropout."""
    torch.manual_seed(0)
    program = fxquant.capture(ConvNet(), X)
    PassManager([AssignSpecs(), SelectPerChannel(), InsertFakeQuant(), QuantizeBias()]).run(program)
    fxquant.calibrate(program, [(X,)], progress=False)
    return program


def test_training_mode_keeps_dropout_and_live_batch_norm() -> None:
    program = unfolded()
    statistics = {name: b.clone() for name, b in program.module.named_buffers() if name.endswith("running_mean")}
    assert statistics
    program.module.train()
    found = []
    for _ in range(2):
        found.append(outputs(program, "exact", X))
    assert not torch.equal(*found)
    found[-1].sum().backward()
    for name, value in program.module.named_buffers():
        assert name not in statistics or not torch.equal(value, statistics[name])
    program.module.eval()
    assert torch.equal(*every_output(program)[1:])
    assert torch.equal(outputs(program, "exact", X), outputs(program, "exact", X))


def test_training_mode_draws_the_same_dropout_in_float_and_exact() -> None:
    program = unfolded()
    program.module.train()
    found = []
    for name in ("float", "exact"):
        torch.manual_seed(3)
        found.append(outputs(program, name, X).detach())
    assert float((found[0] - found[1]).abs().max()) <= 0.1 * float(found[0].abs().max())


@dataclass
class Both:
    """An output that is no tensor."""

    low: torch.Tensor
    high: torch.Tensor


torch.export.register_dataclass(Both)


class Structured(nn.Module):
    """Reads a dictionary and a keyword, returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, batch: dict[str, torch.Tensor], *, shift: torch.Tensor) -> Both:
        y = self.fc(batch["x"])
        return Both(y + shift, F.relu(y))


def test_dictionaries_keywords_and_dataclasses_go_through_all_forms() -> None:
    torch.manual_seed(0)
    batch = {"batch": {"x": noise(2, 4)}, "shift": noise(2, 3, seed=1)}
    program = fxquant.capture(Structured().eval(), batch)
    fxquant.load_pipeline("int8_per_channel").prepare(program)
    fxquant.calibrate(program, [batch], progress=False)
    found = []
    with torch.no_grad():
        for name in SIMULATIONS:
            program.simulate = name
            found.append(program.module(batch["batch"], shift=batch["shift"]))
    assert all(type(one) is Both for one in found)
    assert torch.equal(found[1].low, found[2].low) and torch.equal(found[1].high, found[2].high)
    assert torch.allclose(found[0].low, found[1].low, atol=0.05)


@pytest.mark.parametrize("name", SIMULATIONS)
def test_threads_compute_what_one_thread_computes(name: str) -> None:
    program = program_of()
    fxquant.load_pipeline("int8_per_channel").finalize(program)  # grids that follow are written to at every forward
    inputs = [noise(2, 3, 8, 8, seed=seed) for seed in range(8)]
    with torch.no_grad():
        expected = [outputs(program.copy(), name, x) for x in inputs]
    program.simulate = name
    found: dict[int, torch.Tensor] = {}

    def compute(number: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                found[number] = program.module(inputs[number])

    threads = [threading.Thread(target=compute, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], wanted) for number, wanted in enumerate(expected))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, in its compiler
@pytest.mark.parametrize("name", SIMULATIONS)
def test_a_compiled_module_computes_the_same(name: str) -> None:
    program, x = calibrated(nn.Linear(4, 3), noise(2, 4)), noise(2, 4)
    with torch.no_grad():
        expected = outputs(program, name, x)
        compiled = torch.compile(program.module, backend="eager")
        assert torch.allclose(compiled(x), expected, atol=1e-6)


def test_hooks_of_the_module_run_in_all_forms() -> None:
    program = program_of()
    seen: list[str] = []
    program.module.register_forward_hook(lambda module, args, output: seen.append(module.simulation))
    every_output(program)
    assert seen == list(SIMULATIONS)
