"""Shift biases so that quantization leaves the mean of each layer's output channels where it was."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import fx

from fxquant.errors import ConfigError, PassError, nearest
from fxquant.graph.bias_correction import correction_of
from fxquant.graph.frontier import Frontier
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Note, NoteKind, Program, Stage, describe
from fxquant.graph.rewriter import Rewriter
from fxquant.graph.statistics import statistics_of
from fxquant.progress import track

from .bias_layers import BiasedLayer, add_bias, biased_layers, puts_biases_on_grids, record_settled, set_bias
from .channel_means import ChannelMeans, means_of
from .expected_errors import expected_error
from .value_moments import value_moments


class Method(Enum):
    """Where the mean error of a layer's output comes from."""

    EMPIRICAL = "empirical"  # measured on batches
    ANALYTIC = "analytic"  # computed from the statistics of folded batch norms


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Bias correction: b -= E[y_q] - E[y] for each output channel of each layer with a quantized weight.

    Nagel et al. 2019 (arXiv:1906.04721), section 4.2 and appendix. y is the layer's output before its activation and
    quantizer, in float; y_q the same with quantized weights and inputs; E goes over batch and positions.

    1. "empirical" measures both on the run's batches: y in one forward pass of the float program as the run of passes
       began; y_q layer by layer, those before it corrected already (fxquant.graph.frontier: about two more passes).
       What remains is at most half a step of the bias's grid.
    2. "analytic" needs no data: E[y_q] - E[y] = sum (Wq - W) E[x], with E[x] from batch norms that were folded
       (value_moments.py has the rules, expected_errors.py the sum). It sees the error of a layer's own weight only, not
       what rounding and clipping of activations add.
    3. A layer that is called twice gets a bias for each call: their errors differ. One without a bias gets one, an
       int32 one where the program's biases are (quantize-bias).
    4. Weights need not follow their grid: behind adaround or gptq biases are corrected alike.

    What was taken off is kept with the layer: a second analytic run replaces the first, a second empirical run finds
    nothing left. Activations' ranges stay as they are; 'recalibrate' behind this pass estimates them anew. Declines,
    with the reason: a weight that is not quantized; a bias that is computed (live batch norm); analytic, an input of
    which nothing is known. Contract: QUANTIZES.

    Arguments:
        method: "empirical" or "analytic".
        max_batches: measure on so many batches; None: on all.
        layers: a regular expression that a layer's name or module path must match in full; others stay as they are.
        cache_mb: memory for values kept between layers; with less, more is computed twice.
    """

    method: Method = Method.EMPIRICAL
    max_batches: int | None = None
    layers: str = ".*"
    cache_mb: int = 1024

    name: ClassVar[str] = "correct-bias"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CALIBRATED,)
    leaves: ClassVar[Stage | None] = Stage.CALIBRATED
    contract: ClassVar[Contract] = Contract.QUANTIZES

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", _method(self.method))
        if self.max_batches is not None and self.max_batches < 1:
            raise ConfigError(f"{self.name}: max_batches", expected="at least 1", got=str(self.max_batches))
        if self.cache_mb < 0:
            raise ConfigError(f"{self.name}: cache_mb", expected="at least 0", got=str(self.cache_mb))
        try:
            re.compile(self.layers)
        except re.error as err:
            raise ConfigError(f"{self.name}: layers", expected="a regular expression", got=str(err)) from err

    @property
    def needs_data(self) -> bool:
        """Whether it measures."""
        return self.method is Method.EMPIRICAL

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Correct layer by layer, then say what it came to."""
        layers = list(biased_layers(program, rewriter, self.layers))
        corrector = Corrector(program, rewriter, puts_biases_on_grids(program, layers), self.method)
        errors = self._measured if self.method is Method.EMPIRICAL else self._expected
        for layer, error, std in errors(program, rewriter, layers):
            corrector.correct(layer, error, std)
        corrector.summarise(len(layers))

    def _measured(self, program: Program, rewriter: Rewriter, layers: list[BiasedLayer]) -> Iterator[_Found]:
        """Case 1; the next layer is measured once this one has been corrected."""
        record_settled(program, rewriter)
        data = rewriter.data
        axes = {layer.node.name: layer.axis for layer in layers}
        shown = track(data.batches, f"{self.name}: in float", show=data.progress)
        floats = means_of(rewriter.reference, axes, shown, self.max_batches)
        batches = _First(data.batches, self.max_batches)
        frontier = Frontier(program, [layer.node for layer in layers], batches, self.cache_mb * 2**20)
        for layer in track(layers, self.name, show=data.progress):
            quantized = ChannelMeans(layer.axis)
            frontier.advance(layer.node, quantized.see)
            expected = floats[layer.node.name]
            _require_numbers(layer.node, expected, quantized)
            yield layer, quantized.mean - expected.mean, expected.std

    def _expected(self, program: Program, rewriter: Rewriter, layers: list[BiasedLayer]) -> Iterator[_Found]:
        """Case 2."""
        known = value_moments(program)
        for layer in layers:
            error = expected_error(program, rewriter.known_reference, layer, known[layer.input])
            if isinstance(error, str):
                rewriter.miss(layer.node, f"{layer.node.name} left as it is: {error}")
                continue
            statistics = statistics_of(layer.node)
            yield layer, error, None if statistics is None else statistics.tensors()[1]


