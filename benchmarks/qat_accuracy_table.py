"""The table of the accuracy benchmark: mean and spread over seeds, what was promised, and the Markdown page of both."""

import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from benchmarks import runner
from benchmarks.qat_accuracy_runs import W4A4, W4A8, W8A8, Bits, Method, Outcome, Recipe, Run, Setting, Store
from benchmarks.runner import Verdict

HEADER = ["net, setting", "seeds", "accuracy %", "min to max", "minus float", "codes differing", "minutes"]
GOALS = ((W8A8, 0.2), (W4A8, 1.0))
QAT = (Method.FIXED, Method.LEARNED)
NOTHING = "-"


@dataclass(frozen=True)
class Results:
    """What was found so far of the wanted runs."""

    wanted: tuple[Run, ...]
    found: Mapping[Run, Outcome]

    @classmethod
    def read(cls, store: Store, wanted: Sequence[Run]) -> "Results":
        """What `store` has of `wanted`."""
        outcomes = {run: store.find(run) for run in wanted}
        return cls(tuple(wanted), {run: outcome for run, outcome in outcomes.items() if outcome is not None})

    @property
    def networks(self) -> list[str]:
        """The nets that are wanted."""
        return list(dict.fromkeys(run.network for run in self.wanted))

    def outcomes(self, network: str, setting: Setting) -> dict[int, Outcome]:
        """By seed."""
        return {
            run.seed: found for run, found in self.found.items() if (run.network, run.setting) == (network, setting)
        }

    def gains(self, network: str, setting: Setting, over: Setting) -> list[float]:
        """Points that `setting` is above `over`, for each seed that has both."""
        mine, other = self.outcomes(network, setting), self.outcomes(network, over)
        # Counted in images: a difference of percentages could miss a goal by a rounding.
        return [
            100 * (found.correct - other[seed].correct) / found.images
            for seed, found in sorted(mine.items())
            if seed in other
        ]

    def table(self) -> str:
        """One row for each net and setting that was run."""
        cells = [(run.network, run.setting) for run in self.wanted]
        rows = [self._row(*cell) for cell in dict.fromkeys(cells) if self.outcomes(*cell)]
        return runner.table(HEADER, rows)

    def verdicts(self) -> list[Verdict]:
        """What the issue promises, of the nets and settings that were run."""
        found = [self._code_verdict()]
        for network in self.networks:
            for bits, allowed in GOALS:
                found += [self._near_float(network, Setting(method, bits), allowed) for method in QAT]
            found.append(self._learned_against_fixed(network, W4A4))
        return [verdict for verdict in found if verdict is not None]

    def _row(self, network: str, setting: Setting) -> list[str]:
        outcomes = self.outcomes(network, setting)
        points = [outcome.points for outcome in outcomes.values()]
        gains = self.gains(network, setting, Setting(Method.FLOAT))
        compared = sum(outcome.codes_compared for outcome in outcomes.values())
        minutes = statistics.mean(outcome.seconds for outcome in outcomes.values()) / 60
        return [
            f"{network}: {setting}",
            str(len(points)),
            _mean_and_spread(points),
            f"{min(points):.2f} to {max(points):.2f}",
            _mean_and_spread(gains, signed=True) if setting.method is not Method.FLOAT else NOTHING,
            f"{_differing(outcomes.values())} of {compared:,}" if compared else NOTHING,
            f"{minutes:.1f}",
        ]

    def _code_verdict(self) -> Verdict | None:
        lowered = [outcome for outcome in self.found.values() if outcome.codes_compared]
        if not lowered:
            return None
        compared = sum(outcome.codes_compared for outcome in lowered)
        figures = f"{_differing(lowered)} of {compared:,} codes and logits, {len(lowered)} runs"
        return Verdict("0 codes differ from onnxruntime's", _differing(lowered) == 0, figures)

    def _near_float(self, network: str, setting: Setting, allowed: float) -> Verdict | None:
        gains = self.gains(network, setting, Setting(Method.FLOAT))
        if not gains:
            return None
        longer = self.gains(network, setting, Setting(Method.FLOAT_LONGER))
        figures = f"{_mean_and_spread(gains, signed=True)} points"
        figures += f"; {_mean_and_spread(longer, signed=True)} against float trained on" if longer else ""
        promise = f"{network}, {setting}: within {allowed} points of float"
        return Verdict(promise, statistics.mean(gains) >= -allowed, figures)

    def _learned_against_fixed(self, network: str, bits: Bits) -> Verdict | None:
        gains = self.gains(network, Setting(Method.LEARNED, bits), Setting(Method.FIXED, bits))
        if not gains:
            return None
        promise = f"{network}, {bits}: learned ranges no worse than fixed ones"
        return Verdict(promise, statistics.mean(gains) >= 0, f"{_mean_and_spread(gains, signed=True)} points")


def document(results: Results, recipe: Recipe, command: str) -> str:
    """The Markdown page: command, recipe, table, promises."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "onnxruntime"))
    state = f"{len(results.found)} of {len(results.wanted)} runs."
    parts = [
        "# QAT accuracy on real data",
        f"`{command}`; {state} {runner.cpu_model()}, {versions}.",
        textwrap.fill(_caption(recipe), 120),
        _fenced(results.table()),
        _fenced("\n".join(str(verdict) for verdict in results.verdicts())),
    ]
    return "\n\n".join(parts) + "\n"


def _caption(recipe: Recipe) -> str:
    first, further = recipe.float_training, recipe.quantized_training
    range_rate = further.range_learning_rate or further.learning_rate
    return (
        f"{recipe.data}: accuracy in percent of onnxruntime's answers on the test images (of torch's, for float), mean "
        "and standard deviation over seeds. Weights are symmetric per channel, activations unsigned per tensor; the "
        "first layer's input and weight, and the last layer's input, weight and output have 8 bits in all rows. PTQ "
        f"and QAT start from the same float net ({first.epochs} epochs, SGD, learning rate {first.learning_rate:g}) "
        f"and calibrate on the same {recipe.calibration_images} training images: moving-average of extremes, for 4-bit "
        "activations mse; weights' ranges are min-max, in PTQ to 4 bits mse. "
        f"QAT has {further.epochs} more epochs at learning rate {further.learning_rate:g} ({range_rate:g} for learned "
        "ranges: lsq+ for activations, while weights' grids follow the weights), with live batch norm and half-cosine "
        "decay; "
        f'"{Method.FLOAT_LONGER.value}" has the same without quantization. Fixed ranges: those of activations stay, '
        "those of weights follow the extremes. Differing codes: all quantized values of the `exact` "
        "simulation, and the logits of the trained module's last eval(), against onnxruntime on "
        f"{recipe.parity_images} images."
    )


def _fenced(text: str) -> str:
    return f"```\n{text}\n```"


def _mean_and_spread(points: Sequence[float], *, signed: bool = False) -> str:
    mean = f"{statistics.mean(points):+.2f}" if signed else f"{statistics.mean(points):.2f}"
    return f"{mean} ± {statistics.stdev(points):.2f}" if len(points) > 1 else mean


def _differing(outcomes: Iterable[Outcome]) -> int:
    return sum(outcome.codes_differing + outcome.logits_differing for outcome in outcomes)
