"""Round weights by GPTQ: each column's error made up for by the columns behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fxquant.errors import ConfigError
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage
from fxquant.graph.rewriter import Rewriter
from fxquant.reconstruction.gain import gain_text
from fxquant.reconstruction.gptq import GptqOptions, gptq
from fxquant.reconstruction.kept import KeptLayers
from fxquant.reconstruction.product import squared_errors

from .layer_products import MeasuredLayer, measured_layers, note_gain
from .quantized_layers import Change, fix_codes

# Copies of the second moment that are held at once: itself, that of samples held back, in the order of columns, and two
# factors.
_COPIES = 5


@dataclass(frozen=True)
class Gptq(Pass):
    """Round the weights of convolutions and linears, one after the other, so that their outputs change least
    (Frantar et al., 2022, arXiv:2210.17323; fxquant/reconstruction/gptq.py has the algebra).

    1. The grid stays as it is, per tensor, per channel or in blocks; so run sequential-mse, or an estimator such as
       "mse", before. A layer's inputs are those of the quantized program, with the layers before it rounded already.
    2. Convolutions are unfolded to the product that they are; groups, and transposed ones, as well.
    3. Each output channel keeps GPTQ's codes if they leave a smaller squared error than rounding to nearest does.
    4. A layer is left where GPTQ, without the samples that were held back (`check_every`), does worse on these than
       rounding to nearest, by more than chance: there were too few to tell what other inputs are like. Otherwise they
       count as well.

    Declines, with the reason: weights that are shared, computed or not quantized; one that lies on its frozen grid
    already, as adaround leaves it; a layer where nothing is better than nearest; one whose second moments would take
    more than `memory_gib`. Memory: `memory_gib`, `cache_mb`, and a forward of one batch. Nothing is random. Layers that
    are done are kept in the run's folder, if it has one. Contract: QUANTIZES.

    Arguments:
        damping: what is added to the second moment's diagonal, as a share of its mean.
        block_size: columns that are rounded before the rest is updated: the result is the same, the time is not.
        act_order: whether columns are rounded in the order of falling inputs: often better.
        check_every: of so many samples the second is held back.
        memory_gib: most memory for the second moments of one layer, in GiB.
        cache_mb: most memory for what all batches are at one layer, in MiB; where it is not enough, the way from the
            last layer where it was is computed again (fxquant/graph/frontier.py).
    """

    damping: float = 0.01
    block_size: int = 128
    act_order: bool = False
    check_every: int = 8
    memory_gib: float = 4.0
    cache_mb: int = 1024

    name: ClassVar[str] = "gptq"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CALIBRATED,)
    leaves: ClassVar[Stage | None] = Stage.CALIBRATED
    contract: ClassVar[Contract] = Contract.QUANTIZES

    def __post_init__(self) -> None:
        for option, is_good, expected in (
            ("damping", 0.0 < self.damping <= 1.0, "more than 0, at most 1"),
            ("block_size", self.block_size >= 1, "at least 1"),
            ("check_every", self.check_every >= 2, "at least 2"),
            ("memory_gib", self.memory_gib > 0.0, "more than 0"),
            ("cache_mb", self.cache_mb >= 0, "at least 0"),
        ):
            if not is_good:
                raise ConfigError(f"gptq: {option}", expected=expected, got=str(getattr(self, option)))

    @property
    def needs_data(self) -> bool:
        """It measures the inputs of layers."""
        return True

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Round layer by layer."""
        kept = KeptLayers(rewriter.data, self.name, repr(self), program)
        for measured in measured_layers(program, rewriter, Change.CODES, self.cache_mb):
            layer, need = measured.layer, _COPIES * measured.moment_gib
            if need > self.memory_gib:
                reason = f"its second moments take {need:.1f} GiB, and memory_gib is {self.memory_gib:g}"
                rewriter.miss(layer.node, f"{layer.node.name} left as it is: {reason}")
                continue
            found = kept.get(layer.node.name)
            if found is None:
                found = self._round(measured)
                kept.put(layer.node.name, found)
            signal, before, after = found["errors"].tolist()
            if not after < before:
                rewriter.miss(layer.node, f"{layer.node.name} left as it is: {_why_nearest(found)}")
                continue
            fix_codes(program, rewriter, layer, found["codes"].to(measured.weight.device))
            note_gain(rewriter, measured, signal, before, after)

    def _round(self, measured: MeasuredLayer) -> dict[str, torch.Tensor]:
        """Codes, and the sums of squares of the output, its error on nearest codes, and on these.

        Where samples that were held back decided for the nearest codes: the sums there, with GPTQ's codes at the end.
        """
        (moment, held_back), matrix = measured.moments(self.check_every), measured.matrix
        options = GptqOptions(self.damping, self.block_size, self.act_order)
        found = gptq(matrix, moment, measured.grid(), options, held_back)
        sums = [part.sum() for part in (squared_errors(matrix, moment), found.nearest, found.chosen)]
        codes = measured.product.weight(found.codes, measured.weight)
        kept = {"codes": codes.contiguous().cpu(), "errors": torch.stack(sums).cpu()}
        if found.refused is not None and held_back is not None:
            kept["held_back"] = torch.stack([squared_errors(matrix, held_back).sum(), *found.refused]).cpu()
        return kept


def _why_nearest(found: dict[str, torch.Tensor]) -> str:
    """Why a layer is left, by what was kept of it."""
    if "held_back" not in found:
        return "nothing is better than rounding to nearest"
    signal, nearest, chosen = found["held_back"].tolist()
    errors = gain_text(signal, nearest, chosen)
    return f"on the samples that were held back, rounding to nearest is better: {errors} (nearest -> gptq)"