_Found = tuple[BiasedLayer, torch.Tensor, torch.Tensor | None]  # a layer, its mean error, its output's deviation


@dataclass
class Corrector:
    """Corrects the biases of one program, and keeps account."""

    program: Program
    rewriter: Rewriter
    on_grid: bool  # whether new biases are int32 codes
    method: Method
    corrected: int = 0
    largest: list[tuple[float, str]] = field(default_factory=list)  # of each layer whose deviation is known

    def correct(self, layer: BiasedLayer, error: torch.Tensor, std: torch.Tensor | None) -> None:
        """Take a mean error off a layer's bias."""
        taken = correction_of(layer.node)
        before = error.new_zeros(error.shape) if taken is None else taken.to(error)
        stored, used = self._stored_and_used(layer, error)
        if self.method is Method.EMPIRICAL:
            start, after = used, before + (stored - used) + error
        else:
            start, after = stored + before, error
        if self._give(layer, start - error):
            self.rewriter.set_bias_correction(layer.node, after)
            self._account(layer, error, std)

    def _stored_and_used(self, layer: BiasedLayer, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The bias as its parameter has it, and as it was added when the error was measured: on its grid, if any."""
        if layer.bias is None:
            zero = error.new_zeros(error.shape)
            return zero, zero
        module, bias = layer.bias_quant(self.program), self.program.tensor(layer.bias).detach()
        used = bias if module is None else module(bias, bias, bias)
        return bias.to(error).flatten(), used.to(error).flatten()

    def _give(self, layer: BiasedLayer, values: torch.Tensor) -> bool:
        if layer.bias is not None:
            return set_bias(self.program, self.rewriter, layer, values)
        if bool(values.any()):
            add_bias(self.program, self.rewriter, layer, values, self.on_grid)
        return bool(values.any())

    def _account(self, layer: BiasedLayer, error: torch.Tensor, std: torch.Tensor | None) -> None:
        self.corrected += 1
        largest = float(error.abs().max())
        text = f"{self.rewriter.pass_name}: bias of {error.numel()} channels corrected by up to {largest:.3g}"
        if std is not None and bool(std.any()):
            part = float((error.abs() / std.clamp(min=1e-3 * float(std.max())).to(error)).max())
            self.largest.append((part, layer.node.name))
            text += f", at most {part:.3g} of the deviation of a channel's output"
        self.rewriter.note(Note(NoteKind.OPTIMIZATION, layer.node.name, text))

    def summarise(self, layers: int) -> None:
        """One note for the program."""
        text = f"{self.rewriter.pass_name} ({self.method.value}): {self.corrected} of {layers} layers corrected"
        if self.largest:
            part, name = max(self.largest)
            text += f"; the largest mean error was {part:.3g} of a deviation, at {name}"
        self.rewriter.note(Note(NoteKind.OPTIMIZATION, "", text))


class _First:
    """The first batches of what can be iterated anew."""

    def __init__(self, batches: Any, count: int | None) -> None:
        self._batches, self._count = batches, count

    def __iter__(self) -> Iterator[Any]:
        return islice(self._batches, self._count)


def _method(value: Method | str) -> Method:
    if isinstance(value, Method):
        return value
    known = {method.value: method for method in Method}
    if value not in known:
        raise ConfigError(f"correct-bias: method '{value}'", remedy=nearest(str(value), known))
    return known[value]


def _require_numbers(node: fx.Node, *means: ChannelMeans) -> None:
    for found in means:
        if found.count == 0:
            raise PassError(f"correct-bias: node '{node.name}'", place=describe(node), expected="batches", got="none")
        if not bool(torch.isfinite(found.mean).all()):
            raise PassError(
                f"correct-bias: node '{node.name}'",
                place=describe(node),
                expected="finite values",
                got="NaN or Inf on the batches",
                remedy="Check the batches, or leave the layer in float by a placement rule.",
            )
