"""smooth-quant: outliers move into the weights, the float output stays, and what cannot absorb them is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fxquant
from fxquant.errors import ConfigError, PassError
from fxquant.graph.pass_data import PassData
from fxquant.graph.program import NoteKind, Program
from fxquant.graph.segment import values_of
from fxquant.graph.statistics import ChannelStatistics, statistics_of
from fxquant.graph.trace import PassEntry
from fxquant.numerics.runtime import RuntimeOptions
from fxquant.passes import SmoothQuant
from fxquant.passes.smooth_quant import smoothing_factors
from tests.helpers import assert_golden, run_pass
from tests.passes.harness import Chain, difference, output, reasons
from tests.passes.smoothing_nets import WIDTH, Block, TakenApart, block, tokens, with_outliers

ROUNDING = 2e-6
BATCHES = [tokens(1), tokens(2)]


def smoothed(model: nn.Module | Program, item: SmoothQuant | None = None) -> tuple[Program, PassEntry]:
    """The program of a model, smoothed; the manager has compared its outputs, too."""
    program = model if isinstance(model, Program) else fxquant.capture(model.eval(), tokens())
    return program, run_pass(item or SmoothQuant(), program, tokens(), PassData(BATCHES, progress=False))


def largest(program: Program, name: str) -> torch.Tensor:
    """max|X_j| of a value over the batches, float64."""
    values = [
        found[name].double().abs().reshape(-1, found[name].shape[-1]) for found in values_of(program, BATCHES, [name])
    ]
    return torch.cat(values).amax(0)


@given(
    norm=st.sampled_from(["layer", "rms", "apart", "plain"]),
    is_pre=st.booleans(),
    activation=st.sampled_from(["relu", "gelu"]),
    alpha=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    insert_mul=st.booleans(),
    seed=st.integers(0, 20),
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_float_output_stays_on_every_kind_of_block(
    norm: str, is_pre: bool, activation: str, alpha: float, insert_mul: bool, seed: int
) -> None:
    program = block(norm, is_pre, activation, seed)
    expected = output(program.module, tokens(9))
    item = SmoothQuant(alpha, insert_mul)
    _, entry = smoothed(program, item)
    assert difference(program, expected, tokens(9)) < ROUNDING
    assert bool(entry.edits) or (not is_pre or norm == "plain")
    again = run_pass(item, program, tokens(), PassData(BATCHES, progress=False))
    assert not again.edits


def test_factors_are_those_of_the_paper_shared_by_query_key_and_value() -> None:
    plain = block()
    x = largest(plain, "norm1")
    three = torch.cat([plain.module.get_parameter(f"{name}.weight") for name in ("query", "key", "value")]).detach()
    expected = x.pow(0.5) / three.double().abs().amax(0).pow(0.5)
    program, _ = smoothed(block())
    for name in ("query", "key", "value"):
        found = program.module.get_parameter(f"{name}.weight").double()
        before = plain.module.get_parameter(f"{name}.weight").double()
        assert torch.allclose(found, before * expected, rtol=1e-5)
    for name in ("norm1.weight", "norm1.bias"):
        assert torch.allclose(
            program.module.get_parameter(name).double(), plain.module.get_parameter(name).double() / expected, rtol=1e-5
        )


def test_alpha_weighs_inputs_against_weights() -> None:
    inputs, weight = torch.tensor([16.0, 1.0]).double(), torch.tensor([1.0, 4.0]).double()
    assert smoothing_factors(inputs, weight, 0.5).tolist() == [4.0, 0.5]
    assert smoothing_factors(inputs, weight, 1.0).tolist() == [16.0, 1.0]
    assert smoothing_factors(inputs, weight, 0.0).tolist() == [1.0, 0.25]


def test_channels_without_inputs_or_weights_or_beyond_reason_keep_theirs() -> None:
    inputs = torch.tensor([0.0, 2.0, 1e30, 4.0]).double()
    weight = torch.tensor([1.0, 0.0, 1e-30, 1.0]).double()
    assert smoothing_factors(inputs, weight, 0.5).tolist() == [1.0, 1.0, 1.0, 2.0]


def test_outlier_of_the_input_is_gone_and_noted() -> None:
    program, _ = smoothed(block())
    found = largest(program, "norm1")
    assert found.max() / found.median() < 8.0 < largest(block(), "norm1").max()
    text = next(n.text for n in program.notes if n.kind is NoteKind.OPTIMIZATION and n.place == "norm1")
    assert text.startswith("smooth-quant: largest input ")


def test_second_linear_is_smoothed_through_relu_by_the_first_ones_rows() -> None:
    program, entry = smoothed(block(activation="relu"))
    assert "narrow" not in {miss.node for miss in entry.misses}
    _, entry = smoothed(block(activation="gelu"))
    assert any("narrow not smoothed: gelu in front is no norm" in reason for reason in reasons(entry))


def test_statistics_of_a_layer_whose_rows_are_divided_are_divided_too() -> None:
    model = with_outliers(Chain(first=nn.Linear(WIDTH, WIDTH), act=nn.ReLU(), second=nn.Linear(WIDTH, WIDTH)))
    program = fxquant.capture(model, tokens())
    first = program.node("first")
    before = ChannelStatistics((1.0,) * WIDTH, (2.0,) * WIDTH)
    first.meta["statistics"] = before
    weight = program.module.get_parameter("first.weight").detach().clone()
    run_pass(SmoothQuant(), program, tokens(), PassData(BATCHES))
    found = statistics_of(first)
    assert found is not None
    shrunk = (program.module.get_parameter("first.weight") / weight)[:, 0].double()
    mean, std = found.tensors()
    assert torch.allclose(mean, shrunk, rtol=1e-5) and torch.allclose(std, 2 * shrunk, rtol=1e-5)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (block(is_pre=False), "query not smoothed: x is read by add as well"),
        (block(is_pre=False), "widen not smoothed: norm1 is read by add_1 as well"),
        (block(norm="plain"), "query not smoothed: norm1 in front has no weight for each channel"),
        (block(), "project not smoothed: flatten in front is no norm"),
    ],
)
def test_what_cannot_absorb_the_factors_is_left_with_the_reason(program: Program, reason: str) -> None:
    _, entry = smoothed(program)
    assert any(reason in found for found in reasons(entry)), reasons(entry)


def test_tied_weights_are_left_with_the_reason() -> None:
    model = Block()
    model.key.weight = model.query.weight
    program, entry = smoothed(with_outliers(model))
    assert {"query", "key", "value"} <= {miss.node for miss in entry.misses}
    assert any("read at" in reason or "one tensor" in reason for reason in reasons(entry))
    norms = Block()
    norms.norm2.weight = norms.norm1.weight
    program, entry = smoothed(with_outliers(norms))
    assert any("query not smoothed: norm1 in front cannot absorb it" in reason for reason in reasons(entry))


class Product(nn.Module):
    """A norm in front of x @ w, as GPT-2 lays its weights out, over flattened tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.weight, self.bias = nn.Parameter(torch.zeros(WIDTH, 12)), nn.Parameter(torch.zeros(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, self.norm(x).view(-1, WIDTH), self.weight).view(-1, x.shape[1], 12)


def test_weights_of_addmm_are_scaled_along_their_inputs() -> None:
    model = with_outliers(Product())
    expected = output(model, tokens(9))
    program, entry = smoothed(model)
    assert not entry.misses and entry.edits
    assert difference(program, expected, tokens(9)) < ROUNDING


class Classifier(nn.Module):
    """The mean of the tokens, and the first one, of one norm's output, each through a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = TakenApart(WIDTH), nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        found: torch.Tensor = self.one(x.mean(1)) + self.two(x[:, 0])
        return found


def test_mean_and_choice_of_tokens_are_looked_through() -> None:
    model = with_outliers(Classifier())
    expected = output(model, tokens(9))
    program, entry = smoothed(model)
    assert not entry.misses and len(entry.edits) == 3
    assert difference(program, expected, tokens(9)) < ROUNDING


def test_multiplication_is_inserted_where_it_is_asked_for() -> None:
    program, entry = smoothed(block(is_pre=False), SmoothQuant(insert_mul=True))
    created = [edit.subject for edit in entry.edits if edit.action == "create"]
    assert "x_smooth" in created and "norm1_smooth" in created
    norm = program.node("norm1")
    assert {user.name for user in norm.users} == {"norm1_smooth", "add_1"}
    assert program.node("query").args[0] is program.node("x_smooth")


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        SmoothQuant(alpha)


def test_run_without_batches_is_refused() -> None:
    program = block()
    with pytest.raises(PassError, match="measures with batches"):
        run_pass(SmoothQuant(), program)
    with pytest.raises(PassError, match="value 'norm1'.*got NaN or Inf"):
        run_pass(SmoothQuant(), program, data=PassData([torch.full((3, 5, WIDTH), torch.nan)]))


def pipeline(*passes: Any) -> fxquant.Pipeline:
    """int8_per_channel with passes in front of assign-specs."""
    plain = fxquant.load_pipeline("int8_per_channel")
    items = list(plain.prepare_passes)
    place = [item.name for item in items].index("assign-specs")
    return plain.changed(prepare=[*items[:place], *passes, *items[place:]])


def quantized(model: nn.Module, *passes: Any) -> Program:
    program = fxquant.capture(model, tokens())
    pipeline(*passes).prepare(program, check_inputs=tokens(), batches=BATCHES)
    fxquant.calibrate(program, BATCHES, progress=False)
    return program


def test_quantized_output_is_closer_to_float_than_without() -> None:
    model = with_outliers(Block(), factor=100.0)
    expected = torch.cat([output(model, batch) for batch in BATCHES])
    errors = []
    for passes in ((), (SmoothQuant(),)):
        program = quantized(model, *passes)
        found = torch.cat([output(program.module, batch) for batch in BATCHES])
        errors.append(float((found - expected).square().sum()))
    assert errors[1] < 0.5 * errors[0]


def test_codes_are_those_of_onnxruntime(tmp_path: Path) -> None:
    program = quantized(with_outliers(Block()), SmoothQuant())
    pipeline().finalize(program)
    fxquant.export_onnx(program, tmp_path / "model.onnx")
    program.simulate = "exact"
    options = RuntimeOptions(threads=1)
    report = fxquant.check_parity(program, tmp_path / "model.onnx", BATCHES, options=options, progress=False)
    assert report.certified_differing == 0 and not report.stored and report.codes_compared > 1000


def test_golden_of_what_changes() -> None:
    _, entry = smoothed(block(is_pre=False), SmoothQuant(insert_mul=True))
    assert_golden(entry.diff(), "smooth_quant_post_norm.diff")


def test_nodes_stay_but_for_what_is_inserted() -> None:
    program, entry = smoothed(block())
    assert {edit.action for edit in entry.edits} == {"set"}
    assert all(isinstance(node, fx.Node) for node in program.graph.nodes)
