"""Patches: a convolution's output at single positions, from the windows under them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import fxquant
from fxquant.graph.pass_data import float_twin
from fxquant.graph.pipeline import load_pipeline
from fxquant.graph.program import Program
from fxquant.numerics.padded_convolution import PADDED_CONVOLUTION
from fxquant.passes.adaround import layer_unit
from fxquant.passes.quantized_layers import quantized_layers
from fxquant.reconstruction.patches import draw_positions, has_patches, outputs_at, patches_at
from fxquant.reconstruction.samples import Samples, collect, segment_of

SHAPES = {1: (17,), 2: (9, 7), 3: (5, 6, 4)}


def call(target: object, *arguments: object) -> fx.Node:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("w")
    return graph.call_function(target, (x, weight, None, *arguments))  # type: ignore[arg-type]


@given(
    st.sampled_from((1, 2, 3)),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(0, 2),
    st.booleans(),
)
def test_patches_give_the_outputs_at_their_positions(
    rank: int, size: int, stride: int, dilation: int, pad: int, grouped: bool
) -> None:
    generator = torch.Generator().manual_seed(size + 10 * stride + 100 * pad)
    groups, sizes = (4 if grouped else 1), SHAPES[rank]
    x = torch.randn(3, 4, *sizes, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, 4 // groups, *([size] * rank), generator=generator, dtype=torch.float64)
    rest = ([stride] * rank, [pad] * rank, [dilation] * rank, False, [0] * rank, groups)
    node = call(torch.ops.aten.convolution.default, *rest)
    y = torch.ops.aten.convolution.default(x, weight, None, *rest)
    positions = draw_positions(min(5, y.shape[2:].numel()), y.shape, generator)
    expected = outputs_at(y, positions)
    ones, zeros = [1] * rank, [0] * rank
    patches = patches_at(node, x, weight, positions)
    found = torch.ops.aten.convolution.default(patches, weight, None, ones, zeros, ones, False, zeros, groups)
    assert torch.allclose(found, expected, atol=1e-12) and found.shape == expected.shape


def test_padding_of_one_end_is_padded_at_that_end() -> None:
    x, weight = torch.arange(6.0).reshape(1, 1, 6), torch.tensor([[[1.0, 10.0]]])
    rest = ([1], [1, 0], [1], False, [0], 1)
    node = call(PADDED_CONVOLUTION, *rest)
    y = PADDED_CONVOLUTION(x, weight, None, *rest)
    positions = (torch.tensor([[0, 5]]),)
    patches = patches_at(node, x, weight, positions)
    assert patches.tolist() == [[[0.0, 0.0]], [[4.0, 5.0]]]
    assert outputs_at(y, positions).flatten().tolist() == [0.0, 54.0]


def test_positions_differ_and_lie_on_the_map() -> None:
    rows, columns = draw_positions(12, torch.Size((2, 3, 4, 3)), torch.Generator().manual_seed(0))
    assert rows.shape == columns.shape == (2, 12)
    assert all(len(set((rows[n] * 3 + columns[n]).tolist())) == 12 for n in range(2))
    assert int(rows.max()) == 3 and int(columns.max()) == 2


def test_transposed_convolutions_have_none() -> None:
    rest = ([2], [0], [1], True, [0], 1)
    assert not has_patches(call(torch.ops.aten.convolution.default, *rest))


class Small(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x))


BATCHES = [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def collected(positions: int | None, cache_mb: int = 64, seed: int = 0, groups: int = 1) -> tuple[Program, Samples]:
    torch.manual_seed(0)
    program = fxquant.capture(Small(groups).eval(), BATCHES[0])
    load_pipeline("int8_per_channel").prepare(program)
    fxquant.calibrate(program, BATCHES)
    (layer,) = quantized_layers(program)
    unit = layer_unit(program, layer, positions)
    found = collect(program, float_twin(program), unit, BATCHES, cache_mb, seed)
    assert isinstance(found, Samples)
    given = {**found.inputs, **known_weight(program, unit.weights[0])}
    (output,) = segment_of(program, unit, found).run(given).values()
    assert output.shape == found.targets.shape
    assert float((output.detach() - found.targets).abs().max()) < 0.1  # 8 bits
    return program, found


def known_weight(program: Program, quantizer: fx.Node) -> dict[fx.Node, torch.Tensor]:
    module = program.fake_quant(quantizer)
    assert module is not None
    return {quantizer: module(program.module.get_parameter("conv.weight"))}


def test_samples_are_patches_where_the_output_is_larger() -> None:
    _, found = collected(10)
    assert (found.each, found.count) == (10, 120) and found.targets.shape == (120, 6, 1, 1)
    assert [values.shape for values in found.inputs.values()] == [(120, 3, 3, 3)]


@pytest.mark.parametrize("positions", (None, 64))
def test_samples_are_whole_maps_where_all_positions_count(positions: int | None) -> None:
    _, found = collected(positions)
    assert (found.each, found.count) == (1, 12) and found.targets.shape == (12, 6, 8, 8)


@pytest.mark.parametrize(("positions", "each"), [(28, 28), (29, 1)])
def test_depthwise_layer_has_patches_while_they_hold_less_than_its_input(positions: int, each: int) -> None:
    _, found = collected(positions, groups=3)
    assert found.each == each  # 28 windows of 9 hold less than 16 x 16


def test_positions_are_those_of_the_seed() -> None:
    assert torch.equal(collected(10)[1].targets, collected(10)[1].targets)
    assert not torch.equal(collected(10)[1].targets, collected(10, seed=1)[1].targets)
