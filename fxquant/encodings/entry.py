"""Entry: one tensor's grids as an encodings file says them, whichever version the file is of."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from fxquant.spec import Encoding, QuantSpec


class Section(Enum):
    """The part of a file that an entry is in; 2.0.0 has one for all."""

    ACTIVATIONS = "activation_encodings"
    PARAMETERS = "param_encodings"
    ALL = "encodings"


class Kind(Enum):
    """How many grids a tensor has, in the words of 1.0.0."""

    PER_TENSOR = "PER_TENSOR"
    PER_CHANNEL = "PER_CHANNEL"
    PER_BLOCK = "PER_BLOCK"


@dataclass(frozen=True)
class Entry:
    """One tensor's grids.

    Arguments:
        name: the tensor, as TensorNames has it.
        section: where it stands.
        bits: width of the codes, or of the floats.
        is_float: a floating dtype: there is no grid then.
        is_symmetric, kind: None where the version does not say it.
        is_signed: sign of the codes; None where the version does not say it.
        scales, offsets: in row-major order of the scale tensor; offsets as AIMET has them, 0 or negative.
        shape: of the scale tensor; None where the version has a plain list.
        axis, block: None where there is none, or where the version does not say it.
        place: path in the JSON, for messages.
    """

    name: str
    section: Section
    bits: int
    is_float: bool = False
    is_symmetric: bool | None = None
    is_signed: bool | None = None
    scales: tuple[float, ...] = ()
    offsets: tuple[int, ...] = ()
    kind: Kind | None = None
    shape: tuple[int, ...] | None = None
    axis: int | None = None
    block: int | None = None
    place: str = ""

    def encoding(self, spec: QuantSpec, shape: tuple[int, ...]) -> Encoding:
        """The entry as an Encoding of `spec`, whose scale has `shape`; SpecError if it is none."""
        scale = torch.tensor(self.scales, dtype=torch.float64).to(torch.float32).reshape(shape)
        return Encoding.from_offset(scale, torch.tensor(self.offsets, dtype=torch.int64).reshape(shape), spec)


def entry_of(name: str, section: Section, encoding: Encoding, rank: int) -> Entry:
    """The entry that says `encoding`, of a tensor of `rank` dimensions."""
    spec, has_axis = encoding.spec, encoding.scale.ndim > 0
    axis, block = (spec.granularity.axis, spec.granularity.block) if has_axis else (None, None)
    return Entry(
        name,
        section,
        spec.bits,
        is_symmetric=spec.symmetric,
        is_signed=spec.signed,
        scales=tuple(encoding.scale.double().flatten().tolist()),
        offsets=tuple(encoding.offset.flatten().tolist()),
        kind=Kind.PER_TENSOR if axis is None else Kind.PER_CHANNEL if block is None else Kind.PER_BLOCK,
        shape=tuple(encoding.scale.shape),
        axis=None if axis is None else axis % rank,
        block=block,
    )
