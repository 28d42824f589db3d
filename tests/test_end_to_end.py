"""Whole pipelines on small nets: captured, quantized, exported, run in onnxruntime, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxquant
from fxquant.numerics.runtime import Level, RuntimeOptions
from fxquant.parity import ParityReport


def quantize(model: nn.Module, batches: list[Any], path: Path, config: str = "int8_per_channel") -> ParityReport:
    """The packaged pipeline from end to end; the model's weights are seeded by the caller."""
    program = fxquant.capture(model.eval(), batches[0])
    pipeline = fxquant.load_pipeline(config)
    pipeline.prepare(program)
    fxquant.calibrate(program, batches)
    pipeline.finalize(program)
    fxquant.export_onnx(program, path)
    return fxquant.check_parity(program, path, batches, options=RuntimeOptions(threads=1))


class Mobile(nn.Module):
    """Expansion, depthwise, projection with residual, squeeze-and-excite, hard-swish, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16, eps=1e-3), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 5, 1, 2, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.reduce, self.expand = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.head = nn.Sequential(nn.Conv2d(32, 32, 1), nn.Hardswish())
        self.fc = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(x))
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))
        x = self.head(torch.cat([x * gate, F.max_pool2d(x, 3, 1, 1)], 1))
        found: torch.Tensor = self.fc(x.mean((2, 3)))
        return found


class Encoder(nn.Module):
    """Token and position embeddings, two encoder layers with a padding mask, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 32)
        self.positions = nn.Parameter(torch.randn(1, 12, 32) * 0.1)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.layers(self.tokens(ids) + self.positions, src_key_padding_mask=mask)
        return {"logits": self.head(x), "first": x[:, 0]}


def images(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(2, 3, 32, 32, generator=generator) for _ in range(count)]


def sentences(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(0, 50, (2, 12), generator=generator) for _ in range(count)]
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[1, 8:] = True
    return [{"ids": item, "mask": mask} for item in ids]


@pytest.mark.parametrize("config", ["int8_per_channel", "int8_per_tensor"])
def test_mobile_net_agrees_within_a_step_and_only_hard_swish_is_float(tmp_path: Path, config: str) -> None:
    torch.manual_seed(0)
    report = quantize(Mobile(), images(), tmp_path / "m.onnx", config)
    assert report.worst_local_steps <= 1 and not report.fault
    assert {kernel.node for kernel in report.fusion.unfused} == {"head_1"}


def test_encoder_agrees_within_a_step_and_names_its_islands(tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = quantize(Encoder(), sentences(), tmp_path / "m.onnx")
    assert report.worst_local_steps <= 1 and not report.fault
    islands = {kernel.node for kernel in report.fusion.unfused}
    assert any("softmax" in name for name in islands) and any("norm" in name for name in islands)
    assert not any("linear" in name or "head" in name for name in islands)


@pytest.mark.parametrize("level", [Level.ALL, Level.EXTENDED])
def test_program_from_disk_simulates_and_exports_the_same_codes(tmp_path: Path, level: Level) -> None:
    torch.manual_seed(0)
    sim = fxquant.QuantSim(Mobile().eval(), images()[0])
    sim.compute_encodings(images())
    path = sim.export(tmp_path)
    program = fxquant.load_program(tmp_path / "model.fxq")
    with torch.no_grad():
        assert torch.equal(program.module(images()[1]), sim.model.eval()(images()[1]))
    report = fxquant.check_parity(program, path, images(1), options=RuntimeOptions(level=level))
    assert not report.fault
    fxquant.export_onnx(program, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def test_quant_sim_leaves_the_model_alone_and_exports_at_any_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mobile().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sim = fxquant.QuantSim(model, images()[0])
    sim.compute_encodings(images())
    with torch.no_grad():
        first = sim.model(images()[0])
        sim.export(tmp_path)
        assert torch.equal(sim.model(images()[0]), first)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_model_file_of_another_program_is_refused(tmp_path: Path) -> None:
    sims = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        sims.append(fxquant.QuantSim(Mobile().eval(), images()[0]))
        sims[-1].compute_encodings(images(1))
    path = sims[0].export(tmp_path)
    with pytest.raises(fxquant.FxquantError, match="fingerprint"):
        sims[1].check_parity(path, images(1))


def test_export_before_calibration_lists_the_values(tmp_path: Path) -> None:
    program = fxquant.capture(Mobile().eval(), images()[0])
    fxquant.load_pipeline("int8_per_channel").prepare(program)
    with pytest.raises(fxquant.FxquantError, match="have no range.*x, "):
        fxquant.export_onnx(program, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
