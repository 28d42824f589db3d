"""Granularities: along_axis, rows_of and encoding_shape agree with indices counted one by one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.errors import SpecError
from fxquant.numerics.codes import Grid, codes_from_integers
from fxquant.numerics.estimators import rows_of
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.numerics.rounding import along_axis
from fxquant.spec import PER_TENSOR, Granularity, QuantSpec

S8 = QuantSpec(8, signed=True, symmetric=True, strict=True)


@dataclass(frozen=True)
class Case:
    """A tensor's shape and a granularity that fits it."""

    shape: tuple[int, ...]
    granularity: Granularity

    @property
    def tensor(self) -> torch.Tensor:
        """Normal numbers of that shape."""
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(sum(self.shape)))

    def encoding_of(self, index: tuple[int, ...]) -> tuple[int, ...]:
        """Where the encoding of the element at `index` stands."""
        axis, block = self.granularity.axis, self.granularity.block
        if axis is None:
            return ()
        axis %= len(self.shape)
        if block is None:
            return (index[axis],)
        return tuple(place // block if number == axis else place for number, place in enumerate(index))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    axis = draw(st.none() | st.integers(-len(shape), len(shape) - 1))
    if axis is None:
        return Case(tuple(shape), PER_TENSOR)
    block = draw(st.none() | st.integers(1, 5))
    if block is not None:
        shape[axis] = block * draw(st.integers(1, 4))
    return Case(tuple(shape), Granularity(axis, block))


@given(cases())
def test_each_element_has_its_encoding_along_the_axis(case: Case) -> None:
    shape = case.granularity.encoding_shape(case.shape)
    places = {case.encoding_of(index) for index in np.ndindex(case.shape)}
    assert places == set(np.ndindex(shape))
    values = torch.randn(shape)
    spread = along_axis(values, case.granularity, len(case.shape)).expand(case.shape)
    for index in np.ndindex(case.shape):
        assert spread[index] == values[case.encoding_of(index)]


@given(cases())
def test_rows_are_the_elements_of_each_encoding_in_its_order(case: Case) -> None:
    shape = case.granularity.encoding_shape(case.shape)
    x = case.tensor
    expected: dict[tuple[int, ...], list[float]] = {place: [] for place in np.ndindex(shape)}
    for index in np.ndindex(case.shape):
        expected[case.encoding_of(index)].append(float(x[index]))
    rows = rows_of(x, case.granularity)
    assert rows.shape[0] == len(expected)
    for row, place in zip(rows, np.ndindex(shape), strict=True):
        assert row.tolist() == expected[place]


@given(cases())
def test_grid_follows_each_encodings_own_elements(case: Case) -> None:
    shape = case.granularity.encoding_shape(case.shape)
    x, module = case.tensor, FakeQuant(replace(S8, granularity=case.granularity), shape, follows=True)
    module.mode = Mode.FAKE
    found = module(x)
    for index in np.ndindex(case.shape):
        scale = module.scale[case.encoding_of(index)]
        assert found[index] == torch.round(x[index] / scale) * scale
    for place in np.ndindex(shape):
        own = [abs(float(x[index])) for index in np.ndindex(case.shape) if case.encoding_of(index) == place]
        assert float(module.scale[place]) == pytest.approx(max(own) / 127, rel=1e-6)


@given(cases())
def test_codes_carry_the_grid_of_a_fake_quant(case: Case) -> None:
    shape = case.granularity.encoding_shape(case.shape)
    x, module = case.tensor, FakeQuant(QuantSpec(4, granularity=case.granularity), shape, follows=True)
    module.follow(x)
    codes = codes_from_integers(module.codes(x), module.grid)
    assert torch.equal(codes.integers.to(torch.int32), module.codes(x))
    assert torch.equal(codes.real(), module.real(module.codes(x)))


def test_grids_differ_when_their_blocks_do() -> None:
    scale, zero_point = torch.ones(4, 4), torch.zeros(4, 4, dtype=torch.int64)
    first = Grid(scale, zero_point, -7, 7, Granularity(1, 2))
    assert first.same_as(Grid(scale, zero_point, -7, 7, Granularity(1, 2)))
    assert not first.same_as(Grid(scale, zero_point, -7, 7, Granularity(0, 2)))
    assert not first.same_as(Grid(scale, zero_point, -7, 7, Granularity(1, 4)))


@pytest.mark.parametrize("shape", [(4, 6), (4,), ()])
def test_granularity_is_refused_when_blocks_do_not_fill_the_axis(shape: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match=r"per-block\(1, 4\)"):
        Granularity(1, 4).encoding_shape(shape)


def test_gradient_passes_through_a_weight_in_blocks() -> None:
    module = FakeQuant(replace(S8, granularity=Granularity(1, 4)), (3, 2), follows=True)
    module.mode = Mode.FAKE
    weight = torch.randn(3, 8, requires_grad=True)
    (module(weight) * torch.arange(24.0).view(3, 8)).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.arange(24.0).view(3, 8))
