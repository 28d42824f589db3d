"""The exact and the integer form compute onnxruntime's codes, and each other's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxquant
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import Mode
from fxquant.numerics.runtime import open_session
from fxquant.simulation import tables
from tests.simulation.programs import OPTIONS, calibrated, counts, noise, outputs, pipeline_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ACTIVATIONS = (nn.Identity, nn.ReLU, nn.ReLU6, lambda: nn.Hardtanh(-0.5, 0.75))


class Padded(nn.Module):
    """A convolution behind an asymmetric zero pad, an activation behind it."""

    def __init__(self, layer: nn.Module, pad: tuple[int, ...], activation: nn.Module) -> None:
        super().__init__()
        self.layer, self.pad, self.activation = layer, pad, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.activation(self.layer(F.pad(x, self.pad)))
        return found


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor, int]:
    """A net of one convolution, an input for it, and the bits of weights and activations."""
    rank, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 4]))
    seed = draw(st.integers(0, 999))
    torch.manual_seed(seed)
    layer = CONVOLUTIONS[rank - 1](
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        stride=draw(st.integers(1, 2)),
        dilation=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 1)),
        groups=groups,
        bias=draw(st.booleans()),
    )
    pad = tuple(draw(st.lists(st.integers(0, 2), min_size=2 * rank, max_size=2 * rank)))
    x = noise(2, layer.in_channels, *(6,) * rank, seed=seed) * 3
    activation = draw(st.sampled_from(ACTIVATIONS))()
    return Padded(layer, pad, activation), x, draw(st.sampled_from([8, 8, 4, 3]))


def assert_exact(program: Program, folder: Path, *inputs: torch.Tensor) -> None:
    """Both forms compute onnxruntime's codes, at every quantized tensor, and the same outputs."""
    for simulation in ("exact", "integer"):
        compared, differing = counts(program, folder, *inputs, simulation=simulation)
        assert compared > 0 and differing == 0, simulation
    with torch.no_grad():
        assert torch.equal(outputs(program, "exact", *inputs), outputs(program, "integer", *inputs))


@settings(max_examples=12)
@given(convolutions())
def test_codes_are_those_of_onnxruntime_behind_a_convolution(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[nn.Module, torch.Tensor, int]
) -> None:
    model, x, bits = case
    folder = tmp_path_factory.mktemp("convolution")
    program = calibrated(model, x, pipeline=pipeline_of(folder, weight=bits, activation=bits))
    assert_exact(program, folder, 1.5 * x)


