"""Whether an entry fits the value that it is for: its spec's bits, symmetry, granularity, limits and fixed range."""

from __future__ import annotations

import torch

from fxquant.encodings.entry import Entry, Kind, Section
from fxquant.encodings.values import QuantizedValue
from fxquant.errors import ConfigError, SpecError
from fxquant.graph.program import describe
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.numerics.grids import clip_codes, grid_for_range
from fxquant.spec import Encoding, Granularity, QuantSpec

FIXED_TOLERANCE = 1e-5  # of the scale: files round a fixed range's
_SLACK_STEPS = 0.51  # a zero point is rounded: a grid may end half a step beyond its limit
_OTHER_SPEC = "Quantize the program with the spec that the file was made for, or leave the entry out with strict=False."


class Fit:
    """Turns entries of one file into encodings, or refuses them (ConfigError) by value and place in the file."""

    def __init__(self, file: str) -> None:
        self._file = file

    def refuse(self, entry: Entry, value: QuantizedValue, expected: str, got: str, remedy: str = "") -> ConfigError:
        """The error that `entry` is not what `value` needs."""
        thing = f"encodings file '{self._file}': entry '{entry.name}' at {entry.place}"
        return ConfigError(thing, place=describe(value.node), expected=expected, got=got, remedy=remedy)

    def encoding(self, entry: Entry, value: QuantizedValue) -> Encoding:
        """The grid that `entry` gives `value`, whose quantizer is a FakeQuant."""
        module = value.module
        assert isinstance(module, FakeQuant)
        self._require_section(entry, value)
        self.require_form(entry, value, module.spec, tuple(module.scale.shape))
        try:
            encoding = entry.encoding(module.spec, tuple(module.scale.shape))
        except SpecError as err:
            raise self.refuse(entry, value, err.expected, err.got) from err
        found = broken_rule(encoding)
        if found is not None:
            raise self.refuse(entry, value, *found)
        return encoding

    def require_form(self, entry: Entry, value: QuantizedValue, spec: QuantSpec, shape: tuple[int, ...]) -> None:
        """Refuse an entry of other bits, symmetry, kind, number of grids, axis or blocks."""
        if entry.bits != spec.bits:
            raise self.refuse(entry, value, f"{spec.bits} bits ({spec})", f"{entry.bits}", _OTHER_SPEC)
        if entry.is_symmetric not in (None, spec.symmetric):
            words = {True: "a symmetric grid", False: "an asymmetric grid"}
            raise self.refuse(entry, value, f"{words[spec.symmetric]} ({spec})", words[not spec.symmetric], _OTHER_SPEC)
        granularity = spec.granularity if shape else Granularity()
        wanted = Kind.PER_TENSOR if not shape else Kind.PER_CHANNEL if granularity.block is None else Kind.PER_BLOCK
        if entry.kind not in (None, wanted):
            assert entry.kind is not None
            raise self.refuse(entry, value, f"{wanted.value} ({spec})", entry.kind.value, _OTHER_SPEC)
        count = torch.Size(shape).numel()
        if len(entry.scales) != count or not _is_shape(entry.shape, shape):
            expected = f"{count} grids ({spec})" + (f", shape {list(shape)}" if len(shape) > 1 else "")
            got = len(entry.scales) if entry.shape is None else f"{len(entry.scales)}, shape {list(entry.shape)}"
            raise self.refuse(entry, value, expected, f"{got}", _OTHER_SPEC)
        self._require_axis(entry, value, granularity)

    def _require_axis(self, entry: Entry, value: QuantizedValue, granularity: Granularity) -> None:
        axis = None if granularity.axis is None else granularity.axis % value.rank
        if entry.axis is not None and (axis is None or not -value.rank <= entry.axis < value.rank):
            expected = "no axis: one grid" if axis is None else f"axis {axis}"
            raise self.refuse(entry, value, expected, f"axis {entry.axis}")
        if entry.axis is not None and entry.axis % value.rank != axis:
            raise self.refuse(entry, value, f"axis {axis}", f"axis {entry.axis}", _OTHER_SPEC)
        if entry.block is not None and entry.block != granularity.block:
            expected = "no blocks" if granularity.block is None else f"blocks of {granularity.block}"
            raise self.refuse(entry, value, expected, f"blocks of {entry.block}", _OTHER_SPEC)

    def _require_section(self, entry: Entry, value: QuantizedValue) -> None:
        wanted = Section.PARAMETERS if value.is_constant else Section.ACTIVATIONS
        if entry.section not in (Section.ALL, wanted):
            raise self.refuse(entry, value, f"it in '{wanted.value}'", f"'{entry.section.value}'")


