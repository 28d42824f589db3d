"""reconstruct-blocks on transformers: blocks whose reshapes read the number of samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxquant.graph.pass_data import PassData, float_twin
from fxquant.graph.pipeline import load_pipeline
from fxquant.graph.segment import values_of
from fxquant.passes import ReconstructBlocks
from fxquant.passes.blocks import block_of_path, find_blocks
from fxquant.passes.quantized_layers import quantized_layers
from fxquant.reconstruction import Samples, Settings, Unit, collect, reconstruct
from fxquant.spec import SpecOverride
from tests.helpers import run_pass
from tests.passes.optimizing import notes
from tests.reconstruction.layers import calibrated, correlated

BATCHES = [correlated(12, 6, 8, seed=index) - 0.3 for index in range(2)]


class Attention(nn.Module):
    """Two heads of 4 channels, written as timm does: reshapes by the number of samples, to `split` windows each."""

    def __init__(self, split: int) -> None:
        super().__init__()
        self.split = split
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        samples, tokens, channels = x.shape
        x = self.qkv(x).reshape(samples * self.split, tokens // self.split, 3, 2, channels // 2)
        query, key, value = x.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(query, key, value)
        found: torch.Tensor = self.proj(x.transpose(1, 2).reshape(samples, tokens, channels))
        return found


class Layer(nn.Module):
    """The residual layer of a transformer that normalises first."""

    def __init__(self, split: int) -> None:
        super().__init__()
        self.norm, self.attention, self.fc = nn.LayerNorm(8), Attention(split), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        found: torch.Tensor = x + torch.relu(self.fc(x))
        return found


class Net(nn.Module):
    """A layer, and what each token comes to."""

    def __init__(self, split: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = Layer(split), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.layer(x))
        return found


@pytest.mark.parametrize("split", [1, 2])
def test_attention_is_a_block_that_reads_the_number_of_samples(split: int) -> None:
    program = calibrated(Net(split), BATCHES)
    layers = list(quantized_layers(program))
    unit = block_of_path(program, "layer.attention", layers)
    assert isinstance(unit, Unit)
    assert [node.target for node in unit.sizes] == [torch.ops.aten.sym_size.int]
    assert [node.name for node in unit.inputs] == ["layer_norm"] and len(unit.weights) == 2
    assert [found.name for found in find_blocks(program, layers, 8)][0] == "layer.attention"
    whole = block_of_path(program, "layer", layers)
    assert isinstance(whole, Unit) and len(whole.weights) == 3 and [node.name for node in whole.inputs] == ["x"]


def test_soft_weights_at_the_start_give_the_blocks_own_output_whatever_the_batch_of_a_step() -> None:
    float_biases = load_pipeline("tensorrt").override(weight=SpecOverride(bits=4))
    program = calibrated(Net(), BATCHES, float_biases)
    unit = block_of_path(program, "layer.attention", list(quantized_layers(program)))
    assert isinstance(unit, Unit)
    samples = collect(program, float_twin(program), unit, BATCHES, cache_mb=64)
    assert isinstance(samples, Samples)
    first = Settings(iterations=1, warm_start=0.0, regularization=0.0, batch_size=24)
    loss = reconstruct(program, unit, samples, first).curve[0][1]
    with program.quantizers(weights=False):
        found = torch.cat([values[unit.output.name] for values in values_of(program, BATCHES, [unit.output.name])])
    assert loss == pytest.approx(float((found - samples.targets).square().sum(-1).mean()), rel=1e-3)
    few = reconstruct(program, unit, samples, Settings(iterations=200, batch_size=5, drop=0.5))
    assert few.is_better and few.learned_error < 0.8 * few.nearest_error


def test_pass_learns_attention_as_one_block() -> None:
    program = calibrated(Net(), BATCHES)
    run_pass(ReconstructBlocks(iterations=100), program, data=PassData(BATCHES, progress=False))
    assert "layer.attention" in notes(program)


class Windows(nn.Module):
    """Attention within windows that were cut out before: reshapes read another number than that of what comes in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.head = nn.Linear(8, 8), Window(), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        windows = torch.relu(self.embed(x)).reshape(2 * x.shape[0], 3, 8)
        found: torch.Tensor = self.head(self.inner(windows, x))
        return found


class Window(nn.Module):
    """Two layers on windows, joined as the whole has samples."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, windows: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.two(torch.relu(self.one(windows)).reshape(whole.shape[0], 6, 8))
        return found


def test_number_of_samples_of_something_else_makes_no_block() -> None:
    program = calibrated(Windows(), BATCHES)
    reason = block_of_path(program, "inner", list(quantized_layers(program)))
    assert reason == "it reads sym_size, which is not the number of samples of what it reads"