class Addmm(nn.Module):
    """bias + x @ w, on parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(7, 5, seed=1))
        self.bias = nn.Parameter(noise(5, seed=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Product(nn.Module):
    """x @ y of two activations, then by a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(6, 3, seed=3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.matmul(torch.matmul(x, y), self.weight)


class Everything(nn.Module):
    """Each kernel that is no product, behind and before convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.gate, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(12, 4, 1)
        self.fc = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = F.relu(self.one(x)), F.leaky_relu(self.two(x), 0.1)
        total = a + b
        gated = total * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(total, 1)))
        chosen = torch.where(x[:, :1] > 0, a, b)
        joined = torch.cat([gated, F.avg_pool2d(b, 3, 1, 1), chosen], 1)
        found = F.max_pool2d(F.relu6(self.last(joined)), 2)
        return F.softmax(8 * self.fc(found.flatten(2).transpose(1, 2)), -1)


def seeded(kind: type[nn.Module], *args: int, **kwargs: bool) -> nn.Module:
    torch.manual_seed(0)
    return kind(*args, **kwargs)


NETS: list[tuple[str, nn.Module, tuple[torch.Tensor, ...]]] = [
    ("linear", seeded(nn.Linear, 9, 5), (noise(4, 9),)),
    ("linear-no-bias", seeded(nn.Linear, 9, 5, bias=False), (noise(4, 9),)),
    ("linear-rank-3", seeded(nn.Linear, 9, 5), (noise(2, 3, 9),)),
    ("linear-rank-3-no-bias", seeded(nn.Linear, 9, 5, bias=False), (noise(2, 3, 9),)),
    ("addmm", Addmm(), (noise(4, 7),)),
    ("products", Product(), (noise(2, 4, 5), noise(2, 5, 6, seed=1))),
    ("everything", seeded(Everything), (noise(2, 3, 8, 8),)),
]


@pytest.mark.parametrize(("model", "inputs"), [net[1:] for net in NETS], ids=[net[0] for net in NETS])
def test_codes_are_those_of_onnxruntime_in_small_nets(
    tmp_path: Path, model: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> None:
    assert_exact(calibrated(model, *inputs), tmp_path, *(1.5 * x for x in inputs))


def linear_program(x: torch.Tensor) -> Program:
    """A linear layer whose output has no grid: QGemm writes float32 there."""
    program = calibrated(seeded(nn.Linear, 9, 5), x)
    for node, module in program.fake_quant_nodes():
        if node in program.graph.output_node().all_input_nodes:
            module.mode = Mode.OFF
    return program


def test_float_outputs_are_rounded_twice_where_no_grid_follows() -> None:
    """f(f(acc) * f(sx * sw)), by hand."""
    x = noise(4, 9)
    program = linear_program(x)
    quants = {node.name: module for node, module in program.fake_quant_nodes()}
    of_x, of_weight = quants["x_fq"] if "x_fq" in quants else next(iter(quants.values())), quants["weight_fq"]
    codes = of_x.codes(x).to(torch.int64) - of_x.zero_point
    weight, bias = program.module.weight, program.module.bias
    scale = of_x.scale * of_weight.scale
    accumulator = codes @ of_weight.codes(weight).to(torch.int64).T + torch.round(bias / scale).to(torch.int64)
    with torch.no_grad():
        for simulation in ("exact", "integer"):
            assert torch.equal(outputs(program, simulation, x), accumulator.to(torch.float32) * scale)


def test_integer_form_wraps_where_an_int32_accumulator_overflows() -> None:
    """40,000 products of 255 * 127 are 2^31 and a bit, wrapped: the exact form, which does not wrap, differs."""
    width = 68_000
    model = nn.Linear(width, 1)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.zero_()
    program = calibrated(model, torch.cat([torch.ones(1, width), torch.zeros(1, width)]))
    x = torch.ones(1, width)
    with torch.no_grad():
        exact, integer = outputs(program, "exact", x), outputs(program, "integer", x)
    assert 255 * 127 * width > 2**31
    assert float(exact) == pytest.approx(width, rel=0.01)
    assert float(integer) <= 0


def test_comparison_finds_a_planted_fault(tmp_path: Path) -> None:
    """One weight of the program moves behind the export."""
    x = noise(4, 9)
    program = calibrated(seeded(nn.Linear, 9, 5), x)
    path = tmp_path / "model.onnx"
    assert counts(program, tmp_path, x, simulation="exact")[1] == 0
    twin = calibrated(seeded(nn.Linear, 9, 5), x)
    with torch.no_grad():
        twin.module.weight[2, 3] += 0.05
    report = fxquant.check_parity(
        twin, path, [x], simulation="exact", progress=False, allow_mismatch=True, check_stored=False
    )
    assert sum(row.overall.differing for row in report.rows) > 0


class Shifted(nn.Module):
    """A convolution's output plus a parameter, times another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)
        self.shift = nn.Parameter(noise(4, 1, 1, seed=4))
        self.gain = nn.Parameter(noise(1, 4, 1, 1, seed=5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = (self.layer(x) + self.shift) * self.gain
        return found


def test_tables_of_parameters_are_made_once_and_again_when_the_parameter_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = noise(2, 3, 4, 4)
    program = calibrated(seeded(Shifted), x)
    made = []
    make = tables._make
    monkeypatch.setattr(tables, "_make", lambda *args: made.append(args[0].site.operation.name) or make(*args))
    with torch.no_grad():
        for _ in range(3):
            outputs(program, "exact", x)
        assert len(made) == len(set(made)) == 2
        for parameter in (program.module.shift, program.module.gain):
            parameter.mul_(1.7)
        outputs(program, "exact", x)
    assert len(made) == 4
    assert_exact(program, tmp_path, x)


def test_infinite_inputs_saturate_and_nan_has_the_lowest_code(tmp_path: Path) -> None:
    x = noise(2, 3, 8, 8)
    program = calibrated(seeded(Everything), x)
    special = x.clone()
    special[0, :, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    path = tmp_path / "model.onnx"
    fxquant.export_onnx(program, path)
    session = open_session(path.read_bytes(), OPTIONS)
    (expected,) = session.run(dict.fromkeys(session.input_names, special.numpy())).values()
    with torch.no_grad():
        for simulation in ("exact", "integer"):
            assert torch.equal(outputs(program, simulation, special), torch.from_numpy(expected))
    first = next(module for node, module in program.fake_quant_nodes() if node.args[0].op == "placeholder")
    assert first.codes(special[0, 0, 0, :3]).tolist() == [0, 255, 0]
    leaf = special.clone().requires_grad_()
    outputs(program, "exact", leaf).sum().backward()
    assert leaf.grad is not None and torch.isfinite(leaf.grad).all()
    assert (leaf.grad[0, :, 0, :3] == 0).all() and (leaf.grad != 0).any()


@pytest.mark.parametrize("simulation", ["exact", "integer"])
def test_a_grid_of_no_numbers_gives_no_numbers(simulation: str) -> None:
    """Training that diverged is to be seen in its loss: no table is read outside."""
    program = calibrated(seeded(Everything), noise(2, 3, 8, 8))
    for _, module in program.fake_quant_nodes():
        module.mode = Mode.FROZEN
        module.scale.fill_(float("nan"))
    assert torch.isnan(outputs(program, simulation, noise(2, 3, 8, 8))).all()


class Broadcast(nn.Module):
    """Of shape [n, 1], plus a parameter of shape [256, 1, 1]: QLinearAdd takes a single number for its second."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(noise(256, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


# Found by trying: 4 of all 65,536 sums depend on the operands' order.
UNLIKE = {
    "x_fq": (0.0448107048869133, 117),
    "shift_fq": (0.03649750351905823, 85),
    "add_fq": (0.022801781073212624, 48),
}


def test_a_sum_whose_operands_change_their_order_has_a_table_for_each() -> None:
    """A batch of one makes the first operand a single number. All codes are added to all."""
    program = calibrated(Broadcast(), noise(256, 1))
    modules = {node.name: module for node, module in program.fake_quant_nodes()}
    for name, (scale, zero_point) in UNLIKE.items():
        modules[name].mode = Mode.FROZEN
        modules[name].scale.fill_(scale)
        modules[name].zero_point.fill_(zero_point)
    x, codes = modules["x_fq"].real(torch.arange(256)).view(256, 1), torch.arange(256).view(256, 1, 1)
    rows = [x[i : i + 1] for i in range(256)]
    with torch.no_grad():
        program.module.shift.copy_(modules["shift_fq"].real(codes + modules["shift_fq"].spec.qmin))
        whole = outputs(program, "integer", x)
        single = torch.cat([outputs(program, "integer", row) for row in rows], 1)
        assert int((whole != single).sum()) == 4
        for _ in range(2):
            assert torch.equal(outputs(program, "exact", x), whole)
            assert torch.equal(torch.cat([outputs(program, "exact", row) for row in rows], 1), single)
