"""analyze: the sensitivity analysis of a calibrated program."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fxquant.analysis.noise import outputs_sqnr_db
from fxquant.analysis.report import AnalysisReport, Score, UnitRow
from fxquant.analysis.scores import FLOAT, Scores
from fxquant.analysis.sweep import ACTIVATIONS, ALL, WEIGHTS, Sweep, alone, digest_of, without
from fxquant.analysis.totals import Totals
from fxquant.analysis.units import Unit, callers, definition_of, units_of
from fxquant.analysis.value_meter import ValueMeter
from fxquant.calibration import require_ranges
from fxquant.errors import CalibrationError, ConfigError, FxquantError
from fxquant.evaluation import Evaluate, name_of
from fxquant.graph.batches import Batch
from fxquant.graph.program import Program, Stage
from fxquant.progress import track
from fxquant.training.seeding import plain_seed
from fxquant.trials import TrialLog

TRIALS = "analysis_trials.json"
_RECORDS = "each output by itself"  # what a record holds; earlier ones had all outputs' energies in one sum
_SAVE_SECONDS = 2.0  # a run that is killed loses at most so much work


def analyze(
    program: Program,
    batches: Iterable[Batch],
    evaluate: Evaluate | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> AnalysisReport:
    """Measure which layers, weights and activations a quantized program loses accuracy by.

    Every layer (its weight and the activation that it gives) is quantized alone, and left alone in float; every value
    is compared with the float run. The program is calibrated or finalized and stays as it is: all is done on a copy, in
    float simulation and eval mode. Quantizers that are off stay off.

    Cost: 2 x layers forwards of each batch at most, about half of that in a chain of layers, as only the graph behind a
    layer runs again; and 2 x layers + 4 calls of `evaluate`. Memory: a second model, and the live values of one batch
    twice, however many batches there are.

    Arguments:
        batches: of inputs, each like the model's arguments; iterated once.
        evaluate: takes what is called like the model and gives a score, the higher the better; damage is then measured
            by it, and else by the noise of the outputs, of each relative to its own energy, averaged.
        folder: where finished runs are kept (analysis_trials.json), so that an analysis that was killed goes on.
        resume, overwrite: go on with what is in the folder, or remove it; without either it is refused.
        max_batches: use no more than so many.
        seed: random generators are seeded with it before each `evaluate`.
        progress: show a progress bar when standard error is a terminal.

    Raises CalibrationError for a program without grids; FxquantError: nothing is quantized, no batches, a batch that
    does not fit, values, outputs or scores that are not finite; StorageError for a folder of another run.
    """
    _require(program, batches, max_batches, seed)
    path = None if folder is None else Path(folder) / TRIALS
    log = TrialLog(path, _recipe(program, evaluate, seed), resume=resume, overwrite=overwrite)
    sweep = _sweep_of(program)
    totals = _run_batches(sweep, batches, max_batches, log, progress)
    scores = Scores(sweep, evaluate, seed, log)
    for _ in track(scores.run(), "evaluating layers", total=scores.count, show=progress):
        pass
    return _report(program, sweep, totals, scores)


def _require(program: Program, batches: Iterable[Batch], max_batches: int | None, seed: int) -> None:
    if program.stage not in (Stage.CALIBRATED, Stage.FINALIZED):
        raise CalibrationError(
            "analyze",
            expected="a program at stage calibrated or finalized",
            got=str(program.stage),
            remedy="Calibrate it first (fxquant.calibrate).",
        )
    require_ranges(program)
    if not callers(program):
        raise FxquantError("analyze", expected="a program with quantizers", got="none that is on")
    if isinstance(batches, torch.Tensor):
        remedy = "Put it in a list: [batch]; a bare tensor would be taken apart along its first axis."
        raise FxquantError("analyze", expected="an iterable of batches", got="a tensor", remedy=remedy)
    if max_batches is not None and max_batches < 1:
        raise ConfigError("analyze: max_batches", expected="at least 1, or None for all", got=str(max_batches))
    plain_seed(seed, "analyze")


def _recipe(program: Program, evaluate: Evaluate | None, seed: int) -> dict[str, Any]:
    """What the records of a run depend on, besides the batches, which are checked one by one."""
    evaluated = None if evaluate is None else name_of(evaluate)
    return {"records": _RECORDS, "program": program.fingerprint(), "evaluate": evaluated, "seed": seed}


def _sweep_of(program: Program) -> Sweep:
    """A sweep of a copy of the program, whose meters have seen the weights."""
    twin = program.copy()
    twin.simulate = "float"
    twin.module.eval()
    units = units_of(twin)
    sweep = Sweep(twin, units, list(_meters(twin, units)))
    sweep.route.switch(sweep.everything)
    with torch.no_grad():
        for meter in sweep.meters:
            if meter.module.follows:
                meter.see(sweep.route.weight_of(meter.node), None)
    return sweep


def _meters(program: Program, units: Sequence[Unit]) -> Iterator[ValueMeter]:
    """One for each value that a quantizer of a unit quantizes, in graph order."""
    unit_of = {module: unit for unit in units for module in unit.modules}
    first = {module: nodes[0] for module, nodes in callers(program).items()}
    for node, module in program.fake_quant_nodes():
        if module in unit_of:
            is_own = first[module] is node
            yield ValueMeter(program, unit_of[module], node, "" if is_own else str(first[module].args[0]))


def _run_batches(
    sweep: Sweep, batches: Iterable[Batch], max_batches: int | None, log: TrialLog, progress: bool
) -> Totals:
    count = len(batches) if isinstance(batches, Sized) else max_batches
    count = min(count, max_batches) if count is not None and max_batches is not None else count
    runs = 2 * len(sweep.units) + 3
    totals = Totals(log)
    steps = _steps(sweep, islice(batches, max_batches), totals)
    for _ in track(steps, "quantizing layers", total=None if count is None else count * runs, show=progress):
        pass
    totals.require_all()
    return totals


def _steps(sweep: Sweep, batches: Iterable[Batch], totals: Totals) -> Iterator[None]:
    """All runs of all batches; what is done is kept every few seconds, and when the run is interrupted."""
    for index, batch in enumerate(batches):
        result = begun = totals.begun(*digest_of(sweep.program, batch, index))
        known, saved = len(result.runs), time.monotonic()
        try:
            for result in sweep.run(batch, index, begun):
                yield
                if time.monotonic() - saved > _SAVE_SECONDS and len(result.runs) > known:
                    totals.keep(result)
                    known, saved = len(result.runs), time.monotonic()
        except BaseException:  # an interrupt too
            if len(result.runs) > known:
                totals.keep(result)
            raise
        totals.finish(result)


def _report(program: Program, sweep: Sweep, totals: Totals, scores: Scores) -> AnalysisReport:
    rows = totals.sum.rows

    def score(name: str) -> Score:
        noise = totals.sum.runs[name]
        agreement = noise.agreeing / rows if rows else None
        return Score(outputs_sqnr_db(totals.sum.signals, noise.energies), agreement, scores.of(name))

    whole = {name: score(name) for name in (ALL, WEIGHTS, ACTIVATIONS)}
    float_score = Score(float("inf"), 1.0 if rows else None, scores.of(FLOAT))
    return AnalysisReport(
        program=program.name,
        stage=str(program.stage),
        batches=totals.count,
        samples=totals.sum.samples,
        score="sqnr" if float_score.evaluated is None else "evaluate",
        float_score=float_score,
        quantized=whole[ALL],
        weights_only=whole[WEIGHTS],
        activations_only=whole[ACTIVATIONS],
        units=tuple(
            _unit_row(sweep.program, unit, score(alone(unit)), score(without(unit)), float_score, whole[ALL])
            for unit in sweep.units
        ),
        values=tuple(meter.row() for meter in sweep.meters),
        notes=_notes(sweep.units),
    )


def _unit_row(program: Program, unit: Unit, one: Score, rest: Score, float_score: Score, quantized: Score) -> UnitRow:
    definition = definition_of(program, unit.node)
    weights = tuple(dict.fromkeys(str(node.args[0]) for node in unit.weights))
    activations = tuple(dict.fromkeys(str(node.args[0]) for node in unit.activations))
    bits = {f"{'w' if module.follows else 'a'}{module.spec.bits}": None for module in unit.modules}
    lost, won = _lost(float_score, one), _lost(rest, quantized)
    axis_of = None if definition is None or not unit.weights else definition.channel_axis
    return UnitRow(
        name=unit.name,
        module=str(unit.node.meta.get("module_path", "")),
        op=definition.name if definition is not None else unit.node.op.replace("placeholder", "input"),
        weights=weights,
        activations=activations,
        bits=" ".join(sorted(bits, reverse=True)),
        axis=None if axis_of is None else axis_of(unit.node),
        alone=one,
        without=rest,
        damage_alone=_share(one, quantized) if lost is None else lost,
        damage_without=(1 - _share(rest, quantized) if quantized.noise else 0.0) if won is None else won,
    )


def _lost(better: Score, worse: Score) -> float | None:
    """How much of `evaluate`'s score is lost; None without one."""
    return None if better.evaluated is None or worse.evaluated is None else better.evaluated - worse.evaluated


def _share(noise: Score, quantized: Score) -> float:
    """A run's noise as a share of that with all quantized; 0 where there is none."""
    return noise.noise / quantized.noise if quantized.noise else 0.0


def _notes(units: Sequence[Unit]) -> tuple[str, ...]:
    shared = [
        f"one grid for {', '.join(str(node.args[0]) for node in unit.activations)}: switched together, as '{unit.name}'"
        for unit in units
        if len(unit.activations) > 1
    ]
    return tuple(shared)
