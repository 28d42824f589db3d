"""Read an encodings file into a program."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fxquant.calibration import engage, settle_biases
from fxquant.encodings.entry import Entry
from fxquant.encodings.fitting import Fit
from fxquant.encodings.parsing import EncodingsFile, read_encodings
from fxquant.encodings.values import QuantizedValue, QuantizedValues
from fxquant.errors import CalibrationError, ConfigError
from fxquant.graph.program import Program, Stage
from fxquant.numerics.fake_quant import BiasFakeQuant, FakeQuant, Mode
from fxquant.spec import BIAS_SPEC, Encoding, Granularity

SHOWN = 20  # names in a message


@dataclass(frozen=True)
class LoadedEncodings:
    """What `load_encodings` did; names are those in the file.

    Arguments:
        path, version: the file's.
        loaded: values, parameters and biases whose grid is as in the file.
        in_float: values that the file wants in a floating dtype: their FakeQuants are off now.
        not_covered: quantized values and parameters that the file does not name.
        not_in_program: names in the file that no quantized value of the program has.
        biases: remarks on biases: on another grid in the file than input's times weight's, or with codes beyond 2^23.
        is_complete: whether every quantizer has a grid now, so that the program is calibrated.
    """

    path: str
    version: str
    loaded: tuple[str, ...]
    in_float: tuple[str, ...]
    not_covered: tuple[str, ...]
    not_in_program: tuple[str, ...]
    biases: tuple[str, ...]
    is_complete: bool

    def __str__(self) -> str:
        state = "the program is calibrated" if self.is_complete else "the rest is to be calibrated"
        rows = (
            ("left in float", self.in_float),
            ("not covered by the file", self.not_covered),
            ("not in the program", self.not_in_program),
            ("remarks on biases", self.biases),
        )
        lines = [f"{self.path} (version {self.version}): {len(self.loaded)} encodings loaded; {state}"]
        lines += [f"  {title} ({len(names)}): {', '.join(names)}" for title, names in rows if names]
        return "\n".join(lines)


def load_encodings(
    program: Program, path: str | os.PathLike[str], *, strict: bool = True, freeze: bool = False
) -> LoadedEncodings:
    """Give a program the grids of an encodings file (0.6.1, 1.0.0 or 2.0.0, seen from the file).

    A program at stage INSERTED is CALIBRATED afterwards if every value has a grid: from the file, from a fixed range,
    or, a weight that the file lacks, from the weight. Else it stays INSERTED, what was loaded is frozen, and
    `calibrate` finds the grids of the rest. A weight's loaded grid is always frozen, as it would be computed from the
    weight again otherwise. A bias has no grid of its own: its entry must be f(sx * sw). An entry of a floating dtype
    turns its FakeQuant off; float16 is not simulated.

    Arguments:
        program: at stage INSERTED or CALIBRATED, prepared with the specs that the file was made for.
        path: the file; tensors are called as `save_encodings` does.
        strict: refuse a file that lacks a value, names one that the program lacks, or has another bias.
        freeze: freeze the grids of activations, too.

    Raises StorageError (no such file, or malformed), ConfigError (it does not fit the program), CalibrationError
    (stage). The program is then as before.
    """
    if program.stage not in (Stage.INSERTED, Stage.CALIBRATED):
        remedy = (
            "Run the pipeline's prepare passes first." if program.stage < Stage.INSERTED else "Load before finalize."
        )
        expected = "a program at stage inserted or calibrated"
        raise CalibrationError("load encodings", expected=expected, got=str(program.stage), remedy=remedy)
    file = read_encodings(Path(path))
    return _Plan(program, file, strict).apply(program, freeze)


@dataclass
class _Grids:
    """What a file says of each FakeQuant, and by which value's entry."""

    encodings: dict[FakeQuant, Encoding] = field(default_factory=dict)
    off: set[FakeQuant] = field(default_factory=set)
    said_by: dict[FakeQuant, Entry] = field(default_factory=dict)


