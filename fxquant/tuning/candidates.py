"""Candidates of accuracy-driven tuning: how an operation may run, by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fxquant.errors import ConfigError, nearest
from fxquant.spec import SpecOverride

FLOAT = "float"


@dataclass(frozen=True)
class Candidate:
    """One way to run an operation; what is None is as the config has it.

    Arguments:
        name: in tables and files.
        quantize: False leaves it in float.
        activation_bits: of the values that it reads.
        weight_bits: of its weight.
        per_channel: whether its weight has a scale for each output channel, or one.
    """

    name: str
    quantize: bool = True
    activation_bits: int | None = None
    weight_bits: int | None = None
    per_channel: bool | None = None

    def __post_init__(self) -> None:
        if not self.name or "," in self.name:
            raise ConfigError("Candidate.name", expected="a name without commas", got=repr(self.name))
        for bits in (self.activation_bits, self.weight_bits):
            SpecOverride(bits=bits)
        has_more = (self.activation_bits, self.weight_bits, self.per_channel) != (None, None, None)
        if not self.quantize and has_more:
            got = "bits or granularity, too"
            raise ConfigError(f"Candidate '{self.name}'", expected="quantize=False alone", got=got)

    def __str__(self) -> str:
        if not self.quantize:
            return f"{self.name}: float"
        bits = [
            f"{count}-bit {what}"
            for count, what in ((self.activation_bits, "activations"), (self.weight_bits, "weights"))
            if count is not None
        ]
        if self.per_channel is not None:
            bits.append("per channel" if self.per_channel else "per tensor")
        return f"{self.name}: {', '.join(bits) or 'as configured'}"


CANDIDATES: dict[str, Candidate] = {
    item.name: item
    for item in (
        Candidate(FLOAT, quantize=False),
        Candidate("int16_activations", activation_bits=16, weight_bits=8, per_channel=True),
        Candidate("int8_per_channel", activation_bits=8, weight_bits=8, per_channel=True),
        Candidate("int8_per_tensor", activation_bits=8, weight_bits=8, per_channel=False),
        Candidate("w4a16", activation_bits=16, weight_bits=4, per_channel=True),
        Candidate("w4a8", activation_bits=8, weight_bits=4, per_channel=True),
    )
}
DEFAULT_CANDIDATES = (FLOAT, "int16_activations", "int8_per_channel")
BASELINES = (FLOAT, "int8_per_channel", "int8_per_tensor")


def chosen_candidates(wanted: Iterable[str | Candidate]) -> tuple[Candidate, ...]:
    """The candidates of a search: those that are wanted, and float, which every search begins with.

    Raises ConfigError for an unknown name, a name given twice, and none besides float.
    """
    if isinstance(wanted, str):
        raise ConfigError("tune_precision: candidates", expected="several names or Candidates", got=f"'{wanted}'")
    found = [item if isinstance(item, Candidate) else _named(item) for item in wanted]
    names = [item.name for item in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError("tune_precision: candidates", expected="each name once", got=f"'{name}' twice")
    if not any(item.quantize for item in found):
        raise ConfigError("tune_precision: candidates", expected="one besides float", got=", ".join(names) or "none")
    floats = [item for item in found if not item.quantize] or [CANDIDATES[FLOAT]]
    if floats[0].name != FLOAT or len(floats) > 1:
        raise ConfigError(f"tune_precision: candidate '{floats[-1].name}'", expected="the name 'float', once")
    return (floats[0], *(item for item in found if item.quantize))


def _named(name: str) -> Candidate:
    if name not in CANDIDATES:
        raise ConfigError(f"tune_precision: candidate '{name}' is unknown", remedy=nearest(str(name), CANDIDATES))
    return CANDIDATES[name]
