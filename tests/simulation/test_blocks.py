"""Layers whose weights are quantized in blocks: float islands by that name, in the plan and in what onnxruntime ran."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.graph.islands import Island, islands
from fxquant.graph.program import Program
from fxquant.graph.storage import load_program
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.parity.optimised import KernelKind
from fxquant.simulation.plan import IslandKind, read_plan
from tests.simulation.blocks import BLOCK, BLOCKED, Blocks, blocks_program, images, pipeline_in_blocks
from tests.simulation.plans import disagreements
from tests.simulation.programs import gradients, largest_error, on_powers_of_two, outputs

REASON = f"its weight is quantized in blocks of {BLOCK}, which no integer kernel takes"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return blocks_program(tmp_path_factory.mktemp("blocks"))


@pytest.fixture(scope="module")
def path(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fxquant.export_onnx(program, tmp_path_factory.mktemp("blocks") / "model.onnx")


def test_layer_is_a_float_island_named_by_its_blocks(program: Program) -> None:
    plan = read_plan(program)
    found = {end.name: island for end, island in plan.islands.items() if island.kind is IslandKind.FLOAT}
    assert sorted(found) == ["c2_fq", "fc_fq", "q_fq", "relu_fq"]
    assert {island.reason for island in found.values()} == {REASON}
    assert [site.operation.name for site in plan.sites.values()] == ["depthwise"]


def test_layer_is_drawn_as_float_when_its_weight_is_in_blocks(program: Program) -> None:
    found = {node.name: island for node, island in islands(program).items()}
    assert {found[name] for name in BLOCKED} == {Island.FLOAT}
    assert found["depthwise"] is Island.INTEGER


@pytest.mark.parametrize("simulation", ["float", "exact", "integer"])
def test_onnxruntime_computes_what_the_simulation_does(program: Program, path: Path, simulation: str) -> None:
    report = fxquant.check_parity(program, path, [images(4, 3)], simulation=simulation, progress=False)
    assert report.fault == () and report.stored == ()
    assert disagreements(program, read_plan(program), report.fusion) == []
    assert max(row.local.worst for row in report.rows) <= 1  # a step: float products, in another order
    assert sum(row.local.differing for row in report.rows) <= 16
    kernels = {name: report.fusion.of(name) for name in (*BLOCKED, "depthwise")}
    for name in BLOCKED:
        kernel = kernels[name]
        assert kernel is not None and kernel.kind is KernelKind.FLOAT and kernel.reason == REASON
    depthwise = kernels["depthwise"]
    assert depthwise is not None and depthwise.kind is KernelKind.INTEGER


@pytest.mark.parametrize("bits", [4, 8])
def test_program_is_the_same_after_saving(tmp_path: Path, bits: int) -> None:
    program = blocks_program(tmp_path, bits=bits)
    program.save(tmp_path / "program.fxq")
    again = load_program(tmp_path / "program.fxq")
    for (node, module), (other, loaded) in zip(program.fake_quant_nodes(), again.fake_quant_nodes(), strict=True):
        assert node.name == other.name and module.spec == loaded.spec
        assert torch.equal(module.scale, loaded.scale) and torch.equal(module.zero_point, loaded.zero_point)
    assert again.module.get_submodule("fake_quants.c1_weight").scale.shape == (16, 2, 3, 3)
    x = images(2, 5)
    with torch.no_grad():
        for simulation in ("float", "exact", "integer"):
            assert torch.equal(outputs(program, simulation, x), outputs(again, simulation, x))
    first = fxquant.export_onnx(program, tmp_path / "first.onnx").read_bytes()
    assert first == fxquant.export_onnx(again, tmp_path / "second.onnx").read_bytes()


def test_exact_simulation_has_the_float_gradients_where_both_round_alike(program: Program) -> None:
    same = on_powers_of_two(program.copy())
    x = images(2, 7)
    assert largest_error(gradients(same, "float", x), gradients(same, "exact", x)) < 1e-4


def test_weight_stays_followed_when_it_is_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = fxquant.capture(Blocks().eval(), (images(),))
    pipeline_in_blocks(tmp_path).prepare(program)
    fxquant.calibrate(program, [images(8)], progress=False)
    weight = program.module.get_parameter("c2.weight")
    with torch.no_grad():
        weight[3, BLOCK:] *= 5
        program.module(images(2, 1))
    module = program.module.get_submodule("fake_quants.c2_weight")
    assert isinstance(module, FakeQuant)
    expected = weight.detach().reshape(16, 2, BLOCK, 1, 1).abs().amax(2) / 127
    assert torch.allclose(module.scale, expected, rtol=1e-6)
