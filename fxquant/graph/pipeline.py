"""Pipelines: TOML files that say which passes run before calibration or training, which right after calibration,
and which after all of it.

target = "onnxruntime-x64"                   # fxquant.spec.Target, by value
catalogue = "fxquant.passes:CATALOG"         # a dict of pass classes by name; your own is as good as ours

[[prepare]]
pass = "assign-specs"                        # every other key is an option: a field of the pass
activation = { bits = 8, signed = false }

[[optimize]]
pass = "adaround"                            # post-training algorithms; those that measure are given batches

[training]                                   # fxquant.Schedule; where it is left out, its defaults
epochs = 15
freeze_encodings_after = "never"

[[finalize]]
pass = "settle-encodings"

A JSON file is a placement config of AIMET's: it gives the sections of the pass that reads such files, and the packaged
pipeline PLACEMENT_TEMPLATE gives everything else.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fxquant.errors import ConfigError, PassError, nearest
from fxquant.graph.batches import Batch
from fxquant.graph.catalogue import import_catalogue
from fxquant.graph.manager import PassManager
from fxquant.graph.options import decode, decode_dataclass
from fxquant.graph.pass_data import PassData
from fxquant.graph.passes import Pass
from fxquant.graph.program import Program, Stage
from fxquant.graph.toml import entries, pass_tables, toml
from fxquant.graph.trace import PassTrace
from fxquant.graph.training_table import decode_schedule, encode_schedule
from fxquant.schedule import DEFAULT_SCHEDULE, Schedule
from fxquant.spec import QuantSpec, SpecOverride, Target

DEFAULT_CATALOGUE = "fxquant.passes:CATALOG"
CONFIGS = "fxquant.configs"
PLACEMENT_TEMPLATE = "aimet_default"
_KEYS = ("target", "catalogue", "prepare", "optimize", "training", "finalize")
_NOTHING = PassManager([])


class Pipeline:
    """Lists of passes, with the caller's calibration and training between them.

    Arguments:
        prepare: passes from the captured program to one that can be calibrated or trained.
        finalize: passes from there to one that can be lowered.
        target: the runtime whose rules the passes obey.
        name: for messages.
        catalogue: where `to_toml` says that the passes come from.
        schedule: of the training before `finalize`, if there is any.
        optimize: post-training algorithms that a calibrated program goes through, before training or `finalize`.
    """

    def __init__(
        self,
        prepare: PassManager,
        finalize: PassManager,
        target: Target = Target.ONNXRUNTIME_X64,
        name: str = "pipeline",
        catalogue: str = DEFAULT_CATALOGUE,
        schedule: Schedule = DEFAULT_SCHEDULE,
        optimize: PassManager = _NOTHING,
    ) -> None:
        self.prepare_passes = prepare
        self.optimize_passes = optimize
        self.finalize_passes = finalize
        self.target = target
        self.name = name
        self.catalogue = catalogue
        self.schedule = schedule

    def prepare(
        self, program: Program, check_inputs: Batch | None = None, batches: Iterable[Batch] | None = None
    ) -> PassTrace:
        """Set the program's target, then run the prepare passes on it, in place (see PassManager.run).

        batches: for passes that measure (`needs_data`): calibration batches, iterated anew by each.
        """
        before = program.target
        program.target = self.target
        try:
            data = None if batches is None else PassData(batches)
            return self.prepare_passes.run(program, check_inputs, data=data)
        except PassError:
            if program.stage is Stage.CAPTURED:
                program.target = before
            raise

    def optimize(
        self,
        program: Program,
        batches: Iterable[Batch] | None = None,
        *,
        folder: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> PassTrace:
        """Run the pipeline's post-training algorithms, if it has any, on a calibrated program, in place.

        Arguments:
            batches: for those that measure; iterated anew by each, so a list or a DataLoader without shuffling. What
                they compare with is the program in float as it is now.
            folder: where they keep what they have finished: the same call goes on where it was killed.
            progress: show progress bars when standard error is a terminal.
        """
        place = None if folder is None else Path(folder)
        return self.optimize_passes.run(program, data=None if batches is None else PassData(batches, place, progress))

    def finalize(self, program: Program, check_inputs: Batch | None = None) -> PassTrace:
        """Run the finalize passes on a calibrated or trained program, in place."""
        if program.target is not self.target:
            raise PassError(
                f"pipeline '{self.name}' cannot finalize",
                expected=f"a program prepared for {self.target.value}",
                got=f"one prepared for {program.target.value}",
                remedy="Finalize with the pipeline that prepared it.",
            )
        return self.finalize_passes.run(program, check_inputs)

    def override(self, activation: SpecOverride | None = None, weight: SpecOverride | None = None) -> Pipeline:
        """This pipeline with the options `activation` and `weight` of its prepare passes changed.

            load_pipeline("int8_per_channel").override(activation=SpecOverride(estimator="mse"))

        Raises ConfigError if no pass has such an option, or if one has that decides a field by another option (the
        symmetry by the sections of a placement file); SpecError if the result is no QuantSpec.
        """
        wanted = {"activation": activation, "weight": weight}
        given = {name: change for name, change in wanted.items() if change is not None}
        if not given:
            return self
        for item in self.prepare_passes:
            if isinstance(item, ChecksOverride):
                item.check_override(given)
        passes = [_overridden(item, given) for item in self.prepare_passes]
        for name in given:
            if not any(isinstance(getattr(item, name, None), QuantSpec) for item in passes):
                raise ConfigError(f"pipeline '{self.name}' has no pass with a spec for '{name}'")
        return self.changed(prepare=passes)

    def with_schedule(self, schedule: Schedule) -> Pipeline:
        """This pipeline with another schedule of its training."""
        return self.changed(schedule=schedule)

    def changed(
        self,
        *,
        prepare: Sequence[Pass] | None = None,
        optimize: Sequence[Pass] | None = None,
        name: str | None = None,
        schedule: Schedule | None = None,
    ) -> Pipeline:
        """This pipeline with other lists of passes, another name or schedule; what is None stays."""
        return Pipeline(
            self.prepare_passes if prepare is None else PassManager(prepare),
            self.finalize_passes,
            self.target,
            self.name if name is None else name,
            self.catalogue,
            self.schedule if schedule is None else schedule,
            self.optimize_passes if optimize is None else PassManager(optimize),
        )

    def make_pass(self, name: str) -> Pass:
        """The pass called `name` of the pipeline's catalogue, with its options at their defaults."""
        known = import_catalogue(self.catalogue, f"pipeline '{self.name}'")
        if name not in known:
            raise ConfigError(f"unknown pass '{name}'", place=self.catalogue, remedy=nearest(name, known))
        return known[name]()

    def to_toml(self) -> str:
        """The pipeline as a file that `load_pipeline` reads back; options at their defaults are left out."""
        lines = [f"target = {toml(self.target.value)}", f"catalogue = {toml(self.catalogue)}"]
        lines += pass_tables("prepare", self.prepare_passes)
        lines += pass_tables("optimize", self.optimize_passes)
        schedule = encode_schedule(self.schedule)
        if schedule:
            lines += ["", "[training]", *entries(schedule)]
        lines += pass_tables("finalize", self.finalize_passes)
        return "\n".join(lines) + "\n"

    def __repr__(self) -> str:
        counts = f"{len(self.prepare_passes)} + {len(self.finalize_passes)} passes"
        return f"Pipeline('{self.name}', {self.target.value}, {counts})"


