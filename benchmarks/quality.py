"""What quantization did to a classifier's answers: top-1, agreement with float, and the logits' SQNR."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from benchmarks.runner import Json

Logits = NDArray[numpy.float32]


@dataclass(frozen=True)
class Quality:
    """Fractions of photos, and decibels; `sqnr_db` is None where nothing differs (float against itself)."""

    top1: float
    agreement: float
    sqnr_db: float | None
    photos: int

    def to_dict(self) -> dict[str, Json]:
        """The figures by name."""
        return {
            "top1": self.top1,
            "agreement_with_float": self.agreement,
            "logits_sqnr_db": self.sqnr_db,
            "photos": self.photos,
        }


def judge(logits: Logits, reference: Logits, labels: Sequence[tuple[int, ...]]) -> Quality:
    """Compare `logits` with the float network's `reference`, both (N, classes), and with the accepted `labels`."""
    predicted, expected = logits.argmax(axis=1), reference.argmax(axis=1)
    hits = [int(guess) in accepted for guess, accepted in zip(predicted, labels, strict=True)]
    return Quality(
        top1=sum(hits) / len(hits),
        agreement=float((predicted == expected).mean()),
        sqnr_db=sqnr_db(logits, reference),
        photos=len(hits),
    )


def sqnr_db(logits: Logits, reference: Logits) -> float | None:
    """10 log10 of the reference's energy over the error's, over all logits together; None where there is no error."""
    wide = reference.astype(numpy.float64)
    noise = float(numpy.square(logits - wide).sum())
    return None if noise == 0 else 10 * math.log10(float(numpy.square(wide).sum()) / noise)