def _is_shape(said: tuple[int, ...] | None, shape: tuple[int, ...]) -> bool:
    """Whether a file's scales may be those of `shape`: nested as it is, or a plain list, which says nothing."""
    return said is None or said == shape or len(said) <= 1


def broken_rule(encoding: Encoding) -> tuple[str, str] | None:
    """What the spec expects and what the grid has, where it breaks a zero point, limits or fixed range; else None."""
    spec = encoding.spec
    if spec.fixed_zero_point is not None:
        wrong = encoding.zero_point != spec.fixed_zero_point
        if bool(wrong.any()):
            expected = f"offset {spec.lowest_code - spec.fixed_zero_point} ({spec})"
            return expected, f"offset {_first(encoding.offset, wrong)}{_where(wrong)}"
    wrong = _is_beyond(encoding)
    if bool(wrong.any()):
        return f"a grid of {spec}", _range(encoding, wrong)
    return _broken_fixed_range(encoding)


def _is_beyond(encoding: Encoding) -> torch.Tensor:
    """Which grids exceed their limits: with both given, those at which a clip at them would not be redundant."""
    spec, limits = encoding.spec, encoding.spec.limits
    if limits.low is not None and limits.high is not None:
        low, high = clip_codes(limits.low, limits.high, encoding.scale, encoding.zero_point)
        return (low > spec.qmin) | (high < spec.qmax)
    beyond = torch.zeros_like(encoding.scale, dtype=torch.bool)
    steps = encoding.scale.double()
    if limits.low is not None:
        beyond |= (spec.qmin - encoding.zero_point) < limits.low / steps - _SLACK_STEPS
    if limits.high is not None:
        beyond |= (spec.qmax - encoding.zero_point) > limits.high / steps + _SLACK_STEPS
    return beyond


def _broken_fixed_range(encoding: Encoding) -> tuple[str, str] | None:
    spec = encoding.spec
    if spec.fixed is None:
        return None
    low, high = (torch.full_like(encoding.scale, bound) for bound in spec.fixed)
    scale, zero_point = grid_for_range(low, high, spec)
    near = torch.isclose(encoding.scale.double(), scale.double(), rtol=FIXED_TOLERANCE, atol=0.0)
    wrong = ~near | (encoding.zero_point != zero_point)
    if not bool(wrong.any()):
        return None
    return f"the grid of {spec}: {_range(Encoding(scale, zero_point, spec), wrong)}", _range(encoding, wrong)


def _range(encoding: Encoding, wrong: torch.Tensor) -> str:
    spec = encoding.spec
    ends = ((code - encoding.zero_point).double() * encoding.scale.double() for code in (spec.qmin, spec.qmax))
    low, high = (float(_first(end, wrong)) for end in ends)
    return f"[{low:.9g}, {high:.9g}]{_where(wrong)}"


def _first(values: torch.Tensor, wrong: torch.Tensor) -> int | float:
    found: int | float = values[wrong].flatten()[0].item()
    return found


def _where(wrong: torch.Tensor) -> str:
    """Which of several grids is the first wrong one."""
    return f" at {wrong.nonzero()[0].tolist()}" if wrong.ndim else ""