def load_pipeline(name_or_path: str | os.PathLike[str]) -> Pipeline:
    """Read a pipeline: a packaged name ("int8_per_channel", see `packaged_pipelines`), the path of a TOML file, or the
    path of a JSON file with AIMET's six sections ("aimet_default.json" is packaged, too).

    Whatever hw_version a JSON file names, the target is onnxruntime's, so that its model can be run and compared here.

    Raises ConfigError naming the file, the key and what is accepted, if the file is missing, is not TOML or JSON, or
    holds an unknown pass, key, value, type, catalogue or order of passes.
    """
    text = os.fspath(name_or_path)
    if text in packaged_pipelines():
        source = resources.files(CONFIGS).joinpath(f"{text}.toml")
        return parse_pipeline(source.read_text(encoding="utf-8"), text, place=f"{text}.toml")
    path = Path(text)
    if path.suffix not in (".toml", ".json") and not path.exists():
        remedy = f"{nearest(text, packaged_pipelines())} Or give the path of a .toml or .json file."
        raise ConfigError(f"pipeline '{text}' is unknown", remedy=remedy)
    if path.suffix == ".json":
        return _with_placement(_read(path, "a JSON file"), path.stem, place=text)
    return parse_pipeline(_read(path, "a TOML file"), path.stem, place=text)


