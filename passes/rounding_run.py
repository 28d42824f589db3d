"""LearnsRounding: what passes that learn the rounding of weights share: options, resume, and the run over units."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.errors import FxquantError
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Note, NoteKind, Program, Stage
from fxquant.graph.rewriter import Rewriter
from fxquant.numerics.fake_quant import Mode
from fxquant.reconstruction import Collector, Reconstruction, Settings, Unfinished, Unit, reconstruct
from fxquant.reconstruction.units import weight_of

from .quantized_layers import QuantizedLayer, fix_codes, quantized_layers


@dataclass(frozen=True)
class LearnsRounding(Pass):
    """A pass that learns, unit by unit in graph order, whether each weight is rounded up or down.

    Arguments:
        iterations: steps for each unit; None: 10,000, or 15,000 where a weight has fewer than 8 bits.
        learning_rate: of Adam; None: 1e-3, or as much more as fewer iterations need to go as far (10 / iterations).
        batch_size: samples of a step.
        regularization: weight of the term that makes every number choose.
        beta_start, beta_end: exponent of that term, which falls along a half cosine.
        warm_start: the part of the iterations before that term counts.
        early_stop: end a unit as soon as every number has chosen for good.
        check_every: of so many samples the second is held back. Where the learned rounding of a unit is worse on these
            than rounding to nearest, by more than chance, the latter is kept. 0: all are learned from.
        positions: of the output of a convolution that is learned alone, drawn for each sample; None: all.
        cache_mb: megabytes for the inputs and float outputs of one unit, samples beyond are left out; and as many for
            the values from which both programs go on to the next unit, which are computed again where they do not fit.
        seed: of the samples of each step.
    """

    iterations: int | None = None
    learning_rate: float | None = None
    batch_size: int = 32
    regularization: float = 0.01
    beta_start: float = 20.0
    beta_end: float = 2.0
    warm_start: float = 0.2
    early_stop: bool = True
    check_every: int = 8
    positions: int | None = 256
    cache_mb: int = 1024
    seed: int = 0

    stages: ClassVar[tuple[Stage, ...]] = (Stage.CALIBRATED,)
    contract: ClassVar[Contract] = Contract.QUANTIZES

    def __post_init__(self) -> None:
        self.settings()
        if self.positions is not None and self.positions < 1:
            raise FxquantError("option 'positions'", expected="at least 1, or None", got=str(self.positions))
        if self.cache_mb < 1:
            raise FxquantError("option 'cache_mb'", expected="at least 1", got=str(self.cache_mb))

    @property
    def needs_data(self) -> bool:
        """It always measures."""
        return True

    def settings(self) -> Settings:
        """The options of learning."""
        return Settings(
            iterations=self.iterations,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            regularization=self.regularization,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            warm_start=self.warm_start,
            early_stop=self.early_stop,
            check_every=self.check_every,
            seed=self.seed,
        )

    @abstractmethod
    def units(self, program: Program, rewriter: Rewriter, layers: Sequence[QuantizedLayer]) -> Iterable[Unit]:
        """The units of a program, none reading what a later one computes; what is left out is a near miss."""

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Learn unit after unit, each on what the program before it, with its rounding learned, gives."""
        layers = {layer.quantizer.name: layer for layer in quantized_layers(program, rewriter)}
        if not layers:
            return
        bench = program.copy()
        units = list(self.units(bench, rewriter, list(quantized_layers(bench))))
        settle(bench)
        kept = self._unfinished(program, rewriter)
        collector = Collector(bench, rewriter.reference, units, rewriter.data.batches, self.cache_mb, self.seed)
        for unit in units:
            found = self._found(bench, rewriter, unit, kept, collector)
            if isinstance(found, str):
                rewriter.miss(unit.output, f"{unit.name} left as it is: {found}")
                continue
            self.learned(found)
            if found.is_better:
                rewriter.note(Note(NoteKind.OPTIMIZATION, unit.name, f"rounding of {unit.name}: {found}"))
            else:
                rewriter.miss(unit.output, f"{unit.name} rounded to nearest, which is as good: {found}")
            for node in unit.weights:
                codes = found.codes[node.name] if found.is_better else None
                _fix(program, rewriter, layers[node.name], bench, node, codes)

    def _unfinished(self, program: Program, rewriter: Rewriter) -> Unfinished | None:
        data = rewriter.data
        if data.folder is None:
            return None
        return Unfinished(data.folder, self.name, repr(self), program, rewriter.reference, data.batches)

    def learned(self, found: Reconstruction) -> None:
        """Called with what was learned of each unit, or read from the files of a killed run; does nothing here.

        For subclasses that report more than notes do, such as curves of losses.
        """

    def _found(
        self, bench: Program, rewriter: Rewriter, unit: Unit, kept: Unfinished | None, collector: Collector
    ) -> Reconstruction | str:
        if kept is not None:
            found, reason = kept.get(unit.name)
            if found is not None:
                return found
            if reason:
                rewriter.miss_option("resume", str(kept.folder), f"{unit.name} is learned anew: {reason}")
        samples = collector.samples(unit)
        if isinstance(samples, str):
            return samples
        learned = reconstruct(bench, unit, samples, self.settings(), progress=rewriter.data.progress)
        if kept is not None:
            kept.put(learned)
        return learned


def settle(bench: Program) -> None:
    """Bring a copy's weights' grids up to date, then let nothing move or be trained any more."""
    bench.module.eval()
    bench.module.requires_grad_(False)
    for _, module in bench.fake_quant_nodes():
        if module.follows and module.mode is not Mode.OFF:
            module.mode = Mode.FROZEN


def _fix(
    program: Program,
    rewriter: Rewriter,
    layer: QuantizedLayer,
    bench: Program,
    quantizer: fx.Node,
    codes: torch.Tensor | None,
) -> None:
    """Give a weight its codes (None: the nearest), in the program and on the bench, on the grid that it had there."""
    module, learned = layer.fake_quant(program), bench.fake_quant(quantizer)
    assert learned is not None
    if not torch.equal(module.scale, learned.scale) or not torch.equal(module.zero_point, learned.zero_point):
        with rewriter.editing(str(quantizer.target), "grid brought up to date"):
            module.set_encoding(learned.encoding)
    codes = learned.codes(weight_of(bench, quantizer)) if codes is None else codes
    fix_codes(program, rewriter, layer, codes)
    weight_of(bench, quantizer).copy_(learned.real(codes))
