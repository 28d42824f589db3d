"""AnalysisReport: what a sensitivity analysis found; its JSON form and its console table.

The damage of a layer is measured from both ends. Where a user's `evaluate` gives the score:

    alone     float score - score with only this layer quantized
    without   score with all but this layer quantized - score with all quantized

Otherwise by the noise of the outputs (noise.py), as a share of that with all layers quantized:

    alone     noise with only this layer quantized / noise with all quantized
    without   1 - noise with all but this layer quantized / noise with all quantized
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fxquant.errors import StorageError
from fxquant.files import write_text

VERSION = 1
_SPECIAL = {"inf": math.inf, "-inf": -math.inf}
_NUMBERS = frozenset(
    "sqnr_db local_sqnr_db accumulated_sqnr_db local_mse accumulated_mse damage_alone damage_without".split()
)


@dataclass(frozen=True)
class Score:
    """How close to the float program one choice of quantizers is.

    Arguments:
        sqnr_db: of the outputs (noise.py); inf where nothing differs.
        agreement: fraction of samples whose largest output is the float program's; None where outputs are no classes.
        evaluated: what the user's `evaluate` says; None without one.
    """

    sqnr_db: float
    agreement: float | None = None
    evaluated: float | None = None

    @property
    def noise(self) -> float:
        """Energy of the error over that of the reference, the mean of all outputs."""
        return math.inf if self.sqnr_db == -math.inf else 10.0 ** (-self.sqnr_db / 10)


@dataclass(frozen=True)
class UnitRow:
    """One layer, and what quantizing it costs.

    Arguments:
        name: the node; placement rules name it.
        module: its module path.
        op: its operation.
        weights, activations: the values that its quantizers quantize.
        bits: of these, for reading ("w8 a8").
        axis: of its weight's output channels; None where the operation has none.
        alone: only this layer is quantized.
        without: all but this layer are.
        damage_alone, damage_without: the module's docstring says of what; above 0 is harm.
    """

    name: str
    module: str
    op: str
    weights: tuple[str, ...]
    activations: tuple[str, ...]
    bits: str
    axis: int | None
    alone: Score
    without: Score
    damage_alone: float
    damage_without: float


@dataclass(frozen=True)
class HistogramRow:
    """Counts of a float value in bins of equal width, the first beginning at `low`."""

    low: float
    width: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class ValueRow:
    """One quantized value: errors, range and grid.

    Arguments:
        value: its node.
        kind: "activation" or "weight".
        unit: the layer that it belongs to.
        module: its module path.
        spec, bits: how it is quantized.
        shares: the value whose grid it uses; "" for its own.
        local_sqnr_db, local_mse: error of its own quantizer alone.
        accumulated_sqnr_db, accumulated_mse: the quantized run against the float run; None for weights.
        min, max: of the float value.
        grid_min, grid_max: the lowest and highest number of its grid (of all channels').
        scale_low, scale_high, zero_point_low, zero_point_high: extremes over channels.
        clipped: fraction of its elements beyond the grid.
        codes_used, codes: how many codes the float value takes, and how many there are.
        channels, dead_channels: how many there are, and which are 0 throughout.
        channel_ratio: largest over smallest of the channels' largest magnitudes, dead ones left out.
        channel_low, channel_high: extremes of each channel, of weights only (six digits).
        histogram: of the float value.
    """

    value: str
    kind: str
    unit: str
    module: str
    spec: str
    bits: int
    shares: str
    local_sqnr_db: float
    local_mse: float
    accumulated_sqnr_db: float | None
    accumulated_mse: float | None
    min: float
    max: float
    grid_min: float
    grid_max: float
    scale_low: float
    scale_high: float
    zero_point_low: int
    zero_point_high: int
    clipped: float
    codes_used: int
    codes: int
    channels: int
    dead_channels: tuple[int, ...]
    channel_ratio: float | None
    channel_low: tuple[float, ...]
    channel_high: tuple[float, ...]
    histogram: HistogramRow


@dataclass(frozen=True)
class AnalysisReport:
    """What a sensitivity analysis found; `print(report)` gives a table sorted by damage.

    Arguments:
        program: its name.
        stage: of the program.
        batches, samples: what it was measured on.
        score: "evaluate" or "sqnr": what damage is measured by.
        float_score, quantized, weights_only, activations_only: of the whole program.
        units: in graph order.
        values: in graph order.
        notes: what to know when reading it.
    """

    program: str
    stage: str
    batches: int
    samples: int
    score: str
    float_score: Score
    quantized: Score
    weights_only: Score
    activations_only: Score
    units: tuple[UnitRow, ...]
    values: tuple[ValueRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def by_damage(self) -> tuple[UnitRow, ...]:
        """The layers, that which does most harm alone first; by the outputs' noise where scores are equal."""
        return tuple(sorted(self.units, key=lambda unit: (-unit.damage_alone, -unit.alone.noise, -unit.damage_without)))

    def suggestions(self, count: int = 5) -> str:
        """Placement rules (TOML) for the `count` layers that do most harm: text to paste into a pipeline's file.

        A layer whose damage is within the noise floor (suggestions.py, case 4) gets none; none at all for a count of 0.
        """
        from fxquant.analysis.suggestions import suggestions

        return suggestions(self, count)

    def to_dict(self) -> dict[str, Any]:
        """Everything as values that JSON can hold, by the names of the fields; infinite numbers are "inf", "-inf"."""
        plain: dict[str, Any] = _plain({"version": VERSION, **asdict(self)})
        return plain

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> AnalysisReport:
        """The report that `to_dict` wrote. Raises StorageError for what is none."""
        try:
            if content["version"] != VERSION:
                raise StorageError("analysis report", expected=f"version {VERSION}", got=str(content["version"]))
            given = {item.name: _known(content[item.name]) for item in fields(cls)}
            scores = ("float_score", "quantized", "weights_only", "activations_only")
            given.update((name, Score(**given[name])) for name in scores)
            given["units"] = tuple(_unit(item) for item in given["units"])
            given["values"] = tuple(
                ValueRow(**{**item, "histogram": HistogramRow(**item["histogram"])}) for item in given["values"]
            )
            return cls(**given)
        except (KeyError, TypeError, AttributeError) as err:
            raise StorageError("analysis report", got=f"{type(err).__name__}: {err}") from err

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` to a file."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained HTML page: scores, plots, tables (needs plotly)."""
        from fxquant.analysis.page import page

        write_text(Path(path), page(self))

    def table(self, width: int = 140, rows: int | None = None) -> str:
        """The scores and the layers sorted by damage, in lines of at most `width` characters.

        rows: how many layers; None for all.
        """
        from fxquant.analysis.table import table

        return table(self, width, rows)

    def __str__(self) -> str:
        return self.table()


def _unit(item: Mapping[str, Any]) -> UnitRow:
    return UnitRow(**{**item, "alone": Score(**item["alone"]), "without": Score(**item["without"])})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def _known(value: Any, key: str = "") -> Any:
    """What `_plain` made of the fields, back: lists become tuples; numbers that were written as words, numbers."""
    if isinstance(value, Mapping):
        return {name: _known(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return tuple(_known(item) for item in value)
    return _SPECIAL.get(value, value) if isinstance(value, str) and key in _NUMBERS else value
