"""Sweep: one batch along the route of a program, the noise that each choice of quantizers makes at its outputs.

all              every quantizer on
weights          those of weights alone           activations      those of activations alone
alone <unit>     the unit's alone                 without <unit>   all but the unit's
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fxquant.analysis.noise import Noise, Reference
from fxquant.analysis.route import Route, Values
from fxquant.analysis.units import Unit
from fxquant.analysis.value_meter import ValueMeter
from fxquant.errors import FxquantError
from fxquant.graph.batches import Batch, placeholder_values
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import FakeQuant

ALL, WEIGHTS, ACTIVATIONS = "all", "weights", "activations"


def alone(unit: Unit) -> str:
    """The name of the run in which only this unit is quantized."""
    return f"alone {unit.name}"


def without(unit: Unit) -> str:
    """The name of the run in which all but this unit are quantized."""
    return f"without {unit.name}"


@dataclass(frozen=True)
class BatchResult:
    """What one batch gave; `to_dict` and `from_dict` keep it in a TrialLog.

    Arguments:
        digest: of the batch's tensors.
        samples: rows of its first tensor.
        signals: energy of each float output.
        rows: that agreement is counted on.
        runs: noise by name of the run.
    """

    digest: str
    samples: int
    signals: tuple[float, ...] = ()
    rows: int = 0
    runs: Mapping[str, Noise] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "digest": self.digest,
            "samples": self.samples,
            "signals": list(self.signals),
            "rows": self.rows,
            "runs": {name: [list(noise.energies), noise.agreeing] for name, noise in self.runs.items()},
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> BatchResult:
        """What `to_dict` wrote."""
        runs = {name: Noise(tuple(energies), agreeing) for name, (energies, agreeing) in record["runs"].items()}
        return cls(record["digest"], record["samples"], tuple(record["signals"]), record["rows"], runs)


class Sweep:
    """Runs batches one after another.

    Arguments:
        program: a copy that the sweep may switch, in eval mode and float simulation.
        units: of the program.
        meters: of its quantized values.
    """

    def __init__(self, program: Program, units: Sequence[Unit], meters: Sequence[ValueMeter]) -> None:
        self.program, self.units, self.meters = program, units, meters
        self.route = Route(program)
        self.everything = frozenset(self.route.modes)
        self._meter_at = {meter.node: meter for meter in meters if not meter.module.follows}
        self._starts: dict[int, list[Unit]] = {}
        for unit in units:
            self._starts.setdefault(self.route.start_of(unit), []).append(unit)

    def run(self, batch: Batch, index: int, result: BatchResult) -> Iterator[BatchResult]:
        """Measure the runs that `result` lacks, and show every value to its meter; yields what is known after each."""
        given = placeholder_values(self.program, batch)
        begin: Values = {node: given[node.name] for node in self.program.graph.nodes if node.op == "placeholder"}
        with torch.no_grad():
            reference = Reference(self.route.outputs_from(0, begin, ()), index)
            result = replace(result, signals=reference.energies, rows=reference.rows)
            for name, on in self.groups().items():
                result = self._measured(result, name, reference, 0, begin, on)
                yield result
            yield from self._along(reference, begin, index, result)

    def groups(self) -> dict[str, frozenset[FakeQuant]]:
        """The runs of the whole program."""
        weights = frozenset(module for module in self.everything if module.follows)
        return {ALL: self.everything, WEIGHTS: weights, ACTIVATIONS: self.everything - weights}

    def choices(self) -> Iterator[tuple[str, frozenset[FakeQuant]]]:
        """The runs of single units."""
        for unit in self.units:
            yield alone(unit), frozenset(unit.modules)
            yield without(unit), self.everything.difference(unit.modules)

    def _along(self, reference: Reference, begin: Values, index: int, result: BatchResult) -> Iterator[BatchResult]:
        """A float run and a quantized run side by side; each unit is tried where it begins."""
        real, quantized = begin, begin
        for place, cut in enumerate(self.route.cuts):
            if cut.quantizer in self._meter_at:
                self.route.switch(self.everything)
                meter = self._meter_at[cut.quantizer]
                meter.see(real[meter.value], quantized[meter.value], index)
            for unit in self._starts.get(place, ()):
                result = self._measured(result, alone(unit), reference, place, real, frozenset(unit.modules))
                yield result
                rest = self.everything.difference(unit.modules)
                result = self._measured(result, without(unit), reference, place, quantized, rest)
                yield result
            if place + 1 < len(self.route.cuts):
                real = self.route.advance(place, real, ())
                quantized = self.route.advance(place, quantized, self.everything)

    def _measured(
        self,
        result: BatchResult,
        name: str,
        reference: Reference,
        place: int,
        values: Values,
        on: frozenset[FakeQuant],
    ) -> BatchResult:
        if name in result.runs:
            return result
        noise = reference.noise(self.route.outputs_from(place, values, on))
        return replace(result, runs={**result.runs, name: noise})


def digest_of(program: Program, batch: Batch, index: int) -> tuple[str, int]:
    """SHA-256 (hex) of a batch, and how many samples it has; a batch that does not fit is refused by number."""
    try:
        given = placeholder_values(program, batch)
    except FxquantError as err:
        raise FxquantError(
            f"analyze: batch {index}: {err.thing}", expected=err.expected, got=err.got, remedy=err.remedy
        ) from err
    digest, samples = hashlib.sha256(), 0
    for name, value in given.items():
        digest.update(f"{name}:{value if not isinstance(value, torch.Tensor) else tuple(value.shape)}".encode())
        if isinstance(value, torch.Tensor):
            samples = samples or (len(value) if value.ndim else 1)
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest(), samples
