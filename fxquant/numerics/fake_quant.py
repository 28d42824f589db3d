"""FakeQuant: the one module that holds quantization state; and BiasFakeQuant, whose grid follows from two others."""

from __future__ import annotations

from enum import Enum

import torch
from torch import nn

from fxquant.errors import CalibrationError
from fxquant.numerics.codes import Grid
from fxquant.numerics.estimators import make_estimator
from fxquant.numerics.grids import grid_for_range
from fxquant.numerics.rounding import along_axis, dequantize, fake_quantize, quantize
from fxquant.spec import BIAS_SPEC, PER_TENSOR, Encoding, Granularity, QuantSpec

# Beyond 2^23 a bias code leaves no room in the accumulator's exact float32 range for the products it is added to.
LARGEST_BIAS_CODE = 2**23


class Mode(Enum):
    """What a FakeQuant does to the tensor that it is given."""

    OBSERVE = "observe"  # pass it on, and estimate its range
    OBSERVE_FAKE = "observe-fake"  # estimate its range, and quantize it on the range seen so far
    FAKE = "fake"  # quantize and dequantize; a weight's grid follows the weight
    FROZEN = "frozen"  # quantize and dequantize on a grid that no longer moves
    OFF = "off"  # pass it on


class FakeQuant(nn.Module):
    """Fake quantization of one value.

    Buffers: `scale` (float32; NaN before calibration) and `zero_point` (int64), of the encoding's shape.

    Arguments:
        spec: what to do.
        shape: the encoding's shape, spec.granularity.encoding_shape(tensor's shape).
        follows: whether the grid follows the tensor at every forward (weights) or is calibrated (activations).
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    scale_floor: torch.Tensor

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...] = (), *, follows: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.follows = follows
        self.mode = Mode.OBSERVE
        self.estimator = make_estimator(spec, shape)
        self.register_buffer("scale", torch.full(shape, float("nan")))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("scale_floor", torch.zeros(shape))  # raised where a bias would overflow

    @property
    def has_encoding(self) -> bool:
        """Whether scale and zero point are known."""
        return bool(torch.isfinite(self.scale).all())

    @property
    def encoding(self) -> Encoding:
        """The grid as it is now, on the CPU."""
        if not self.has_encoding:
            raise CalibrationError(
                "FakeQuant has no encoding", remedy="Calibrate the program first (fxquant.calibrate)."
            )
        return Encoding(self.scale.detach().cpu().clone(), self.zero_point.detach().cpu().clone(), self.spec)

    def set_range(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Compute the grid that covers [low, high] under the spec."""
        scale, zero_point = grid_for_range(low, high, self.spec, is_weight=self.follows)
        self.scale.copy_(torch.maximum(scale, self.scale_floor))
        self.zero_point.copy_(zero_point)

    def set_encoding(self, encoding: Encoding) -> None:
        """Take over a grid (of the same codes)."""
        self.scale.copy_(encoding.scale)
        self.zero_point.copy_(encoding.zero_point)

    def compute_encoding(self) -> None:
        """Turn what the estimator saw into a grid; a fixed range needs no data."""
        if self.spec.fixed is None and not self.estimator.has_range:
            raise CalibrationError(
                "FakeQuant has no range", remedy="Run calibration batches through the program first."
            )
        self.set_range(*self.estimator.range()) if self.spec.fixed is None else self._set_fixed()

    def _set_fixed(self) -> None:
        assert self.spec.fixed is not None
        low, high = self.spec.fixed
        self.set_range(torch.full_like(self.scale, low), torch.full_like(self.scale, high))

    def follow(self, x: torch.Tensor) -> None:
        """Recompute the grid from the tensor itself."""
        low, high = self.estimator.range_of(x)
        if self.spec.fixed is None and self.estimator.has_range:
            self.set_range(low, high)
        else:
            self.compute_encoding()

    def refresh(self, x: torch.Tensor) -> None:
        """Bring a grid that follows its tensor up to date with it."""
        if self.follows and self.mode is Mode.FAKE:
            self.follow(x)

    @property
    def grid(self) -> Grid:
        """The grid as it is now: the buffers themselves."""
        granularity = self.spec.granularity if self.scale.ndim else PER_TENSOR
        return Grid(self.scale, self.zero_point, self.spec.qmin, self.spec.qmax, granularity)

    def forward(self, x: torch.Tensor, observe: bool = True) -> torch.Tensor:
        """Observe or quantize `x`, by mode; `observe=False` where another node owns the range."""
        if self.mode is Mode.OFF:
            return x
        if self.mode is Mode.OBSERVE_FAKE and self.follows:
            return self._fake_within(*self.estimator.range_of(x), x)
        if self.mode in (Mode.OBSERVE, Mode.OBSERVE_FAKE):
            if observe:
                self.estimator.observe(x)
            fakes = observe and self.mode is Mode.OBSERVE_FAKE
            return self._fake_within(self.estimator.low, self.estimator.high, x) if fakes else x
        self.refresh(x)
        scale, zero_point = self.grid_for(x.ndim)
        return fake_quantize(x, scale, zero_point, self.spec.qmin, self.spec.qmax)

    def _fake_within(self, low: torch.Tensor, high: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`x` quantized within a range of the moment, the grid left as it is; `x` itself if the range is not finite."""
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            return x
        found = grid_for_range(low, high, self.spec, is_weight=self.follows)
        grid = [along_axis(part, self.spec.granularity, x.ndim) for part in found]
        return fake_quantize(x, grid[0], grid[1], self.spec.qmin, self.spec.qmax)

    def grid_for(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, shaped to broadcast against a tensor of `rank` dimensions."""
        granularity = self.spec.granularity
        return along_axis(self.scale, granularity, rank), along_axis(self.zero_point, granularity, rank)

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """Integer codes (int32) of `x` on the grid as it is now."""
        scale, zero_point = self.grid_for(x.ndim)
        return quantize(x.detach(), scale, zero_point, self.spec.qmin, self.spec.qmax)

    def real(self, codes: torch.Tensor) -> torch.Tensor:
        """Real values (float32) of integer codes."""
        return dequantize(codes, *self.grid_for(codes.ndim))

    def extra_repr(self) -> str:
        """Spec and mode, for printing."""
        return f"{self.spec}, mode={self.mode.value}"


class BiasFakeQuant(nn.Module):
    """Fake quantization of a bias to int32 at scale f(sx * sw), zero point 0, as onnxruntime's integer kernels add it.

    The two FakeQuants whose scales it multiplies are linked from the graph (Program.link_biases); it owns no state.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sources: tuple[FakeQuant, FakeQuant] | None = (
            None  # a tuple, so that nn.Module does not register them here
        )

    def link(self, x_quant: FakeQuant, weight_quant: FakeQuant) -> None:
        """Take input and weight scale from these."""
        self._sources = (x_quant, weight_quant)

    @property
    def sources(self) -> tuple[FakeQuant, FakeQuant]:
        """The input's and the weight's FakeQuant."""
        assert self._sources is not None, "Program.link_biases links every BiasFakeQuant"
        return self._sources

    @property
    def scale(self) -> torch.Tensor:
        """f(sx * sw): float32, of the weight scale's shape."""
        x_quant, weight_quant = self.sources
        return x_quant.scale * weight_quant.scale

    @property
    def encoding(self) -> Encoding:
        """The bias's grid as it is now, on the CPU."""
        scale = self.scale.detach().cpu()
        axis = None if scale.ndim == 0 else 0
        spec = QuantSpec(BIAS_SPEC.bits, signed=True, symmetric=True, granularity=Granularity(axis))
        return Encoding(scale, torch.zeros_like(scale, dtype=torch.int64), spec)

    @property
    def grid(self) -> Grid:
        """The grid as it is now, where the parameters are."""
        scale = self.scale
        zero_point = torch.zeros_like(scale, dtype=torch.int64)
        return Grid(scale, zero_point, BIAS_SPEC.qmin, BIAS_SPEC.qmax, Granularity(0) if scale.ndim else PER_TENSOR)

    def codes(self, bias: torch.Tensor) -> torch.Tensor:
        """Integer codes (int32) of a bias of shape (channels,)."""
        zero = torch.zeros_like(self.scale, dtype=torch.int64)
        return quantize(bias.detach(), self.scale, zero, BIAS_SPEC.qmin, BIAS_SPEC.qmax)

    def overflow_floor(self, bias: torch.Tensor) -> torch.Tensor:
        """Smallest weight scales, of the weight scale's shape, at which no bias code exceeds LARGEST_BIAS_CODE."""
        x_quant, weight_quant = self.sources
        need = bias.detach().double().abs() / (x_quant.scale.double() * LARGEST_BIAS_CODE)
        return (need.amax() if weight_quant.scale.ndim == 0 else need).to(torch.float32)

    def forward(self, bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Quantize the bias once both grids are in use; `x` and `weight` only name the sources."""
        if any(source.mode in (Mode.OFF, Mode.OBSERVE, Mode.OBSERVE_FAKE) for source in self.sources):
            return bias
        zero = torch.zeros_like(self.scale, dtype=torch.int64)
        return fake_quantize(bias, self.scale, zero, BIAS_SPEC.qmin, BIAS_SPEC.qmax)
