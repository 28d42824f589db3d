"""The ..._qat presets: each is its plain twin but for what keeps batch norm live, and exports the same structure; the
..._lsq_qat presets: int8_per_channel_qat but for bits, estimators and what learns ranges.
"""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from fxquant.numerics.fake_quant import Mode
from fxquant.sim import QuantSim
from fxquant.spec import Target
from tests.passes.live import IMAGE, model_of, train

TWINS = ("int8_per_channel", "int8_per_tensor", "int8_reduced_range", "w4a8", "xnnpack", "qnn_htp", "tensorrt")
TRAINING = {
    "epochs": 15,
    "learning_rate": 1e-5,
    "learning_rate_divisor": 10.0,
    "divide_every": 5,
    "freeze_batch_norm_after": 3,
    "freeze_encodings_after": 4,
}
# By name: what a preset with learned ranges has of bits, and by which estimators its ranges start.
LEARNED = {"int8_per_channel_lsq_qat": (8, "moving-average"), "w4a4_lsq_qat": (4, "mse")}
CONFIGS = Path(__file__).parents[1] / "configs"


def as_twin(plain: dict[str, Any]) -> dict[str, Any]:
    """What keeping batch norm live makes of a plain preset."""
    found = copy.deepcopy(plain)
    found["prepare"] = [step for step in found["prepare"] if step["pass"] != "fold-constants"]
    for step in found["prepare"]:
        if step["pass"] == "fold-batch-norm":
            step["pass"] = "simulate-batch-norm-fold"
        if step["pass"] == "assign-specs":
            step["activation"]["estimator"] = "moving-average"
    found["finalize"].insert(0, {"pass": "fold-live-batch-norm"})
    found["training"] = TRAINING
    return found


@pytest.mark.parametrize("twin", TWINS)
def test_preset_is_its_plain_twin_but_for_what_keeps_batch_norm_live(twin: str) -> None:
    plain, qat = (tomllib.loads((CONFIGS / f"{name}.toml").read_text()) for name in (twin, f"{twin}_qat"))
    assert qat == as_twin(plain)


def test_every_packaged_qat_preset_is_tested_here() -> None:
    found = [path.stem for path in CONFIGS.glob("*_qat.toml") if path.stem not in LEARNED]
    assert sorted(found) == sorted(f"{twin}_qat" for twin in TWINS)


@pytest.mark.parametrize("twin", TWINS)
def test_text_says_when_to_use_it(twin: str) -> None:
    text = (CONFIGS / f"{twin}_qat.toml").read_text(encoding="utf-8")
    comment = text[: text.index("target")]
    assert all(line.startswith("# ") for line in comment.splitlines() if line) and "training" in comment
    assert "moving average" in comment and 'estimator = "moving-average"' in text


@pytest.mark.parametrize("twin", TWINS)
def test_exported_structure_is_that_of_the_plain_twin(twin: str, tmp_path: Path) -> None:
    model, x = model_of("nested")
    operations = []
    for preset in (twin, f"{twin}_qat"):
        sim = QuantSim(model, (x,), config=preset)
        sim.compute_encodings([x], progress=False)
        path = sim.export(tmp_path, preset)
        file = onnx.load(path)
        onnx.checker.check_model(file)
        operations.append([node.op_type for node in file.graph.node])
        if sim.program.target is Target.ONNXRUNTIME_X64:
            sim.program.simulate = "exact"
            found = sim.check_parity(path, [(IMAGE,)])
            assert found.exact and "0 float islands, 0 uncertified" in str(found)
    assert operations[0] == operations[1]


@pytest.mark.parametrize("twin", TWINS)
def test_training_moves_the_weights_of_the_model_by_their_own_names(twin: str) -> None:
    model, x = model_of("nested")
    sim = QuantSim(model, (x,), config=f"{twin}_qat")
    sim.compute_encodings([x], progress=False)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in sim.model.named_parameters()] == names
    sim.model.train()
    sim.model(x).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in sim.model.named_parameters()}
    assert all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in gradients.values())


# --- learned ranges --------------------------------------------------------------------------------------------------


def as_learned(qat: dict[str, Any], bits: int, activation: str) -> dict[str, Any]:
    """What learning ranges makes of int8_per_channel_qat."""
    found = copy.deepcopy(qat)
    (assign,) = [step for step in found["prepare"] if step["pass"] == "assign-specs"]
    assign["activation"] |= {"bits": bits, "estimator": activation, "training": "lsq+"}
    assign["weight"] |= {"bits": bits}
    found["training"] |= {"freeze_encodings_after": "never"}
    return found


@pytest.mark.parametrize("preset", LEARNED)
def test_learned_preset_is_the_qat_one_but_for_what_learns_ranges(preset: str) -> None:
    qat, learned = (tomllib.loads((CONFIGS / f"{name}.toml").read_text()) for name in ("int8_per_channel_qat", preset))
    assert learned == as_learned(qat, *LEARNED[preset])


def test_every_packaged_preset_that_learns_ranges_is_tested_here() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*_lsq_qat.toml")) == sorted(LEARNED)


@pytest.mark.parametrize("preset", LEARNED)
@pytest.mark.parametrize("case", ["nested", "conv with bias, eps=1e-3"])
def test_no_code_differs_after_ranges_were_trained(preset: str, case: str, tmp_path: Path) -> None:
    model, x = model_of(case)
    sim = QuantSim(model, (x,), config=preset)
    sim.compute_encodings([x], progress=False)
    modes = {(fq.follows, fq.mode) for _, fq in sim.program.fake_quant_nodes()}
    assert modes == {(True, Mode.FAKE), (False, Mode.LEARN)}
    before = {name: tensor.clone() for name, tensor in sim.model.named_parameters()}
    train(sim.program, x)
    moved = {name for name, tensor in sim.model.named_parameters() if not torch.equal(tensor, before[name])}
    assert {name for name in before if name.endswith(".range.scale")} <= moved
    path = sim.export(tmp_path)
    sim.program.simulate = "exact"
    report = sim.check_parity(path, [(IMAGE,)])
    assert report.exact and "0 float islands, 0 uncertified" in str(report)


@pytest.mark.parametrize("preset", LEARNED)
def test_learned_ranges_obey_the_limits_of_relu6(preset: str) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU6(), torch.nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(2, 3, 6, 6)
    sim = QuantSim(net, (x,), config=preset)
    sim.compute_encodings([x], progress=False)
    capped = [fq for _, fq in sim.program.fake_quant_nodes() if fq.spec.limits.high == 6.0]
    assert capped
    with torch.no_grad():
        for fq in capped:
            assert fq.range is not None
            for name, parameter in fq.range.named_parameters():
                parameter.add_(100.0 if name.endswith("scale") else -3.0)
    sim.model(x)
    for fq in capped:
        largest = fq.scale * (fq.spec.qmax - fq.zero_point)  # in float32, as onnxruntime asks
        assert float(largest) <= 6.0 and float(fq.encoding.min) == 0.0
