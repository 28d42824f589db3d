"""ValueMeter: errors, range, codes and histogram of one quantized value, over any number of batches in bounded memory.

local error        Q(x) - x           of the value's own quantizer alone, x from the float run
accumulated error  Q(x') - x          x' from the quantized run: what all quantizers in front did, too
MSE                sum of error^2 / number of elements, over all elements of all batches
SQNR               10 log10(sum of x^2 / sum of error^2)
"""

from __future__ import annotations

import torch
from torch import fx

from fxquant.analysis.noise import energy_of, sqnr_db
from fxquant.analysis.report import HistogramRow, ValueRow
from fxquant.analysis.units import Unit
from fxquant.errors import FxquantError
from fxquant.graph.channels import channel_axis_of
from fxquant.graph.program import Program, describe, value_type
from fxquant.numerics.estimators.histogram import Histogram
from fxquant.numerics.fake_quant import FakeQuant

BINS = 96  # of a histogram as it is reported


class ValueMeter:
    """Sums over what it is shown of one value.

    Arguments:
        unit: whose value it is.
        node: calls the quantizer.
        owner: the value whose range it uses, "" for its own.
    """

    def __init__(self, program: Program, unit: Unit, node: fx.Node, owner: str = "") -> None:
        module, value = program.fake_quant(node), node.args[0]
        assert module is not None and isinstance(value, fx.Node)
        self.unit, self.node, self.value, self.module, self.owner = unit, node, value, module, owner
        self.count = 0
        self.clipped = 0
        self.signal = self.local = self.accumulated = 0.0
        device = module.scale.device
        self.low, self.high = torch.full((), torch.inf, device=device), torch.full((), -torch.inf, device=device)
        self.used = torch.zeros(module.spec.steps + 1, dtype=torch.bool, device=device)
        self.histogram = Histogram.empty(1, device)
        self.axis = channel_axis(program, value, module)
        self.channel_low: torch.Tensor | None = None
        self.channel_high: torch.Tensor | None = None

    def see(self, real: torch.Tensor, quantized: torch.Tensor | None, batch: int = 0) -> None:
        """Count the value as the float run and the quantized run have it, in front of its quantizer.

        `quantized`: None for a weight. Raises FxquantError for a value that is not finite.
        """
        if not real.numel():
            return
        x = real.detach().to(torch.float32)
        if not bool(torch.isfinite(x).all()):
            raise FxquantError(
                f"analyze: value '{self.value.name}' is not finite in batch {batch}",
                place=describe(self.value),
                remedy="Check the batch, or leave this value in float by a placement rule.",
            )
        self.count += x.numel()
        self.signal += energy_of(x)
        self.local += energy_of(self.module(x, observe=False) - x)
        if quantized is not None:
            self.accumulated += energy_of(self.module(quantized, observe=False).to(torch.float32) - x)
        self._count_codes(x)
        self.low, self.high = torch.minimum(self.low, x.min()), torch.maximum(self.high, x.max())
        self.histogram.add(x.reshape(1, -1), self.low[None], self.high[None])
        if self.axis is not None:
            self._see_channels(x.transpose(0, self.axis).flatten(1) if x.ndim > 1 else x[:, None])

    def _count_codes(self, x: torch.Tensor) -> None:
        spec = self.module.spec
        scale, zero_point = self.module.grid_for(x.ndim)
        steps = torch.round(x / scale)
        self.clipped += int(((steps < spec.qmin - zero_point) | (steps > spec.qmax - zero_point)).sum())
        self.used[(self.module.codes(x) - spec.qmin).flatten().long()] = True

    def _see_channels(self, rows: torch.Tensor) -> None:
        low, high = rows.amin(1), rows.amax(1)
        self.channel_low = low if self.channel_low is None else torch.minimum(self.channel_low, low)
        self.channel_high = high if self.channel_high is None else torch.maximum(self.channel_high, high)

    def row(self) -> ValueRow:
        """What was counted."""
        spec, encoding = self.module.spec, self.module.encoding
        grid_low = (spec.qmin - encoding.zero_point).double() * encoding.scale.double()
        low, high = (_rounded(part) for part in (self.channel_low, self.channel_high))
        extremes = [max(abs(a), abs(b)) for a, b in zip(low, high, strict=True)]
        alive = [extreme for extreme in extremes if extreme > 0]
        is_weight, count = self.module.follows, max(self.count, 1)
        return ValueRow(
            value=self.value.name,
            kind="weight" if is_weight else "activation",
            unit=self.unit.name,
            module=self.value.meta.get("module_path", ""),
            spec=str(spec),
            bits=spec.bits,
            shares=self.owner,
            local_sqnr_db=sqnr_db(self.signal, self.local),
            local_mse=self.local / count,
            accumulated_sqnr_db=None if is_weight else sqnr_db(self.signal, self.accumulated),
            accumulated_mse=None if is_weight else self.accumulated / count,
            min=float(self.low) if self.count else 0.0,
            max=float(self.high) if self.count else 0.0,
            grid_min=float(grid_low.min()),
            grid_max=float(encoding.max.max()),
            scale_low=float(encoding.scale.min()),
            scale_high=float(encoding.scale.max()),
            zero_point_low=int(encoding.zero_point.min()),
            zero_point_high=int(encoding.zero_point.max()),
            clipped=self.clipped / count,
            codes_used=int(self.used.sum()),
            codes=spec.steps + 1,
            channels=len(extremes),
            dead_channels=tuple(index for index, extreme in enumerate(extremes) if extreme == 0),
            channel_ratio=max(alive) / min(alive) if alive else None,
            channel_low=low if is_weight else (),
            channel_high=high if is_weight else (),
            histogram=self._histogram(),
        )

    def _histogram(self) -> HistogramRow:
        """At most BINS bins of one width between the extremes: neighbours of the fine histogram joined."""
        counts = self.histogram.counts[0].cpu()
        filled = counts.nonzero().flatten()
        if not len(filled):
            return HistogramRow(0.0, 1.0, ())
        first, last = int(filled[0]), int(filled[-1])
        joined = -(-(last + 1 - first) // BINS)
        bins = -(-(last + 1 - first) // joined)
        padded = torch.zeros(bins * joined, dtype=torch.int64)
        padded[: last + 1 - first] = counts[first : last + 1]
        width = float(self.histogram.width[0])
        edge = float(self.histogram.centres[0, first]) - width / 2
        return HistogramRow(edge, width * joined, tuple(padded.view(bins, joined).sum(1).tolist()))


def channel_axis(program: Program, value: fx.Node, module: FakeQuant) -> int | None:
    """The axis of a value's channels; None where it is not of a known size.

    A weight's is that of its scales, else 0; an activation's that which the layers in front of it say
    (graph/channels.py).
    """
    found = value_type(value)
    if found is None or not found.shape:
        return None
    rank = len(found.shape)
    if module.follows:
        axis = module.spec.granularity.axis
        return 0 if axis is None or module.spec.granularity.block is not None else axis % rank
    place = channel_axis_of(program, value)
    return place if rank > 1 and isinstance(found.shape[place], int) else None


def _rounded(channels: torch.Tensor | None) -> tuple[float, ...]:
    """Six digits: these are for the eye."""
    return () if channels is None else tuple(float(f"{number:.6g}") for number in channels.tolist())
