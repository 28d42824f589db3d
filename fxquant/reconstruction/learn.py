"""Learn the rounding of a unit's weights.

    loss = mean over samples and positions of sum over channels (y~ - y)^2  +  lambda r(alpha)

y is the unit's output in float, y~ that with softly rounded weights (soft_rounding.py) on the quantized program's
inputs. After a warm start without r, beta falls along a half cosine (Nagel 2020, arXiv:2004.10568, section 3.3); at the
end every number is rounded as its alpha says. What is learned from few samples may fit the noise of just these, above
all where errors of activations outweigh those of weights: so it is compared with rounding to nearest on samples that
were held back. In blocks the activations' quantizers work, and each element that they
round passes in float with probability `drop` instead (QDrop, Wei 2022, arXiv:2203.05740).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.errors import FxquantError
from fxquant.graph.program import Program, describe
from fxquant.graph.segment import Segment, in_eval_mode
from fxquant.progress import track
from fxquant.reconstruction.gain import deviation
from fxquant.reconstruction.samples import Samples, generator_of, segment_of
from fxquant.reconstruction.settings import Settings
from fxquant.reconstruction.soft_rounding import SoftRounding
from fxquant.reconstruction.units import Unit, weight_of

Codes = Mapping[fx.Node, torch.Tensor]
POINTS = 100  # of a loss curve


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What was learned of a unit.

    Arguments:
        unit: its name.
        codes: by the name of a weight's FakeQuant node, codes (int32) as learned.
        nearest_error, learned_error: squared error of the output on all samples, over the squared float output, with
            the weights rounded to nearest and as learned.
        changed: how many numbers are not rounded to the nearest.
        iterations: as many as ran.
        seconds: they took.
        samples: how many there were (positions of maps count each).
        curve: iterations and the loss there (lambda r included, also during the warm start).
        check: the errors on the samples that were held back, if any were.
    """

    unit: str
    codes: Mapping[str, torch.Tensor]
    nearest_error: float
    learned_error: float
    changed: int
    iterations: int
    seconds: float
    samples: int
    curve: tuple[tuple[int, float], ...]
    check: tuple[float, float, float] | None = None

    @property
    def is_better(self) -> bool:
        """Whether the learned rounding beats that to the nearest, and is not clearly worse on what was held back."""
        if self.check is not None:
            nearest, learned, deviation = self.check
            if learned > nearest + deviation:
                return False
        return self.learned_error < self.nearest_error

    def __str__(self) -> str:
        total = sum(codes.numel() for codes in self.codes.values())
        errors = f"{self.nearest_error:.2e} -> {self.learned_error:.2e}"
        check = "" if self.check is None else f"; on samples held back {self.check[0]:.2e} -> {self.check[1]:.2e}"
        counts = f"{self.changed:,} of {total:,} weights rounded the other way"
        return f"output error {errors} (nearest -> learned{check}), {counts}, {self.seconds:.1f} s"