def _read(path: Path, expected: str) -> str:
    """The text of a file; of a packaged one if none lies there."""
    packaged = resources.files(CONFIGS).joinpath(path.name)
    source = packaged if str(path) == path.name and not path.exists() and packaged.is_file() else path
    try:
        return source.read_text(encoding="utf-8-sig" if path.suffix == ".json" else "utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError("pipeline cannot be read", place=str(path), expected=expected, got=str(err)) from err


@runtime_checkable
class ReadsPlacement(Protocol):
    """A pass that takes what it does from a placement file of AIMET's."""

    def with_file(self, text: str, file: str) -> Pass:
        """The same pass, as the text of a file says; `file` names it in messages. Raises ConfigError."""


@runtime_checkable
class ChecksOverride(Protocol):
    """A pass that decides fields of its `activation` or `weight` by other options."""

    def check_override(self, given: Mapping[str, SpecOverride]) -> None:
        """Refuse a change, by the option's name, that would have no effect. Raises ConfigError."""


def _with_placement(text: str, name: str, place: str) -> Pipeline:
    frame = load_pipeline(PLACEMENT_TEMPLATE)
    prepare = frame.prepare_passes
    passes = [item.with_file(text, place) if isinstance(item, ReadsPlacement) else item for item in prepare]
    return frame.changed(prepare=passes, name=name)


def packaged_pipelines() -> list[str]:
    """Names of the pipelines that come with fxquant."""
    files = resources.files(CONFIGS).iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def parse_pipeline(text: str, name: str, *, place: str) -> Pipeline:
    """A pipeline from the text of a TOML file; `place` names the file in messages."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        raise ConfigError("pipeline is not TOML", place=place, got=str(err)) from err
    for key in content:
        if key not in _KEYS:
            raise ConfigError(f"unknown key '{key}'", place=place, remedy=nearest(key, _KEYS))
    target = decode(Target, content.get("target", Target.ONNXRUNTIME_X64.value), f"{place}: target")
    catalogue = decode(str, content.get("catalogue", DEFAULT_CATALOGUE), f"{place}: catalogue")
    known = import_catalogue(catalogue, f"{place}: catalogue")
    prepare = _manager(content.get("prepare", []), "prepare", known, place)
    optimize = _manager(content.get("optimize", []), "optimize", known, place)
    finalize = _manager(content.get("finalize", []), "finalize", known, place)
    _check_starts(prepare, finalize, place)
    _check_optimize(optimize, place)
    schedule = decode_schedule(content.get("training", {}), f"{place}: training")
    return Pipeline(prepare, finalize, target, name, catalogue, schedule, optimize)


def _overridden(item: Pass, given: Mapping[str, SpecOverride]) -> Pass:
    specs = {name: getattr(item, name, None) for name in given}
    changed = {name: given[name].apply(spec) for name, spec in specs.items() if isinstance(spec, QuantSpec)}
    if not changed:
        return item
    found: Pass = replace(item, **changed)  # type: ignore[type-var]  # every pass is a dataclass
    return found.placed(vars(item)["place"]) if hasattr(found, "placed") else found


def _manager(tables: Any, section: str, catalogue: Mapping[str, type[Pass]], place: str) -> PassManager:
    if not isinstance(tables, list):
        raise ConfigError(f"key '{section}'", place=place, expected=f"[[{section}]] tables", got=type(tables).__name__)
    passes = [_pass(table, catalogue, f"{place}: {section}[{index}]") for index, table in enumerate(tables)]
    try:
        return PassManager(passes)
    except PassError as err:
        raise ConfigError(
            err.thing, place=f"{place}: {section}", expected=err.expected, got=err.got, remedy=err.remedy
        ) from err


def _pass(table: Any, catalogue: Mapping[str, type[Pass]], place: str) -> Pass:
    if not isinstance(table, Mapping) or not isinstance(table.get("pass"), str):
        raise ConfigError("pass entry", place=place, expected='a table with pass = "<name>"', got=repr(table))
    name = table["pass"]
    if name not in catalogue:
        raise ConfigError(f"unknown pass '{name}'", place=place, remedy=nearest(name, catalogue))
    options = {key: value for key, value in table.items() if key != "pass"}
    item = decode_dataclass(catalogue[name], options, f"{place} {name}")
    assert isinstance(item, Pass)
    return item


def _check_optimize(optimize: PassManager, place: str) -> None:
    """Post-training algorithms take a calibrated program, and leave one."""
    starts = Stage.CALIBRATED in optimize.entries
    if starts and optimize.stage_after(Stage.CALIBRATED) is Stage.CALIBRATED:
        return
    wrong = next(item for item in optimize if Stage.CALIBRATED not in item.stages or item.leaves is not None)
    raise ConfigError(
        f"pass '{wrong.name}' under [[optimize]]",
        place=place,
        expected="passes that take a calibrated program and leave it calibrated",
        got=f"one that runs at {' or '.join(map(str, wrong.stages))}",
        remedy="Name it under [[prepare]] or [[finalize]].",
    )


def _check_starts(prepare: PassManager, finalize: PassManager, place: str) -> None:
    """Capture hands its programs to prepare, and calibration (or prepare, where nothing is calibrated) hands them to
    finalize.
    """
    if Stage.CAPTURED not in prepare.entries:
        first = next(iter(prepare)).name
        raise ConfigError(
            f"prepare cannot start with '{first}'",
            place=place,
            expected="passes that a captured program can start with",
            got=f"'{first}', which runs at {' or '.join(map(str, next(iter(prepare)).stages))}",
        )
    left = prepare.stage_after(Stage.CAPTURED)
    handed = (left, Stage.CALIBRATED) if left is Stage.INSERTED else (left,)
    if not any(stage in finalize.entries for stage in handed):
        raise ConfigError(
            f"finalize cannot start with '{next(iter(finalize)).name}'",
            place=place,
            expected=f"passes that run at {' or '.join(map(str, handed))}, which prepare and calibration leave",
            got=f"passes that start at {' or '.join(map(str, finalize.entries))}",
        )