class _Plan:
    """What is to be loaded: found and checked before anything is changed."""

    def __init__(self, program: Program, file: EncodingsFile, strict: bool) -> None:
        self._file, self._strict, self._fit = file, strict, Fit(file.path)
        self._values = QuantizedValues(program)
        entries = {entry.name: entry for entry in file.entries}
        self._grids = _Grids()
        self._loaded: list[str] = []
        self._in_float: list[str] = []
        self._remarks: list[str] = []
        self._sort(entries)
        if strict and (self._not_covered or self._not_in_program):
            raise self._incomplete()
        for value in self._values.all:
            if isinstance(value.module, FakeQuant) and value.name in entries and not self._values.is_off(value):
                self._take(entries[value.name], value)
        self._rest = self._computed_rest()
        for value in self._values.all:
            if isinstance(value.module, BiasFakeQuant) and value.name in entries:
                self._check_bias(entries[value.name], value, value.module)

    def _sort(self, entries: Mapping[str, Entry]) -> None:
        on = [value for value in self._values.all if not self._values.is_off(value)]
        needed = dict.fromkeys(value.name for value in on if isinstance(value.module, FakeQuant))
        known = {value.name for value in on}
        self._not_covered = [name for name in needed if name not in entries]
        self._not_in_program = [name for name, entry in entries.items() if name not in known and not entry.is_float]

    def _incomplete(self) -> ConfigError:
        parts = (("values that the file lacks", self._not_covered), ("entries without a value", self._not_in_program))
        got = "; ".join(f"{len(names)} {title}: {_shown(names)}" for title, names in parts if names)
        expected = "an entry for each quantized value, and no other"
        remedy = "Load what fits with strict=False, and calibrate the rest."
        return ConfigError(f"encodings file '{self._file.path}'", expected=expected, got=got, remedy=remedy)

    def _take(self, entry: Entry, value: QuantizedValue) -> None:
        module, grids = value.module, self._grids
        assert isinstance(module, FakeQuant)
        (self._in_float if entry.is_float else self._loaded).append(entry.name)
        encoding = None if entry.is_float else self._fit.encoding(entry, value)
        other = grids.said_by.setdefault(module, entry)
        if other is not entry:
            before = grids.encodings.get(module)
            if (before is None) != (encoding is None) or (before and encoding and not before.same_grid(encoding)):
                expected = f"the grid of '{other.name}' at {other.place}, which shares it"
                raise self._fit.refuse(entry, value, expected, "another grid")
        if encoding is None:
            grids.off.add(module)
        else:
            grids.encodings[module] = encoding

    def _computed_rest(self) -> dict[FakeQuant, Encoding]:
        """Grids that need neither file nor data: of weights, and of fixed ranges."""
        return {
            module: encoding
            for module, value in self._values.fake_quants().items()
            if module not in self._grids.said_by and (encoding := self._computed(module, value)) is not None
        }

    def _computed(self, module: FakeQuant, value: QuantizedValue) -> Encoding | None:
        if module.mode is not Mode.OBSERVE:
            return None
        if module.follows:
            return self._values.encoding(value)
        if module.spec.fixed is None:
            return None
        twin = copy.deepcopy(module)
        twin.compute_encoding()
        return twin.encoding

    def _check_bias(self, entry: Entry, value: QuantizedValue, module: BiasFakeQuant) -> None:
        scales = [self._scale_of(source) for source in module.sources]
        is_in_float = any(source.mode is Mode.OFF or source in self._grids.off for source in module.sources)
        if entry.is_float or is_in_float:
            if entry.is_float != is_in_float:
                words = {True: "in float", False: "on a grid"}
                self._differs(entry, value, f"a bias {words[is_in_float]}", f"one {words[entry.is_float]}")
        elif scales[0] is None or scales[1] is None:
            self._remarks.append(f"{entry.name}: not checked, as its input has no grid yet")
        else:
            self._compare_bias(entry, value, scales[0] * scales[1])

    def _compare_bias(self, entry: Entry, value: QuantizedValue, expected: torch.Tensor) -> None:
        spec = replace(BIAS_SPEC, granularity=Granularity(0 if expected.ndim else None))
        self._fit.require_form(entry, value, spec, tuple(expected.shape))
        wrong = entry.encoding(spec, tuple(expected.shape)).scale != expected
        wrong |= torch.tensor(entry.offsets).reshape(expected.shape) != spec.lowest_code
        if not bool(wrong.any()):
            self._loaded.append(entry.name)
            return
        index = int(wrong.flatten().nonzero()[0])
        product = float(expected.flatten()[index])
        wanted = f"scale {product!r}, the product of input's and weight's, and offset {spec.lowest_code}"
        got = f"scale {entry.scales[index]!r}, offset {entry.offsets[index]}" + (f" at [{index}]" if wrong.ndim else "")
        self._differs(entry, value, wanted, got)

    def _differs(self, entry: Entry, value: QuantizedValue, expected: str, got: str) -> None:
        if self._strict:
            raise self._fit.refuse(entry, value, expected, got, "Leave the bias's entry out: its grid follows.")
        self._remarks.append(f"{entry.name}: expected {expected}, got {got}")

    def _scale_of(self, module: FakeQuant) -> torch.Tensor | None:
        found = self._grids.encodings.get(module) or self._rest.get(module)
        if found is not None:
            return found.scale
        return module.scale.detach().cpu() if module.mode is not Mode.OBSERVE and module.has_encoding else None

    def apply(self, program: Program, freeze: bool) -> LoadedEncodings:
        """Change the program; nothing can fail from here on."""
        observing = [module for module in self._values.fake_quants() if module.mode is Mode.OBSERVE]
        is_complete = all(module in self._grids.said_by or module in self._rest for module in observing)
        for module, encoding in self._grids.encodings.items():
            module.set_encoding(encoding)
            module.mode = Mode.FROZEN if freeze or module.follows or not is_complete else Mode.FAKE
        for module in self._grids.off:
            module.mode = Mode.OFF
        if is_complete:
            for module, encoding in self._rest.items():
                module.set_encoding(encoding)
                module.mode = Mode.FAKE
            self._settle_biases(program)
            engage(program)
            program.stage = Stage.CALIBRATED
        return self._report(is_complete)

    def _settle_biases(self, program: Program) -> None:
        """As calibration does; what it notes (a loaded weight too fine for its bias, say) is reported."""
        before = program.notes
        settle_biases(program)
        self._remarks += [f"{note.place}: {note.text}" for note in program.notes if note not in before]

    def _report(self, is_complete: bool) -> LoadedEncodings:
        return LoadedEncodings(
            self._file.path,
            self._file.version,
            loaded=tuple(self._loaded),
            in_float=tuple(self._in_float),
            not_covered=tuple(self._not_covered),
            not_in_program=tuple(self._not_in_program),
            biases=tuple(self._remarks),
            is_complete=is_complete,
        )


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
