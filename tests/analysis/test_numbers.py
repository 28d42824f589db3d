"""Figures of the analysis on arbitrary numbers, names and reports."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.analysis import AnalysisReport
from fxquant.analysis.noise import Reference, outputs_sqnr_db, sqnr_db
from fxquant.analysis.table import shortened
from fxquant.errors import FxquantError
from tests.analysis.cases import synthetic

NUMBERS = st.floats(-1e3, 1e3, width=32)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=20))
def test_noise_is_the_sum_of_squared_differences(pairs: list[tuple[float, float]]) -> None:
    real = torch.tensor([pair[0] for pair in pairs])[None]
    found = torch.tensor([pair[1] for pair in pairs])[None]
    reference = Reference([real], 0)
    noise = reference.noise([found])
    expected = sum((float(a) - float(b)) ** 2 for a, b in zip(real[0], found[0], strict=True))
    assert noise.energies == (pytest.approx(expected, rel=1e-5, abs=1e-30),)
    assert reference.energies == (pytest.approx(sum(float(a) ** 2 for a in real[0]), rel=1e-9, abs=1e-30),)
    assert reference.rows == 1 and noise.agreeing == int(real.argmax() == found.argmax())


@given(st.floats(1e-20, 1e20), st.floats(1e-20, 1e20))
def test_sqnr_is_ten_times_the_logarithm(signal: float, noise: float) -> None:
    assert 10 ** (sqnr_db(signal, noise) / 10) == pytest.approx(signal / noise, rel=1e-9)
    assert sqnr_db(signal, 0.0) == math.inf and sqnr_db(0.0, noise) == -math.inf


@given(st.lists(st.tuples(st.floats(1e-20, 1e20), st.floats(1e-20, 1e20)), min_size=1, max_size=4))
def test_sqnr_of_several_outputs_is_that_of_their_mean_noise(pairs: list[tuple[float, float]]) -> None:
    signals, noises = zip(*pairs, strict=True)
    mean = sum(noise / signal for signal, noise in pairs) / len(pairs)
    assert 10 ** (-outputs_sqnr_db(signals, noises) / 10) == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize(
    ("signals", "noises", "expected"),
    [
        ((0.0,), (0.0,), math.inf),
        ((0.0,), (1.0,), -math.inf),
        ((0.0, 0.0), (0.0, 1.0), -math.inf),
        ((4.0, 0.0), (0.0, 0.0), math.inf),
        ((4.0, 0.0), (0.8, 1e-9), -10 * math.log10((0.2 + 1.0) / 2)),
        ((4.0, 0.0), (0.8, 0.0), -10 * math.log10(0.2 / 2)),
        ((4.0, 1.0), (math.inf, 0.0), -math.inf),
    ],
)
def test_outputs_without_signal_or_with_endless_noise(
    signals: tuple[float, ...], noises: tuple[float, ...], expected: float
) -> None:
    assert outputs_sqnr_db(signals, noises) == pytest.approx(expected)


@given(st.text(max_size=60), st.integers(3, 40))
def test_a_shortened_name_keeps_both_ends(name: str, limit: int) -> None:
    found = shortened(name, limit)
    assert len(found) <= max(limit, 3)
    if len(name) > limit:
        assert found[0] == name[0] and found[-1] == name[-1] and len(found) == limit
    else:
        assert found == name


@given(st.text(max_size=20), st.integers(0, 6))
def test_reports_survive_json_whatever_their_names(name: str, layers: int) -> None:
    report = synthetic(layers, name)
    assert AnalysisReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report


def test_masked_logits_and_integer_outputs_do_not_count() -> None:
    real = torch.tensor([[1.0, -math.inf, 2.0]])
    reference = Reference([real, torch.tensor([3])], 0)
    assert reference.energies == (pytest.approx(5.0),) and reference.rows == 0
    assert reference.noise([torch.tensor([[1.5, -math.inf, 2.0]]), torch.tensor([4])]).energies == (
        pytest.approx(0.25),
    )
    assert reference.noise([torch.tensor([[math.nan, 0.0, 2.0]]), torch.tensor([4])]).energies == (math.inf,)
    with pytest.raises(FxquantError, match="expected a tensor of floats; got none"):
        Reference([torch.tensor([3])], 0)
