"""check_parity: onnxruntime and the simulation side by side, every difference attributed to a node."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import fx

from fxquant.errors import FxquantError, ParityError
from fxquant.graph.batches import Batch, placeholder_values
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import Mode
from fxquant.numerics.runtime import (
    Array,
    RuntimeOptions,
    cpu_flags,
    instruction_set,
    open_session,
    runtime_build,
    runtime_version,
)
from fxquant.parity.certification import BIT_EXACT, Certifier
from fxquant.parity.compare import Tally, compare_codes, compare_values
from fxquant.parity.constants import compare_stored
from fxquant.parity.grids import foreign_grids, outside_grid, runtime_codes
from fxquant.parity.localise import FOREIGN_GRID, Blame, Evidence, blame, blame_site
from fxquant.parity.onnx_file import FileQuantizer, OnnxFile
from fxquant.parity.optimised import read_fusion
from fxquant.parity.report import Environment, ParityReport
from fxquant.parity.segments import Segment, SegmentReader
from fxquant.parity.simulation import CodeSimulation, RuntimeCodes, Simulation, find_simulation
from fxquant.parity.sums import LayerSums, layer_sums
from fxquant.parity.verdicts import Findings, is_beyond, is_explained, rows_of, step_of
from fxquant.progress import track

DEFAULT_OPTIONS = RuntimeOptions()


def check_parity(
    program: Program,
    model_path: str | os.PathLike[str],
    batches: Iterable[Batch],
    *,
    options: RuntimeOptions = DEFAULT_OPTIONS,
    max_batches: int | None = None,
    simulation: str | Simulation | None = None,
    progress: bool = True,
    allow_mismatch: bool = False,
    check_stored: bool = True,
) -> ParityReport:
    """Compare what a program simulates with what onnxruntime computes from the ONNX file that was lowered from it.

    Every quantized tensor is compared twice: overall (each side on its own values) and locally (the simulation fed with
    onnxruntime's own codes at every quantizer), so that a difference is either a segment's own or inherited. With the
    exact and integer simulations, a local difference of a single code at a certified tensor is a fault.

    Arguments:
        program: calibrated; not changed.
        model_path: the ONNX file; not changed.
        batches: any iterable of tensors, tuples or lists of tensors, or dicts of keywords; read one at a time.
        options: how onnxruntime runs.
        max_batches: stop after so many.
        simulation: "float", "exact", "integer", or a Simulation; None: what `program.simulate` says.
        progress: show a progress bar when standard error is a terminal.
        allow_mismatch: compare also if the file was not lowered from this program.
        check_stored: compare the file's integer constants and grids with the program's, before anything runs.

    Raises ParityError: the file is another program's, or no model; a quantizer has no grid; no batches; an input is NaN
    or does not fit; onnxruntime refuses the model.
    """
    file = OnnxFile(model_path)
    _require_grids(program)
    if not allow_mismatch:
        _require_same_program(program, file)
    asked = program.simulate if simulation is None else simulation
    chosen = find_simulation(asked, file.opset) if isinstance(asked, str) else asked
    with _evaluating(program):
        reader = SegmentReader(program)
        comparison = _Comparison(reader, file, options, chosen, check_stored)
        limited = islice(batches, max_batches)
        total = max_batches if max_batches is not None else len(batches) if isinstance(batches, Sized) else None
        for batch in track(limited, "comparing", total=total, show=progress):
            comparison.add(batch)
    return comparison.report()


class _Comparison:
    """Everything that is open during one check_parity."""

    def __init__(
        self, reader: SegmentReader, file: OnnxFile, options: RuntimeOptions, simulation: Simulation, check_stored: bool
    ) -> None:
        self._reader = reader
        self._file = file
        self._options = options
        self._simulation = simulation
        self._stored = compare_stored(reader, file) if check_stored else ()
        self._fusion = read_fusion(reader, file, options)
        self._quantizers = file.quantizers()
        self._codes = _codes_of(reader, self._quantizers, file)
        probe = file.with_outputs(list(self._codes.values()))
        self._probe = open_session(probe, options, data_folder=file.data_folder)
        self._real = open_session(file.model.SerializeToString(), options, data_folder=file.data_folder)
        self._segments = reader.segments()
        self._certifier = Certifier(reader.program, self._fusion, options, simulation.name)
        self._certifications = self._certifier.of_segments(self._segments)
        self._fusion = self._fusion.explained(self._certifier.why_float())
        promised = self._codes if simulation.name in BIT_EXACT else ()
        self._foreign = foreign_grids(reader.program, file, self._quantizers, promised)
        self._overall = {segment: Tally() for segment in self._segments}
        self._local = {segment: Tally() for segment in self._segments}
        self._blames: dict[Segment, Blame] = {}
        self._sums: tuple[LayerSums, ...] = ()
        self._probe_differs = False
        self._batches = 0

    def add(self, batch: Batch) -> None:
        """Run one batch through both, and count."""
        inputs = _inputs_of(self._reader.program, batch, self._batches)
        feed = {name: _as_array(value) for name, value in inputs.items()}
        found = self._probe.run(feed)
        self._compare_with_real(feed, found)
        teacher = self._teacher(found)
        self._sweep(inputs, {}, found, self._overall)
        if isinstance(self._simulation, CodeSimulation):
            self._sums = layer_sums(self._simulation.strategies)
        suspects = self._sweep(inputs, teacher, found, self._local)
        misled = self._blame_codes_outside(found)
        evidence = Evidence(inputs, feed, teacher, {name: found[name] for name in self._codes.values()})
        for segment in suspects:
            is_known = segment in self._blames or not misled.isdisjoint(segment.sources)
            if not is_known and not is_explained(segment, self._stored):
                self._blames[segment] = self._blame(segment, evidence)
        self._batches += 1

    def _blame_codes_outside(self, found: Mapping[str, Array]) -> set[fx.Node]:
        """Blame the first quantizers whose codes are none of their grids; returns all of them: they teach wrongly."""
        program, outside = self._reader.program, dict[fx.Node, int]()
        for name, tensor in self._codes.items():
            node = program.node(name)
            if count := outside_grid(program, node, found[tensor]):
                outside[node] = count
        for segment in self._segments:
            count = 0 if segment.output else outside.get(segment.end, 0)
            if count and outside.keys().isdisjoint(segment.sources):
                module = program.fake_quant(segment.end)
                assert module is not None
                grid = f"[{module.spec.qmin}, {module.spec.qmax}]"
                reason = f"{count:,} codes outside the grid {grid} in batch {self._batches}"
                self._blames.setdefault(segment, Blame((segment.value,), reason))
        return set(outside)

    def _blame(self, segment: Segment, evidence: Evidence) -> Blame:
        if not segment.output and segment.end in self._foreign:
            return Blame((segment.value,), FOREIGN_GRID)
        is_certified = self._certifications[segment].is_certified
        site = self._certifier.site_of(segment) if is_certified else None
        if site is not None:
            return blame_site(self._reader.program, self._file, segment, site, evidence, self._fusion)
        return blame(self._reader.program, self._file, segment, evidence, self._fusion)

    def report(self) -> ParityReport:
        """What was found; ParityError if there was no batch."""
        if self._batches == 0:
            raise ParityError(
                "check_parity", expected="at least one batch", got="none", remedy="Is the iterator used up?"
            )
        findings = Findings(
            {segment: tally.difference for segment, tally in self._overall.items()},
            {segment: tally.difference for segment, tally in self._local.items()},
            self._stored,
            self._blames,
            self._certifications,
            self._foreign,
        )
        return ParityReport(
            program=self._reader.program.name,
            model=str(self._file.path),
            simulation=self._simulation.name,
            batches=self._batches,
            rows=rows_of(self._reader, findings, self._fusion),
            stored=self._stored,
            fusion=self._fusion,
            environment=_environment(self._options),
            nodes=self._certifier.of_nodes(self._certifications),
            sums=self._sums,
            notes=self._notes(),
        )

    def _sweep(
        self,
        inputs: Mapping[str, Any],
        teacher: Mapping[str, RuntimeCodes],
        found: Mapping[str, Array],
        tallies: Mapping[Segment, Tally],
    ) -> list[Segment]:
        """Run the simulation once; returns the segments that differ by more than rounding explains."""
        suspects = []
        ends = {(segment.end, bool(segment.output)): segment for segment in self._segments}
        for step in self._simulation.run(self._reader.program, inputs, teacher):
            for segment in self._segments if step.is_output else (ends[step.node, False],):
                if segment.end is step.node and bool(segment.output) == step.is_output:
                    suspects += (
                        [segment] if self._count(segment, _as_array(step.value), found, tallies[segment]) else []
                    )
        return suspects

    def _count(self, segment: Segment, simulated: Array, found: Mapping[str, Array], tally: Tally) -> bool:
        if segment.output:
            difference = compare_values(simulated, found[segment.output], self._batches)
            tally.add(difference)
            return is_beyond(segment, difference, self._certifications[segment], step_of(self._reader, segment))
        tensor = self._codes.get(segment.end.name)
        if tensor is None:
            return False
        module = self._reader.program.fake_quant(segment.end)
        assert module is not None
        difference = compare_codes(simulated, found[tensor], module.spec.steps, self._batches)
        tally.add(difference)
        return is_beyond(segment, difference, self._certifications[segment], step_of(self._reader, segment))

    def _teacher(self, found: Mapping[str, Array]) -> dict[str, RuntimeCodes]:
        """onnxruntime's codes at every activation's quantizer, on the grids that the file gives them."""
        nodes = {name: self._reader.program.node(name) for name in self._codes}
        return {
            name: runtime_codes(self._reader.program, self._file, self._quantizers[name][0], nodes[name], found[tensor])
            for name, tensor in self._codes.items()
        }

    def _compare_with_real(self, feed: Mapping[str, Array], found: Mapping[str, Array]) -> None:
        """The file must answer as its copy with exposed codes does, else the codes are not those that really run."""
        real = self._real.run(feed)
        _require_numbers(real, self._batches)
        same = all(compare_values(found[name], real[name], 0).differing == 0 for name in real)
        self._probe_differs = self._probe_differs or not same

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self._probe_differs:
            notes.append("exposing codes as outputs changes what onnxruntime computes: the codes compared are those")
        if self._fusion.level is not self._options.level:
            asked, read = self._options.level.value, self._fusion.level.value
            notes.append(f"kernels were read at level {read}: level {asked} cannot be saved")
        return tuple(notes)


def _codes_of(reader: SegmentReader, quantizers: Mapping[str, list[FileQuantizer]], file: OnnxFile) -> dict[str, str]:
    """By FakeQuant node of an activation, the tensor of the file that holds its codes."""
    nodes = [node for node in reader.program.graph.nodes if reader.is_activation_quantizer(node)]
    computed = {node.name: quantizers[node.name][0].codes for node in nodes if node.name in quantizers}
    return {name: tensor for name, tensor in computed.items() if not file.is_constant(tensor)}


def _require_same_program(program: Program, file: OnnxFile) -> None:
    own, carried = program.fingerprint(), file.fingerprint
    if own != carried:
        raise ParityError(
            f"'{file.path}' was not lowered from program '{program.name}' as it is now",
            expected=f"fingerprint {own}",
            got=f"fingerprint {carried}" if carried else "a file without fingerprint",
            remedy="Export the program again, load the program saved beside the file, or pass allow_mismatch=True.",
        )


def _require_grids(program: Program) -> None:
    missing = [
        str(node.args[0])
        for node, module in program.fake_quant_nodes()
        if module.mode is Mode.OBSERVE
        or (module.mode is not Mode.OFF and not module.follows and not module.has_encoding)
    ]
    if missing:
        names = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise ParityError(
            "check_parity", expected="a grid at every quantizer", got=f"none for {names}", remedy="Calibrate first."
        )


@contextmanager
def _evaluating(program: Program) -> Iterator[None]:
    """Eval mode; on leaving, modes and the grids that follow their weights are as they were."""
    training = [module for module in program.module.modules() if module.training]
    followers = [module for _, module in program.fake_quant_nodes() if module.follows]
    before = [{key: value.clone() for key, value in module.state_dict().items()} for module in followers]
    program.module.eval()
    try:
        yield
    finally:
        for trained in training:
            trained.training = True
        for module, state in zip(followers, before, strict=True):
            module.load_state_dict(state)


def _inputs_of(program: Program, batch: Batch, index: int) -> dict[str, Any]:
    try:
        values = placeholder_values(program, batch)
    except FxquantError as err:
        raise ParityError(f"batch {index}: {err.thing}", expected=err.expected, got=err.got, remedy=err.remedy) from err
    tensors = [*program.module.parameters(), *program.module.buffers()]
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and bool(torch.isnan(value).any()):
            got = f"{int(torch.isnan(value).sum())} NaN of {value.numel()} values"
            raise ParityError(
                f"batch {index}: input '{name}'",
                expected="no NaN",
                got=got,
                remedy="Codes of NaN are undefined in ONNX.",
            )
    device = tensors[0].device if tensors else torch.device("cpu")
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def _require_numbers(outputs: Mapping[str, Array], batch: int) -> None:
    """NaN equals NaN, so that a broken model would be called exact."""
    for name, value in outputs.items():
        count = int(np.isnan(value).sum()) if np.issubdtype(value.dtype, np.floating) else 0
        if count:
            raise ParityError(
                f"batch {batch}: onnxruntime's output '{name}'",
                expected="no NaN",
                got=f"{count} NaN of {value.size} values",
                remedy="Look for NaN among the model's parameters and buffers; there is nothing to compare.",
            )


def _as_array(value: Any) -> Array:
    if isinstance(value, torch.Tensor):
        array: Array = value.detach().cpu().numpy()
        return array
    return np.array([value])


def _environment(options: RuntimeOptions) -> Environment:
    return Environment(runtime_version(), runtime_build(), instruction_set(), cpu_flags(), options, torch.__version__)