class _Dropping(Segment):
    """A segment whose activation quantizers let elements pass in float, as drawn."""

    def __init__(self, program: Program, unit: Unit, drop: float, generator: torch.Generator) -> None:
        super().__init__(program, [unit.output], (*unit.inputs, *unit.weights, *unit.sizes))
        self.drop, self.generator = drop, generator

    def _compute(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        found = super()._compute(node, values)
        module = self.program.fake_quant(node) if self.drop else None
        if module is None or module.follows:
            return found
        source = node.args[0]
        assert isinstance(source, fx.Node)
        passes = torch.rand(found.shape, generator=self.generator) < self.drop
        return torch.where(passes.to(found.device), values[source], found)


def reconstruct(
    program: Program, unit: Unit, samples: Samples, settings: Settings, *, progress: bool = True
) -> Reconstruction:
    """Learn a unit's rounding; the program is left as it is.

    The draws depend on the seed and the unit's name alone, so that what other units did, or a resumed run, changes
    nothing.
    """
    began = time.perf_counter()
    learner = _Learner(program, unit, samples, settings)
    with in_eval_mode(program.module):
        nearest = {node: item.codes_of(weight_of(program, node)) for node, item in learner.roundings.items()}
        iterations = learner.run(progress)
        learned = {node: item.codes() for node, item in learner.roundings.items()}
        errors, check = learner.compare(nearest, learned)
    return Reconstruction(
        unit.name,
        {node.name: codes for node, codes in learned.items()},
        *errors,
        sum(int((learned[node] != nearest[node]).sum()) for node in learned),
        iterations,
        time.perf_counter() - began,
        samples.count,
        tuple(learner.curve),
        check,
    )


@dataclass(frozen=True, eq=False)
class _Errors:
    """Squared errors [2, channels] with the weights rounded to nearest and as learned; the squared target."""

    squared: torch.Tensor
    power: float

    def relative(self, choice: int) -> float:
        """The error of a choice over the target."""
        return self._over_target(float(self.squared[choice].sum()))

    @property
    def deviation(self) -> float:
        """Of the difference of both errors, over the target; 0 of a single channel."""
        return self._over_target(deviation(self.squared[1] - self.squared[0]))

    def _over_target(self, squared: float) -> float:
        return squared / self.power if self.power else squared


class _Learner:
    """One unit while it is learned."""

    def __init__(self, program: Program, unit: Unit, samples: Samples, settings: Settings) -> None:
        self.program, self.unit, self.samples, self.settings = program, unit, samples, settings
        self.generator = generator_of(unit.name, settings.seed)
        self.segment = segment_of(program, unit, samples)
        drops = settings.drop > 0 and samples.each == 1  # a layer alone, of which patches are, has no quantizer inside
        self.dropping = _Dropping(program, unit, settings.drop, self.generator) if drops else self.segment
        self.batch_size = settings.batch_size * samples.each
        self.learned_from, self.checked_on = samples.parts(settings.check_every)
        self.roundings: dict[fx.Node, SoftRounding] = {}
        bits = []
        for node in unit.weights:
            module = program.fake_quant(node)
            assert module is not None
            self.roundings[node] = SoftRounding(weight_of(program, node), module)
            bits.append(module.spec.bits)
        self.steps = settings.steps_for(min(bits))
        self.curve: list[tuple[int, float]] = []

    def run(self, progress: bool) -> int:
        """Take the steps; returns how many."""
        alphas = [item.alpha for item in self.roundings.values()]
        rate = self.settings.rate_for(self.steps)
        optimizer = torch.optim.Adam(alphas, lr=rate, fused=alphas[0].device.type in ("cpu", "cuda"))
        interval = max(self.steps // POINTS, 1)
        for step in track(range(self.steps), self._text, show=progress):
            is_shown = step % interval == 0 or step == self.steps - 1
            beta = self.settings.beta_at(step, self.steps)
            loss = self._step(beta, is_shown)
            optimizer.step()
            if loss is not None:
                self.curve.append((step, loss))
                if self.settings.early_stop and beta is not None and self._is_hard():
                    return step + 1
        return self.steps

    def _step(self, beta: float | None, wants_loss: bool) -> float | None:
        """Leave the gradients of one step in the alphas; returns the loss if it is wanted."""
        drawn = torch.randperm(len(self.learned_from), generator=self.generator)[: self.batch_size]
        inputs, target = self.samples.of(self.learned_from[drawn.to(self.learned_from.device)])
        weights = {node: item.weight() for node, item in self.roundings.items()}
        output = self._output(self.dropping, inputs, weights, target)
        difference = output.detach() - target
        share = target.shape[self.unit.channel_axis] / target.numel()
        grads = torch.autograd.grad(output, list(weights.values()), difference * (2 * share))
        for item, grad in zip(self.roundings.values(), grads, strict=True):
            item.backward(grad, beta, self.settings.regularization)
        if not wants_loss:
            return None
        exponent = self.settings.beta_start if beta is None else beta
        rest = sum(item.regulariser(exponent) for item in self.roundings.values())
        return float(difference.square_().sum()) * share + self.settings.regularization * rest

    def _output(
        self,
        segment: Segment,
        inputs: Mapping[fx.Node, torch.Tensor],
        weights: Mapping[fx.Node, torch.Tensor],
        target: torch.Tensor,
    ) -> torch.Tensor:
        """The unit's output on these inputs and weights; it must have its target's shape, or it is no such unit."""
        typed = {node: weight.to(weight_of(self.program, node).dtype) for node, weight in weights.items()}
        sizes = dict.fromkeys(self.unit.sizes, len(next(iter(inputs.values()))))
        output: torch.Tensor = segment.run({**inputs, **typed, **sizes})[self.unit.output]
        if output.shape != target.shape:
            raise FxquantError(
                f"reconstruction of '{self.unit.name}'",
                place=describe(self.unit.output),
                expected=f"an output of shape {tuple(target.shape)}, as in the float program",
                got=str(tuple(output.shape)),
            )
        return output

    def compare(self, nearest: Codes, learned: Codes) -> tuple[tuple[float, float], tuple[float, float, float] | None]:
        """Errors on all samples, and on those held back with the deviation of their difference, if there are such.

        That deviation is what the channels' differences say of their sum (gain.py).
        """
        checked = self._errors(nearest, learned, self.checked_on)
        if len(self.checked_on) == self.samples.count:
            return (checked.relative(0), checked.relative(1)), None
        rest = self._errors(nearest, learned, self.learned_from)
        both = _Errors(checked.squared + rest.squared, checked.power + rest.power)
        check = checked.relative(0), checked.relative(1), checked.deviation
        return (both.relative(0), both.relative(1)), check

    def _errors(self, nearest: Codes, learned: Codes, samples: torch.Tensor) -> _Errors:
        choices = [
            {node: item.real(codes[node]) for node, item in self.roundings.items()} for codes in (nearest, learned)
        ]
        axis = self.unit.channel_axis
        channels = self.samples.targets.shape[axis]
        squared = torch.zeros(2, channels, dtype=torch.float64, device=samples.device)
        power = 0.0
        with torch.no_grad():
            for index in torch.split(samples, self.batch_size):
                inputs, target = self.samples.of(index)
                power += float(target.double().square_().sum())
                for row, weights in zip(squared, choices, strict=True):
                    error = (self._output(self.segment, inputs, weights, target) - target).double().square_()
                    row += error.movedim(axis, 0).flatten(1).sum(1)
        return _Errors(squared, power)

    def _is_hard(self) -> bool:
        return all(item.is_hard() for item in self.roundings.values())

    def _text(self) -> str:
        loss = f", loss {self.curve[-1][1]:.3g}" if self.curve else ""
        return f"rounding of {self.unit.name}{loss}"
