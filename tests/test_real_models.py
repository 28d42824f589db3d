"""Patterns of real architectures that once failed or ran in float: the whole pipeline on a small net with each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxquant
from fxquant.numerics.runtime import RuntimeOptions
from fxquant.parity import ParityReport


def quantize(model: nn.Module, x: torch.Tensor, path: Path) -> ParityReport:
    """int8_per_channel from end to end, at two batch sizes."""
    program = fxquant.capture(model.eval(), x)
    pipeline = fxquant.load_pipeline("int8_per_channel")
    pipeline.prepare(program)
    fxquant.calibrate(program, [x])
    pipeline.finalize(program)
    fxquant.export_onnx(program, path)
    report = fxquant.check_parity(program, path, [x, x[:1]], options=RuntimeOptions(threads=1))
    assert report.worst_local_steps <= 1 and not report.fault, str(report)
    return report


def islands(report: ParityReport) -> set[str]:
    return {kernel.node for kernel in report.fusion.unfused}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


class DetectionHead(nn.Module):
    """YOLOv8's: SiLU, nearest upsampling joined by a skip, boxes as means of distributions behind a transposition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.box, self.classes = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 5, 1)
        self.register_buffer("bins", torch.arange(4.0))
        nn.init.normal_(self.box.weight)  # a softmax on integers needs some contrast

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.silu(self.stem(x))
        x = torch.cat([F.interpolate(F.silu(self.down(x)), scale_factor=2.0), x], 1)
        box = self.box(x).flatten(2).view(x.shape[0], 4, 4, -1).softmax(2)
        return box.transpose(2, 3).matmul(self.bins), torch.sigmoid(self.classes(x))


class Skip(nn.Module):
    """UNet's upsampling with aligned corners."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.conv, self.last, self.factor = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 2, 1), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.conv(x))
        found: torch.Tensor = self.last(F.interpolate(y, scale_factor=self.factor, mode="bilinear", align_corners=True))
        return found


class Branches(nn.Module):
    """RepVGG's block in training form behind DenseNet's: batch norms without a layer to fold into."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dense = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(8)
        self.conv, self.bn, self.identity = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        for norm in (self.dense, self.bn, self.identity):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0.0, 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.stem(x))
        y = F.relu(self.dense(torch.cat([y, F.max_pool2d(y, 3, 1, 1)], 1)))
        return F.relu(self.bn(self.conv(y)) + self.identity(y))


class Attention(nn.Module):
    """ViT's, with one layer for query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], 17, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], 17, 16)
        found: torch.Tensor = self.out(y)
        return found


def test_detection_head_runs_on_integers_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = quantize(DetectionHead(), randn(2, 3, 32, 32), tmp_path / "m.onnx")
    assert islands(report) == set() and report.fusion.leftover == 0


@pytest.mark.parametrize("factor", [2.0, 1.3, 0.7])
def test_upsampling_with_aligned_corners_loads_at_level_all(tmp_path: Path, factor: float) -> None:
    torch.manual_seed(0)
    report = quantize(Skip(factor), randn(2, 3, 22, 18), tmp_path / "m.onnx")
    assert islands(report) == {"upsample_bilinear2d"}


def test_batch_norms_on_branches_run_on_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = quantize(Branches(), randn(2, 3, 16, 16), tmp_path / "m.onnx")
    assert islands(report) == set() and report.fusion.leftover == 0


@pytest.mark.parametrize(("spread", "in_float"), [(0.05, True), (3.0, False)])
def test_near_uniform_attention_agrees(tmp_path: Path, spread: float, in_float: bool) -> None:
    torch.manual_seed(0)
    report = quantize(Attention(), randn(2, 17, 16) * spread, tmp_path / "m.onnx")
    assert any(name.endswith("_softmax") for name in islands(report)) == in_float
