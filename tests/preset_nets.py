"""What the tests of presets share: one tiny net a structure, its data, and the way from a preset to onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn import functional as F

import fxquant
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Program
from fxquant.numerics.runtime import Level, RuntimeOptions, open_session
from fxquant.passes.rounding_run import LearnsRounding

SHORT = 20
ONE_THREAD = RuntimeOptions(threads=1)


class Plain(nn.Module):
    """conv - bn - relu, twice, pooled, then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 2)
        x = F.avg_pool2d(torch.relu(self.bn2(self.conv2(x))), 2)
        found: torch.Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return found


class Residual(nn.Module):
    """A stem, a block with an identity shortcut, one with a convolution as shortcut, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 1, 2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.a2(torch.relu(self.a1(x))) + x)
        x = torch.relu(self.b2(torch.relu(self.b1(x))) + self.down(x))
        found: torch.Tensor = self.fc(x.mean((2, 3)))
        return found


class Depthwise(nn.Module):
    """Expansion, depthwise, squeeze-and-excite, projection with residual."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.bn2 = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.gate = nn.Conv2d(16, 16, 1)
        self.project = nn.Conv2d(16, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.bn1(self.expand(x)))
        y = F.relu6(self.bn2(self.depthwise(x)))
        y = y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1)))
        found: torch.Tensor = self.project(y) + x
        return found


class Dense(nn.Module):
    """Concatenations of a value, of pooled codes and of a concatenation, as in a DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.two, self.last = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        first = torch.cat([self.one(x), x], 1)
        second = torch.cat([torch.relu(self.two(first)), first, F.max_pool2d(x, 3, 1, 1)], 1)
        found: torch.Tensor = self.last(torch.relu(second))
        return found


class Attention(nn.Module):
    """One encoder block: normed attention and feed-forward, each with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        found: torch.Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return found


class Decoder(nn.Module):
    """Transposed convolutions, one of them behind a relu, and tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ConvTranspose2d(3, 6, 2, 2)
        self.second = nn.ConvTranspose2d(6, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(torch.tanh(self.second(torch.relu(self.first(x)))))
        return found


class Upsampler(nn.Module):
    """A grouped transposed convolution between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.up = nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, groups=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(torch.relu(self.up(torch.relu(self.first(x)))))
        return found


class Flat(nn.Module):
    """A softmax over many classes, all about as likely, and what is made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(torch.softmax(0.1 * self.up(x), -1))
        return found


class Dead(nn.Module):
    """A relu that never fires, ahead of a convolution that is left with its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.dead, self.left, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            assert self.dead.bias is not None
            self.dead.bias.fill_(-100.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(torch.relu(self.left(torch.relu(self.dead(x)))))
        return found


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "residual": Residual,
    "depthwise": Depthwise,
    "dense": Dense,
    "attention": Attention,
    "decoder": Decoder,
}
ODD_NETS: dict[str, Callable[[], nn.Module]] = {"upsampler": Upsampler, "flat": Flat, "dead": Dead}


def net(name: str) -> nn.Module:
    """A net with seeded weights, and batch norms that normalise."""
    torch.manual_seed(0)
    model = (NETS | ODD_NETS)[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0.0, 0.2)
            module.running_var.uniform_(0.2, 0.8)
    return model


def batches(name: str, count: int = 2) -> list[torch.Tensor]:
    """Normal noise in the shape that a net takes."""
    generator = torch.Generator().manual_seed(3)
    shape = (4, 6, 16) if name == "attention" else (4, 3, 8, 8)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@dataclass(frozen=True)
class Export:
    """A net exported under a preset: the program, its file, and the float net's output on the first batch."""

    program: Program
    path: Path
    expected: torch.Tensor
    inputs: torch.Tensor

    @property
    def model(self) -> onnx.ModelProto:
        """The file."""
        return onnx.load(self.path)

    def run(self, level: Level = Level.ALL) -> np.ndarray[Any, Any]:
        """What onnxruntime computes on the first batch."""
        session = open_session(self.path, RuntimeOptions(level=level, threads=1))
        (found,) = session.run({session.input_names[0]: self.inputs.numpy()}).values()
        return found

    def sqnr(self) -> float:
        """Signal to quantization noise of onnxruntime's output against the float net's, in dB."""
        signal = self.expected.double().numpy()
        return float(10 * np.log10((signal**2).sum() / max(((signal - self.run()) ** 2).sum(), 1e-30)))


def shortened(pipeline: Pipeline) -> Pipeline:
    """The pipeline with few iterations where rounding is learned: what is tested here does not depend on them."""
    passes = [
        replace(item, iterations=SHORT) if isinstance(item, LearnsRounding) else item
        for item in pipeline.optimize_passes
    ]
    return pipeline.changed(optimize=passes)


def export(pipeline: Pipeline, name: str, folder: Path) -> Export:
    """Capture, prepare, calibrate, optimize, finalize, export; what measures does so on the calibration batches."""
    model, data = net(name), batches(name)
    with torch.no_grad():
        expected = model(data[0])
    program = fxquant.capture(model, data[0])
    pipeline.prepare(program, batches=data)
    fxquant.calibrate(program, data, progress=False)
    shortened(pipeline).optimize(program, data, progress=False)
    pipeline.finalize(program)
    path = folder / f"{name}.onnx"
    fxquant.export_onnx(program, path)
    return Export(program, path, expected, data[0])


@cache
def packaged(preset: str, name: str, folder: Path) -> Export:
    """`export` of a packaged pipeline, once a test session."""
    (folder / preset).mkdir(exist_ok=True)
    return export(fxquant.load_pipeline(preset), name, folder / preset)
