"""Steps of AutoQuant: each makes a pipeline of another one. The list is data, in the order of cost.

Ranges first, which cost a calibration each: the scheme pairs of AIMET's AutoQuant (weights/activations by
tf-enhanced/min-max, tf-enhanced/tf-enhanced, tf-enhanced/99.9 %, tf-enhanced/99.99 %; min-max/min-max is what most
configs say), least squares and entropy. Then what changes the float network (Nagel 2019, arXiv:1906.04721), then biases
(the same paper), at last what chooses how each weight is rounded (AdaRound: Nagel 2020, arXiv:2004.10568).

Some steps help only together: equalization makes biases large, and may lose by itself what it gains once they are
corrected. A Combination takes several steps at once, whether they were kept or not, so that the search finds that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxquant.errors import ConfigError, FxquantError
from fxquant.graph.options import decode_dataclass
from fxquant.graph.passes import Pass
from fxquant.graph.pipeline import Pipeline
from fxquant.spec import SpecOverride

FOLDING = ("fold-batch-norm", "convolve-batch-norm")


@dataclass(frozen=True)
class AddedPass:
    """A pass of the pipeline's catalogue by name, with the options that a TOML file would give it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, pipeline: Pipeline) -> Pass:
        """The pass itself; ConfigError for an unknown name or option."""
        kind = type(pipeline.make_pass(self.name))
        made = decode_dataclass(kind, self.options, self.name)
        assert isinstance(made, Pass)
        return made

    def __str__(self) -> str:
        options = ", ".join(f"{key} {value}" for key, value in self.options.items())
        return f"{self.name} ({options})" if options else self.name


