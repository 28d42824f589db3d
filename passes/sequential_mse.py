"""Choose weights' grids by what they do to the layers' outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fxquant.errors import ConfigError
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage
from fxquant.graph.rewriter import Rewriter
from fxquant.numerics.estimators import make_estimator
from fxquant.numerics.fake_quant import Mode
from fxquant.numerics.grids import grid_for_range
from fxquant.numerics.trained_ranges import LearnedRange
from fxquant.reconstruction.grid_search import (
    Candidates,
    Choice,
    by_moment,
    by_rows,
    choose_by_part,
    choose_by_row,
    output_power,
    parts_of,
)
from fxquant.reconstruction.kept import KeptLayers
from fxquant.reconstruction.product import squared_errors

from .layer_products import MeasuredLayer, measured_layers, note_gain
from .quantized_layers import Change

Found = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SequentialMse(Pass):
    """Give each weight, one after the other, that of `candidates` narrower ranges at which its layer's output has the
    least squared error (the search layer by layer that AIMET calls sequential MSE; it leaves weights of more than 4
    bits out, this one does not; fxquant/reconstruction/grid_search.py has the algebra).

    1. Candidates are the weight's extremes times k / candidates, k = 1 ... candidates, and the grid as it is. A tensor,
       channel or block has its own; a range never gets so narrow that the layer's bias overflows.
    2. The output is compared with that of the float weight on the same inputs, those that the quantized program leaves
       ("symqt" of AIMET's input modes, its default): a range can undo no error that came in with the inputs, and
       compared like this one pass over the data serves all candidates.
    3. The grid that is found is frozen; how the weight is rounded on it stays open: gptq or adaround may follow. One
       that training learns starts there instead.

    Declines, with the reason: weights that are shared, computed or not quantized; grids that are frozen already, of a
    fixed range, or that divide the weight's rows unevenly. Memory: `cache_mb`, a forward of one batch, and
    `memory_gib`: layers whose second moments need more are measured directly, batch by batch and candidate by
    candidate, which takes longer. Nothing is random. Layers that are done are kept in the run's folder, if it has one.
    Contract: QUANTIZES.

    Arguments:
        candidates: how many ranges are tried.
        memory_gib: most memory for the second moments of one layer, in GiB.
        cache_mb: most memory for what all batches are at one layer, in MiB; where it is not enough, the way from the
            last layer where it was is computed again (fxquant/graph/frontier.py).
    """

    candidates: int = 20
    memory_gib: float = 2.0
    cache_mb: int = 1024

    name: ClassVar[str] = "sequential-mse"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CALIBRATED,)
    leaves: ClassVar[Stage | None] = Stage.CALIBRATED
    contract: ClassVar[Contract] = Contract.QUANTIZES

    def __post_init__(self) -> None:
        for option, is_good, expected in (
            ("candidates", self.candidates >= 1, "at least 1"),
            ("memory_gib", self.memory_gib > 0.0, "more than 0"),
            ("cache_mb", self.cache_mb >= 0, "at least 0"),
        ):
            if not is_good:
                raise ConfigError(f"sequential-mse: {option}", expected=expected, got=str(getattr(self, option)))

    @property
    def needs_data(self) -> bool:
        """It measures the inputs of layers."""
        return True

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Choose layer by layer."""
        kept = KeptLayers(rewriter.data, self.name, repr(self), program)
        for measured in measured_layers(program, rewriter, Change.GRID, self.cache_mb):
            name = measured.layer.node.name
            found = kept.get(name) or self._choose(program, measured)
            if isinstance(found, str):
                rewriter.miss(measured.layer.node, f"{name} left as it is: {found}")
                continue
            kept.put(name, found)
            self._settle(rewriter, measured, found)
            signal, before, after = found["errors"].tolist()
            note_gain(rewriter, measured, signal, before, after)

    def _choose(self, program: Program, measured: MeasuredLayer) -> Found | str:
        """Scale and zero point, and the sums of squares of the output, its error before, and after; or why not."""
        if measured.quantizer.spec.fixed is not None:
            return f"its range is fixed: {measured.quantizer.spec}"
        found = self._candidates(program, measured)
        parts = parts_of(found.owner)
        if parts is None:
            return f"its grids, {measured.quantizer.spec.granularity}, do not divide the rows of its product alike"
        fits = measured.moment_gib <= self.memory_gib
        if len(parts) > 1 and not fits:
            need = f"{measured.moment_gib:.2g} GiB for its second moments"
            return f"its blocks need {need}, and memory_gib is {self.memory_gib:g}"
        choice, signal = _by_moments(found, parts, measured) if fits else _directly(found, measured)
        each = torch.arange(choice.best.numel(), device=choice.best.device)
        shape = measured.quantizer.scale.shape
        return {
            "scale": found.scales[choice.best, each].view(shape).cpu(),
            "zero_point": found.zero_points[choice.best, each].view(shape).cpu(),
            "errors": torch.stack([signal, choice.before.sum(), choice.after.sum()]).cpu(),
        }

    def _candidates(self, program: Program, measured: MeasuredLayer) -> Candidates:
        """Case 1; the grid as it is comes first, then from wide to narrow."""
        module = measured.quantizer
        spec, floor = module.spec, _floor(program, measured)
        plain = replace(spec, estimator="min-max")
        low, high = make_estimator(plain, tuple(module.scale.shape)).to(module.scale.device).range_of(measured.weight)
        grids = [(module.scale.clone(), module.zero_point.clone())]
        for index in range(self.candidates, 0, -1):
            share = index / self.candidates
            scale, zero_point = grid_for_range(low * share, high * share, spec)
            grids.append((torch.maximum(scale, floor), zero_point))
        scales, zero_points = (torch.stack([pair[part].flatten() for pair in grids]) for part in (0, 1))
        return Candidates(measured.matrix, measured.owner(), scales, zero_points, spec.qmin, spec.qmax)

    def _settle(self, rewriter: Rewriter, measured: MeasuredLayer, found: Found) -> None:
        """Case 3."""
        module, path = measured.quantizer, str(measured.layer.quantizer.target)
        with rewriter.editing(path, "the range of the least output error"), torch.no_grad():
            module.scale.copy_(found["scale"])
            module.zero_point.copy_(found["zero_point"])
            if isinstance(module.range, LearnedRange) and module.mode is Mode.LEARN:
                module.range.start(module.scale, module.zero_point)
                module.sync()
                return
        rewriter.set_mode(path, Mode.FROZEN)


def _floor(program: Program, measured: MeasuredLayer) -> torch.Tensor:
    """The smallest scales at which the layer's bias, if it is quantized, has codes of at most 2^23."""
    layer, floor = measured.layer, measured.quantizer.scale_floor
    quantized = None if layer.bias_position is None else next(iter(layer.node.args[layer.bias_position :]), None)
    module = program.bias_fake_quant(quantized) if isinstance(quantized, torch.fx.Node) else None
    if module is None or layer.bias is None:
        return floor
    return torch.maximum(floor, module.overflow_floor(program.tensor(layer.bias)))


def _by_moments(found: Candidates, parts: list[torch.Tensor], measured: MeasuredLayer) -> tuple[Choice, torch.Tensor]:
    moment = measured.moment()
    one_each = len(parts) == 1
    choice = choose_by_row(found, by_moment(moment)) if one_each else choose_by_part(found, parts, moment)
    return choice, squared_errors(found.weight, moment).sum()


def _directly(found: Candidates, measured: MeasuredLayer) -> tuple[Choice, torch.Tensor]:
    choice = choose_by_row(found, by_rows(measured.visit))
    powers: list[torch.Tensor] = []
    measured.visit(lambda rows: powers.append(output_power(rows, found.weight).sum()))
    return choice, torch.stack(powers).sum()
