"""Errors, ranges and codes of quantized values against plain loops."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import fxquant
from fxquant.analysis import analyze
from fxquant.graph.pass_data import float_twin
from fxquant.graph.pipeline import load_pipeline
from fxquant.graph.segment import values_of
from tests import preset_nets
from tests.analysis.cases import calibrated, report_of


def test_errors_of_values_equal_plain_loops() -> None:
    program = calibrated("residual", preset="int8_per_tensor")
    batches = preset_nets.batches("residual")
    report = report_of("residual", "int8_per_tensor")
    real, twin = float_twin(program), program.copy()
    twin.module.eval()
    for row in report.values:
        quantizer = next(node for node, _ in program.fake_quant_nodes() if str(node.args[0]) == row.value)
        module = copy.deepcopy(program.fake_quant(quantizer))
        assert module is not None
        xs = [found[row.value] for found in values_of(real, batches, [row.value])]
        ys = [found[quantizer.name] for found in values_of(twin, batches, [quantizer.name])]
        if row.kind == "weight":
            xs, ys = xs[:1], ys[:1]
        xs, ys = [x.detach() for x in xs], [y.detach() for y in ys]
        own = [module(x) - x for x in xs]
        count = sum(x.numel() for x in xs)
        energy = sum(float((x.double() ** 2).sum()) for x in xs)
        noise = sum(float((x.double() ** 2).sum()) for x in own)
        assert row.local_mse == pytest.approx(noise / count, rel=1e-5)
        assert row.local_sqnr_db == pytest.approx(10 * math.log10(energy / noise), abs=1e-4)
        if row.accumulated_mse is not None:
            behind = sum(float(((y - x).double() ** 2).sum()) for x, y in zip(xs, ys, strict=True))
            assert row.accumulated_mse == pytest.approx(behind / count, rel=1e-4)
        low, high = min(float(x.min()) for x in xs), max(float(x.max()) for x in xs)
        assert (row.min, row.max) == pytest.approx((low, high))
        codes = torch.cat([module.codes(x).flatten() for x in xs])
        low_end, high_end = row.grid_min - row.scale_low / 2, row.grid_max + row.scale_low / 2
        beyond = sum(int(((x < low_end) | (x > high_end)).sum()) for x in xs)
        assert row.clipped * count == pytest.approx(beyond, abs=1.5)
        assert row.codes_used == len(codes.unique()) and row.codes == module.spec.steps + 1
        assert sum(row.histogram.counts) == count
        assert row.histogram.low <= low and high <= row.histogram.low + row.histogram.width * len(row.histogram.counts)


def test_averages_do_not_depend_on_how_samples_are_cut_into_batches() -> None:
    program = calibrated("residual")
    whole = torch.cat(preset_nets.batches("residual"))
    one = analyze(program, [whole])
    cut = analyze(program, [whole[:1], whole[1:4], whole[4:]])
    assert cut.samples == one.samples == len(whole)
    for a, b in zip(one.values, cut.values, strict=True):
        assert a.local_mse == pytest.approx(b.local_mse, rel=1e-5)
        assert a.accumulated_mse == (None if b.accumulated_mse is None else pytest.approx(b.accumulated_mse, rel=1e-4))
        assert (a.min, a.max) == (pytest.approx(b.min, rel=1e-5), pytest.approx(b.max, rel=1e-5))
        assert abs(a.codes_used - b.codes_used) <= 1  # torch sums otherwise in other batches
        assert sum(a.histogram.counts) == sum(b.histogram.counts)
    assert one.quantized.sqnr_db == pytest.approx(cut.quantized.sqnr_db, abs=1e-3)


def test_values_beyond_both_ends_of_a_grid_with_a_zero_point_equal_plain_arithmetic() -> None:
    program = calibrated("residual", preset="int8_per_tensor")
    batches = [2 * batch for batch in preset_nets.batches("residual")]
    row = next(row for row in analyze(program, batches).values if row.value == "x")
    assert row.zero_point_low == row.zero_point_high and 0 < row.zero_point_low < 255 and row.codes == 256
    numbers = torch.cat(batches).flatten().tolist()
    steps = [round(x / row.scale_low) + row.zero_point_low for x in numbers]
    codes = [min(max(step, 0), 255) for step in steps]
    errors = [(code - row.zero_point_low) * row.scale_low - x for code, x in zip(codes, numbers, strict=True)]
    assert min(steps) < 0 and max(steps) > 255
    assert row.clipped * len(numbers) == pytest.approx(sum(step not in range(256) for step in steps), abs=1e-6)
    assert row.codes_used == len(set(codes))
    assert row.local_mse == pytest.approx(sum(error**2 for error in errors) / len(numbers), rel=1e-5)


class Ranges(nn.Module):
    """A dead channel, a channel a hundred times as large as another, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, 100.0, 0.0, 10.0]).view(4, 1, 1, 1).expand(4, 3, 1, 1))
            self.conv.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = torch.relu(self.conv(x))
        return {"head": self.head(y), "features": y}


def test_ranges_name_dead_channels_ratios_and_what_is_clipped() -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 3, 5, 5)
    program = fxquant.capture(Ranges().eval(), x)
    load_pipeline("int8_per_tensor").prepare(program)
    fxquant.calibrate(program, [x])
    report = analyze(program, [2 * x])
    rows = {row.value: row for row in report.values}
    weight, activation = rows["conv_weight"], rows["relu"]
    assert weight.dead_channels == (2,) and weight.channels == 4
    assert weight.channel_ratio == pytest.approx(100.0)
    assert weight.channel_high == pytest.approx((1.0, 100.0, 0.0, 10.0))
    assert activation.dead_channels == (2,)
    values = next(values_of(float_twin(program), [2 * x], ["relu"]))["relu"]
    module = next(module for node, module in program.fake_quant_nodes() if str(node.args[0]) == "relu")
    beyond = values > float(module.encoding.max) + float(module.encoding.scale) / 2
    assert activation.clipped == pytest.approx(float(beyond.double().mean())) and activation.clipped > 0
    assert report.quantized.agreement is None and report.float_score.agreement is None  # two outputs are no classes
