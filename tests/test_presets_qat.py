"""The ..._qat presets: each is its plain twin but for what keeps batch norm live, and exports the same structure."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from fxquant.sim import QuantSim
from fxquant.spec import Target
from tests.passes.live import IMAGE, model_of

TWINS = ("int8_per_channel", "int8_per_tensor", "int8_reduced_range", "w4a8", "xnnpack", "qnn_htp", "tensorrt")
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
    return found


@pytest.mark.parametrize("twin", TWINS)
def test_preset_is_its_plain_twin_but_for_what_keeps_batch_norm_live(twin: str) -> None:
    plain, qat = (tomllib.loads((CONFIGS / f"{name}.toml").read_text()) for name in (twin, f"{twin}_qat"))
    assert qat == as_twin(plain)


def test_every_packaged_qat_preset_is_tested_here() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*_qat.toml")) == sorted(f"{twin}_qat" for twin in TWINS)


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