@dataclass(frozen=True)
class Step:
    """One thing to try: a change of the best pipeline so far.

        Step("mse ranges", activation=SpecOverride(estimator="mse"))
        Step("equalization", prepare=(AddedPass("cross-layer-equalization"),))

    Arguments:
        name: of the trial, in the table and in the file of trials.
        activation, weight: what changes of the specs (Pipeline.override).
        prepare: passes that go, in this order, right behind the last one of `behind`.
        optimize: post-training algorithms that go in front of the first one of `before`, or else to the end.
        behind, before: names of passes.

    A pass of the same name that the pipeline has already gives way to the step's. For anything else override `build`
    and `__str__`.
    """

    name: str
    activation: SpecOverride | None = None
    weight: SpecOverride | None = None
    prepare: tuple[AddedPass, ...] = ()
    optimize: tuple[AddedPass, ...] = ()
    behind: tuple[str, ...] = FOLDING
    before: tuple[str, ...] = ()

    def build(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline to try. Raises ConfigError where the step does not apply to it."""
        changed = pipeline.override(self.activation, self.weight)
        if self.prepare:
            changed = changed.changed(prepare=self._prepared(changed))
        if self.optimize:
            changed = changed.changed(optimize=self._optimized(changed))
        return changed

    def _prepared(self, pipeline: Pipeline) -> list[Pass]:
        passes = _without(list(pipeline.prepare_passes), self.prepare)
        places = [index for index, item in enumerate(passes) if item.name in self.behind]
        if not places:
            names = " or ".join(f"'{name}'" for name in self.behind)
            raise ConfigError(f"step '{self.name}'", expected=f"a pipeline with {names} under prepare", got="none")
        passes[places[-1] + 1 : places[-1] + 1] = [added.make(pipeline) for added in self.prepare]
        return passes

    def _optimized(self, pipeline: Pipeline) -> list[Pass]:
        passes = _without(list(pipeline.optimize_passes), self.optimize)
        places = [index for index, item in enumerate(passes) if item.name in self.before]
        place = places[0] if places else len(passes)
        passes[place:place] = [added.make(pipeline) for added in self.optimize]
        return passes

    def __str__(self) -> str:
        """What it changes, in words."""
        changes = {"activations": self.activation, "weights": self.weight}
        words = [_change(name, change) for name, change in changes.items() if change is not None]
        words += [f"+ {added}" for added in (*self.prepare, *self.optimize)]
        return "; ".join(words) or "the config as it is"


@dataclass(frozen=True)
class Combination(Step):
    """Several steps at once, in their order, whether they were kept or not; those that do not apply are left out."""

    parts: tuple[Step, ...] = ()

    def build(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline to try. Raises ConfigError where no part applies to it."""
        applied = 0
        for part in self.parts:
            try:
                pipeline, applied = part.build(pipeline), applied + 1
            except FxquantError:
                continue
        if not applied:
            names = " or ".join(f"'{part.name}'" for part in self.parts) or "a part"
            raise ConfigError(f"step '{self.name}'", expected=f"a pipeline that {names} applies to", got="none")
        return pipeline

    def __str__(self) -> str:
        return "; ".join(map(str, self.parts))


def _change(name: str, change: SpecOverride) -> str:
    is_estimator = change == SpecOverride(estimator=change.estimator)
    return f"{name} by {change.estimator}" if is_estimator else f"{name}: {change}"


def still_in_force(steps: Sequence[Step], start: Pipeline) -> tuple[Step, ...]:
    """Those of some steps, taken one after another, without which the pipeline at the end would be another."""

    def built(chosen: Sequence[Step]) -> str | None:
        pipeline = start
        try:
            for step in chosen:
                pipeline = step.build(pipeline)
        except FxquantError:  # a step that builds on one that is left out
            return None
        return pipeline.to_toml()

    whole, left = built(steps), list(steps)
    for step in steps:
        others = [other for other in left if other is not step]
        if built(others) == whole:
            left = others
    return tuple(left)


def _without(passes: list[Pass], added: Sequence[AddedPass]) -> list[Pass]:
    names = {item.name for item in added}
    return [item for item in passes if item.name not in names]


def ranges(name: str, *, weight: str, activation: str) -> Step:
    """The step that chooses both range estimators."""
    return Step(name, SpecOverride(estimator=activation), SpecOverride(estimator=weight))


def default_steps(iterations: int | None = None, seed: int = 0) -> tuple[Step, ...]:
    """The steps that `auto_quantize` takes unless it is told others, cheapest first; the last ones of their cost are
    combinations of those before.

    Arguments:
        iterations: of AdaRound for each layer; None for the pass's default.
        seed: of AdaRound.
    """
    rounding = {"seed": seed} if iterations is None else {"iterations": iterations, "seed": seed}
    adaround = Step("AdaRound", optimize=(AddedPass("adaround", rounding),), before=("correct-bias", "recalibrate"))
    return (
        Step("as configured"),
        *_RANGES,
        *(_EQUALIZATION, _THROUGH_RELU6, _ABSORPTION),
        ranges("min-max ranges", weight="min-max", activation="min-max"),  # may be best once channels are equalized
        *(_bias_correction("analytic"), _bias_correction("empirical")),
        _RECALIBRATION,
        Combination("equalization and biases", parts=(_EQUALIZATION, _bias_correction("empirical"))),
        Combination(
            "the same through ReLU6",  # as int8_per_tensor_dfq has it
            parts=(_THROUGH_RELU6, _ABSORPTION, _bias_correction("empirical"), _RECALIBRATION),
        ),
        Step(
            "sequential mse",
            optimize=(AddedPass("sequential-mse"),),
            before=("adaround", "correct-bias", "recalibrate"),
        ),
        adaround,
        Combination("all together", parts=(_EQUALIZATION, _bias_correction("empirical"), adaround)),
    )


def _bias_correction(method: str) -> Step:
    added = AddedPass("correct-bias", {"method": method})
    return Step(f"{method} bias correction", optimize=(added,), before=("recalibrate",))


_RANGES = (
    ranges("tf-enhanced weights", weight="tf-enhanced", activation="min-max"),
    ranges("tf-enhanced ranges", weight="tf-enhanced", activation="tf-enhanced"),
    ranges("99.9 % ranges", weight="tf-enhanced", activation="percentile(99.9)"),
    ranges("99.99 % ranges", weight="tf-enhanced", activation="percentile(99.99)"),
    ranges("mse ranges", weight="mse", activation="mse"),
    ranges("entropy ranges", weight="min-max", activation="entropy"),
)
_EQUALIZE = AddedPass("cross-layer-equalization")
_EQUALIZATION = Step("equalization", prepare=(_EQUALIZE,), behind=(*FOLDING, "replace-relu6"))
_THROUGH_RELU6 = Step("equalization through ReLU6", prepare=(AddedPass("replace-relu6", {"least_db": 30.0}), _EQUALIZE))
_ABSORPTION = Step(
    "high biases absorbed",
    prepare=(AddedPass("absorb-high-bias"),),
    behind=(*FOLDING, "cross-layer-equalization"),
)
_RECALIBRATION = Step("recalibration", optimize=(AddedPass("recalibrate"),))
